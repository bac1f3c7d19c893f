// Fibers: stacks that a thread switches between. A switch saves what a call would keep, and nothing else.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace mk::host {

#if defined(__x86_64__) || defined(__aarch64__)
// Saves the registers that a call keeps on the stack and the stack's address in `save`, and goes on where `load` stopped.
extern "C" __attribute__((visibility("hidden"))) void mk_host_switch(void** save, void* load);
#endif

#if defined(__x86_64__)

struct Context {
  void* sp = nullptr;

  void start(char* top, void (*entry)()) {
    void** frame = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
    *--frame = nullptr;  // entry's return address, which also aligns its stack
    *--frame = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--frame = nullptr;
    sp = frame;
  }
};

inline void switch_context(Context& from, Context& to) { mk_host_switch(&from.sp, to.sp); }

#elif defined(__aarch64__)

struct Context {
  void* sp = nullptr;

  void start(char* top, void (*entry)()) {
    void** frame = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15}) - 160);
    for (int i = 0; i < 20; i++) frame[i] = nullptr;
    frame[11] = reinterpret_cast<void*>(entry);  // x30, where the switch returns to
    sp = frame;
  }
};

inline void switch_context(Context& from, Context& to) { mk_host_switch(&from.sp, to.sp); }

#else

struct Context {
  ucontext_t context;

  void start(char* bottom, char* top, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = bottom;
    context.uc_stack.ss_size = static_cast<size_t>(top - bottom);
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
};

inline void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

#endif

// Stacks for a number of fibers, each above a page that may not be touched. Memory is there once it is used.
class Stacks {
 public:
  static constexpr size_t kBytes = 256 * 1024;

  explicit Stacks(size_t count) : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))), count_(count) {
    void* memory = mmap(nullptr, count_ * pitch(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    for (size_t i = 0; i < count_; i++) mprotect(memory_ + i * pitch(), page_, PROT_NONE);
  }
  ~Stacks() { munmap(memory_, count_ * pitch()); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  char* bottom(size_t i) const { return memory_ + i * pitch() + page_; }
  char* end(size_t i) const { return memory_ + (i + 1) * pitch(); }
  // Tops differ modulo the page size, or all stacks would compete for the same few lines of the cache.
  char* top(size_t i) const { return end(i) - i * 704 % 4096; }

  void start(Context& context, size_t i, void (*entry)()) const {
#if defined(__x86_64__) || defined(__aarch64__)
    context.start(top(i), entry);
#else
    context.start(bottom(i), top(i), entry);
#endif
  }

 private:
  size_t pitch() const { return kBytes + page_; }

  size_t page_, count_;
  char* memory_;
};

}  // namespace mk::host
