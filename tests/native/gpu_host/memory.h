// Device memory as the units of a GPU see it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "options.h"
#include "random.h"

namespace mk::host {

// Which accesses happen before which. A wave's clock advances at every point that orders its lanes; what wave a knows of wave
// b is the last clock of b that a synchronisation has made it wait for.
class Clocks {
 public:
  explicit Clocks(size_t waves) : waves_(waves), known_(waves * waves, 0), released_(waves, 0) {
    for (size_t i = 0; i < waves; i++) known_[i * waves + i] = 1;
  }
  u32 now(size_t wave) const { return known(wave, wave); }
  u32 known(size_t wave, size_t of) const { return known_[wave * waves_ + of]; }
  void advance(size_t wave) { known_[wave * waves_ + wave]++; }
  // The waves of `members` (bit i: wave first + i) meet.
  void join(size_t first, u64 members);
  // What `wave` has done and knows of becomes visible to those who acquire later.
  void release(size_t wave);
  void acquire(size_t wave);

 private:
  size_t waves_;
  std::vector<u32> known_;     // [wave][of]
  std::vector<u32> released_;  // [of]
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Zeroed = std::unique_ptr<T[], Free>;  // memory that costs nothing before it is used
template <typename T>
Zeroed<T> zeroed(size_t count) {
  void* p = std::calloc(count ? count : 1, sizeof(T));
  if (p == nullptr) throw std::bad_alloc();
  return Zeroed<T>(static_cast<T*>(p));
}

// The words of the workspace. A unit sees its own stores at once, the others later: addresses in any order, one address in
// the order of its stores.
class Words {
 public:
  Words(const Options& options, size_t units, size_t waves, Clocks& clocks, Random& random, Statistics& statistics);

  u32 load(const u32* p, size_t unit, size_t wave);
  void store(u32* p, u32 value, size_t unit, size_t wave);
  bool claim(u32* p);
  void release(size_t unit, size_t wave);
  void acquire(size_t wave) { acquired_[wave] = statistics_.steps; }
  void join(size_t first, u64 members);  // waves meet, as in Clocks
  // Stores whose time has come become visible.
  void settle() {
    if (statistics_.steps >= next_due_) settle_due();
  }
  // Some of the stores that wait become visible: with Stores::kLate nothing else makes them so, save a release.
  void settle_some();
  void settle_all();
  u64 news() const { return news_; }  // how often something became visible

  bool holds(const void* p) const {
    return p >= options_.workspace && static_cast<const char*>(p) < options_.workspace + options_.workspace_bytes;
  }

 private:
  static constexpr u64 kNever = ~u64{0};
  static constexpr u64 kHeld = kNever - 1;  // by a fault: not even a release helps

  struct Store {
    u64 due;
    size_t word;
    u32 value;
    u32 wave, clock;
  };
  struct View {  // of a word by the unit that stores it
    u64 last_due;
    u32 value;
    u32 waiting;  // stores
  };
  struct Word {
    u64 step;  // when it became visible
    u32 previous;
    u32 version;
  };

  void settle_due();
  template <bool in_order, typename Due>
  void settle_unit(size_t unit, Due due);
  void make_visible(size_t unit, const Store& store);
  size_t index(const u32* p) const { return static_cast<size_t>(reinterpret_cast<const char*>(p) - options_.workspace) / 4; }
  u64 delay();

  const Options& options_;
  Clocks& clocks_;
  Random& random_;
  Statistics& statistics_;
  size_t count_;
  std::vector<std::vector<Store>> waiting_;  // [unit], in the order of the stores
  std::vector<u64> acquired_;                // [wave], step
  Zeroed<View> views_;                       // [unit][word]
  Zeroed<u32> versions_;                     // [unit][word] that the unit has seen
  Zeroed<Word> words_;                       // [word]
  u64 next_due_ = kNever;
  u64 news_ = 0;
  u64 fault_count_ = 0;
};

}  // namespace mk::host
