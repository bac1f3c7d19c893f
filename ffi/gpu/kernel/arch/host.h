// A CPU that runs the kernel for tests: every lane is a fiber of one thread (tests/native/gpu_host has the executor).
//
// Lanes of a wave meet at every function that takes a whole wave; the executor checks that all of them do. At every
// operation that other units can notice, it may let another wave go on, and it delays stores as a GPU may.
#pragma once

#include "args.h"

#define MK_DEVICE [[maybe_unused]] static inline
#define MK_METHOD inline
#define MK_CONSTANT [[maybe_unused]] static
#define MK_KERNEL(threads) extern "C" __attribute__((visibility("hidden")))
#define MK_UNROLL
#define MK_NO_UNROLL

namespace mk {

struct alignas(16) Vec4 {
  u32 x, y, z, w;
};

#pragma GCC visibility push(hidden)
namespace host {

// Where in the kernel's source a lane is.
struct Where {
  const char* file;
  int line;
};
constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

struct Place {
  u32 unit, wave, lane;
};
extern Place* current;  // the lane that runs

struct Matrices {  // one lane's registers of a matrix instruction
  float* c;        // [4], in and out
  u32 a[4], b[2];
  u32 b_lanes = 64, b_first = 0;  // mfma: lane l of B is lane l % b_lanes + b_first
};

char* shared_memory();
void wave_sync(Where);
constexpr u32 kFirstGate = 8, kBarriers = kFirstGate + 3;
void barrier(u32 id, u32 waves, Where);  // id 0: all waves
void arrive(u32 id, u32 waves, Where);   // the same without waiting
u32 shuffle(u32 value, u32 from, Where);
bool any(bool, Where);
void mma_16x8x16(bool bf16, Matrices&, Where);
void mfma_4x4x4(bool bf16, Matrices&, Where);
u32 load_word(const u32*, Where);
Vec4 load_words(const u32*, Where);
void store_word(u32*, u32, Where);
void store_half(u16*, u32, Where);
void store_near_word(u32*, u32, Where);
u32 die();
u32 add(u32*, u32, Where);
Vec4 load_data(const void*, bool once, Where);
u32 load_host(const u32*, Where);
void store_host(u64*, u64, Where);
bool claim(u32*, Where);
u32 shared_add(u32*, u32, Where);
void release(Where);
void acquire(Where);
void make_copy_barrier(u64*, Where);
void announce_copies(u64*, int bytes, Where);
void copy_in(void* to, const void* from, int bytes, u64* barrier, Where);
void await_copies(u64*, u32 parity, Where);  // all lanes of a wave
void publish_to_copies(Where);
u64 ticks(Where);
void ring_meet(const char* what, Where);  // all lanes of a wave
void ring_open(int change);               // +1 started, -1 drained
[[noreturn]] void fail(Where, const char* format, ...);

// What the stub was compiled for, for the executor.
struct Geometry {
  u32 units, waves, wave_size, shared_bytes, checked;
};
extern const Geometry geometry;
constexpr u32 kUnwritten = 0x7fc0dead;  // a NaN

}  // namespace host
#pragma GCC visibility pop
}  // namespace mk

// The executor includes what is above.
#if defined(MK_WAVE_SIZE)

// As on the machines with such waves.
#if MK_WAVE_SIZE == 64
#define MK_REGISTER_RING 1
#endif

namespace mk {
namespace arch {

constexpr int kWave = MK_WAVE_SIZE;
static_assert(kWave == 32 || kWave == 64, "a wave has 32 or 64 lanes");
constexpr int kReservedShared = 64;  // bytes at the end of shared memory that are the machine's own

MK_DEVICE int unit() { return (int)host::current->unit; }
MK_DEVICE int wave() { return (int)host::current->wave; }
MK_DEVICE int lane() { return (int)host::current->lane; }
MK_DEVICE char* shared() { return host::shared_memory(); }

constexpr bool kRenew = kWave == 64;  // as on the machines with such waves
MK_DEVICE const Args& arguments(const Args& args) { return args; }
MK_DEVICE u32 fresh(u32 v) { return v; }
MK_DEVICE bool fresh_truth(bool v) { return v; }
MK_DEVICE int unknown(int v) { return v; }

MK_DEVICE void enter() {}
template <bool streams, int stream_registers>
MK_DEVICE void divide_registers() {}
MK_DEVICE void unit_sync(host::Where at = host::here()) { host::barrier(0, host::geometry.waves, at); }
template <int id, int waves>
MK_DEVICE void group_sync(host::Where at = host::here()) {
  static_assert(1 <= id && id <= 7 && 1 <= waves && waves <= MK_WAVES + MK_SERVICE_WAVES);
  host::barrier(id, waves, at);
}
// With waves of 32 lanes, as on the machines that have them, one side of a gate does not wait.
template <u32 gate>
MK_DEVICE void come(host::Where at) {
  if constexpr (kWave == 64) return host::barrier(0, host::geometry.waves, at);
  host::arrive(host::kFirstGate + gate, host::geometry.waves, at);
}
template <u32 gate>
MK_DEVICE void wait(host::Where at) {
  host::barrier(kWave == 64 ? 0 : host::kFirstGate + gate, host::geometry.waves, at);
}
MK_DEVICE void open_gate(host::Where at = host::here()) { come<0>(at); }
MK_DEVICE void pass_gate(host::Where at = host::here()) { wait<0>(at); }
MK_DEVICE void hand_over(host::Where at = host::here()) { come<1>(at); }
MK_DEVICE void take_over(host::Where at = host::here()) { wait<1>(at); }
MK_DEVICE void hand_over_squares(host::Where at = host::here()) { come<2>(at); }
MK_DEVICE void take_over_squares(host::Where at = host::here()) { wait<2>(at); }
MK_DEVICE void wave_sync(host::Where at = host::here()) { host::wave_sync(at); }

MK_DEVICE u32 as_u32(float v) { return __builtin_bit_cast(u32, v); }
MK_DEVICE float as_f32(u32 v) { return __builtin_bit_cast(float, v); }
MK_DEVICE u32 shuffle(u32 v, int from, host::Where at = host::here()) { return host::shuffle(v, (u32)from, at); }
MK_DEVICE float shuffle(float v, int from, host::Where at = host::here()) {
  return as_f32(host::shuffle(as_u32(v), (u32)from, at));
}
MK_DEVICE u32 shuffle_xor(u32 v, int mask, host::Where at = host::here()) {
  return host::shuffle(v, (u32)(lane() ^ mask), at);
}
MK_DEVICE float shuffle_xor(float v, int mask, host::Where at = host::here()) {
  return as_f32(host::shuffle(as_u32(v), (u32)(lane() ^ mask), at));
}
MK_DEVICE float sum_fours(float v, host::Where at = host::here()) {
  v += shuffle_xor(v, 8, at);
  return v + shuffle_xor(v, 4, at);
}
MK_DEVICE float sum_quarters(float v, host::Where at = host::here()) {
  v += shuffle_xor(v, 16, at);
  return v + shuffle_xor(v, 32, at);
}
MK_DEVICE u32 wave_max(u32 v, host::Where at = host::here()) {
  for (int step = 1; step < kWave; step *= 2) {
    const u32 other = shuffle_xor(v, step, at);
    v = other > v ? other : v;
  }
  return v;
}
MK_DEVICE bool any(bool v, host::Where at = host::here()) { return host::any(v, at); }

MK_DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MK_DEVICE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
MK_DEVICE float sqrt(float v) { return __builtin_sqrtf(v); }
MK_DEVICE double sqrt(double v) { return __builtin_sqrt(v); }
MK_DEVICE float fast_rsqrt(float v) { return 1.0f / __builtin_sqrtf(v); }
MK_DEVICE float fast_divide(float a, float b) { return a / b; }
MK_DEVICE float fast_exp2(float v) { return __builtin_exp2f(v); }
// Round to nearest even; NaN stays NaN.
MK_DEVICE u32 to_bf16(float v) {
  const u32 bits = as_u32(v);
  return v == v ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : 0x7fc0u;
}
#if MK_WAVE_SIZE == 32
MK_DEVICE u32 low_halves(u32 a, u32 b) { return (a & 0xffffu) | b << 16; }
MK_DEVICE u32 high_halves(u32 a, u32 b) { return a >> 16 | (b & 0xffff0000u); }
#endif
MK_DEVICE u32 pack_bf16(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }

MK_DEVICE u32 load_word(const u32* p, host::Where at = host::here()) { return host::load_word(p, at); }
MK_DEVICE Vec4 load_words(const u32* p, host::Where at = host::here()) { return host::load_words(p, at); }
MK_DEVICE void store_word(u32* p, u32 v, host::Where at = host::here()) { host::store_word(p, v, at); }
MK_DEVICE void store_half(u16* p, u32 v, host::Where at = host::here()) { host::store_half(p, v, at); }
MK_DEVICE bool halves_not_zero(const Vec4& v) {
  const u32 words[4] = {v.x, v.y, v.z, v.w};
  for (u32 word : words) {
    if ((word & 0xffffu) == 0 || word >> 16 == 0) return false;
  }
  return true;
}
MK_DEVICE u32 load_byte(const u8* p) { return *p; }
MK_DEVICE void store_byte(u8* p, u32 v) { *p = (u8)v; }
MK_DEVICE u32 die() { return host::die(); }
MK_DEVICE u32 load_near_word(const u32* p, host::Where at = host::here()) { return host::load_word(p, at); }
MK_DEVICE Vec4 load_near_words(const u32* p, host::Where at = host::here()) { return host::load_words(p, at); }
MK_DEVICE void store_near_word(u32* p, u32 v, host::Where at = host::here()) { host::store_near_word(p, v, at); }
MK_DEVICE void look_again() {}
MK_DEVICE u32 add(u32* p, u32 v, host::Where at = host::here()) { return host::add(p, v, at); }
MK_DEVICE int shared_number(const int* p) { return *p; }
MK_DEVICE Vec4 load_shared_data(const void* p, host::Where at = host::here()) { return host::load_data(p, false, at); }
MK_DEVICE Vec4 load_once(const void* p, host::Where at = host::here()) { return host::load_data(p, true, at); }
MK_DEVICE void pause(u32) {}
MK_DEVICE void prefetch(const void* p, int bytes, host::Where at = host::here()) {
  if (bytes <= 0 || bytes % 16 != 0 || (unsigned long)p % 16 != 0) host::fail(at, "a prefetch of %d bytes at %p", bytes, p);
}
#if MK_WAVE_SIZE == 32
MK_DEVICE void make_copy_barrier(u64* barrier, host::Where at = host::here()) { host::make_copy_barrier(barrier, at); }
MK_DEVICE void announce_copies(u64* barrier, int bytes, host::Where at = host::here()) { host::announce_copies(barrier, bytes, at); }
MK_DEVICE void copy_in(void* to, const void* from, int bytes, u64* barrier, host::Where at = host::here()) {
  host::copy_in(to, from, bytes, barrier, at);
}
MK_DEVICE void await_copies(u64* barrier, u32 parity, host::Where at = host::here()) { host::await_copies(barrier, parity, at); }
MK_DEVICE void leave_to_copies() {}
MK_DEVICE void publish_to_copies(host::Where at = host::here()) { host::publish_to_copies(at); }
#endif
MK_DEVICE void release(host::Where at = host::here()) { host::release(at); }
MK_DEVICE void acquire(host::Where at = host::here()) { host::acquire(at); }
MK_DEVICE u32 load_host(const u32* p, host::Where at = host::here()) { return host::load_host(p, at); }
MK_DEVICE void store_host(u64* p, u64 v, host::Where at = host::here()) { host::store_host(p, v, at); }
MK_DEVICE bool claim(u32* p, host::Where at = host::here()) { return host::claim(p, at); }
MK_DEVICE void keep_order() {}
MK_DEVICE u32 shared_add(u32* p, u32 v, host::Where at = host::here()) { return host::shared_add(p, v, at); }
MK_DEVICE u64 ticks(host::Where at = host::here()) { return host::ticks(at); }
MK_DEVICE u64 wall_clock(host::Where at = host::here()) { return host::ticks(at); }

template <bool bf16>
MK_DEVICE void mma_16x8x16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, host::Where at = host::here()) {
  static_assert(kWave == (bf16 ? 32 : 32), "an instruction of waves of 32 lanes");
  host::Matrices m{c, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  host::mma_16x8x16(bf16, m, at);
}
template <bool bf16, int parts, int part>
MK_DEVICE void mfma_4x4x4(float (&c)[4], const u32 (&a)[2], const u32 (&b)[2], host::Where at = host::here()) {
  static_assert(kWave == (bf16 ? 64 : 64), "an instruction of waves of 64 lanes");
  static_assert((parts == 1 || parts == 2 || parts == 4) && 0 <= part && part < parts, "no such lanes");
  host::Matrices m{c, {a[0], a[1]}, {b[0], b[1]}, kWave / parts, part * (kWave / parts)};
  host::mfma_4x4x4(bf16, m, at);
}

#if defined(MK_REGISTER_RING)

// One wave's stream through registers, of which an atom that is done takes in the one kAtoms later.
struct Ring {
  static constexpr int kSlotAtoms = 8;
  static constexpr int kAtoms = 16;
  static constexpr int kSlotBytes = kSlotAtoms * kWave * 16;

  Vec4 atoms[kAtoms];
  const char *begin, *end, *request;
  const i32* pages = nullptr;  // not null: where the stream's pages lie, and `request` is as if it began at `streams`
  const char* streams;
  u32 last_place;
  int expected;  // the next atom to be done
  bool open;

  MK_METHOD void start(const char* all, const i32* places, u32 last, u64 bytes, host::Where where = host::here()) {
    pages = places;
    streams = all;
    last_place = last;
    start(nullptr, nullptr, all, bytes, where);
  }

  MK_METHOD void start(char*, char*, const void* stream, u64 bytes, host::Where where = host::here()) {
    if (bytes == 0 || bytes % kSlotBytes != 0) {
      host::fail(where, "the stream has %llu bytes, which is no whole number of slots of %d", bytes, kSlotBytes);
    }
    begin = request = (const char*)stream;
    end = begin + bytes;
    host::ring_meet("Ring::start", where);
    host::ring_open(1);
    open = true;
    for (int i = 0; i < kAtoms; i++) load(i, where);
    expected = 0;
  }

  MK_METHOD void wait(host::Where where = host::here()) { host::ring_meet("Ring::wait", where); }

  template <int n>
  MK_METHOD void read(int atom, Vec4 (&w)[n], host::Where where = host::here()) {
    check<n>(atom, where);
    for (int i = 0; i < n; i++) w[i] = atoms[atom + i];
  }

  template <int n>
  MK_METHOD void done(int atom, host::Where where = host::here()) {
    check<n>(atom, where);
    for (int i = 0; i < n; i++) load(atom + i, where);
    expected = (atom + n) % kAtoms;
  }

  MK_METHOD void next() {}

  MK_METHOD void drain(host::Where where = host::here()) {
    if (!open) host::fail(where, "Ring::drain for the second time");
    host::ring_meet("Ring::drain", where);
    open = false;
    host::ring_open(-1);
  }

 private:
  MK_METHOD void load(int atom, host::Where where) {
    const char* from = request + (atom % kSlotAtoms * kWave + lane()) * 16;
    if (pages != nullptr) {
      const u64 at = (u64)(from - streams);
      const u32 place = (u32)pages[at / kPageBytes];
      from = streams + (u64)(place < last_place ? place : last_place) * kPlaceBytes + at % kPageBytes;
    }
    atoms[atom] = host::load_data(from, true, where);
    if (atom % kSlotAtoms == kSlotAtoms - 1) request = request + kSlotBytes == end ? begin : request + kSlotBytes;
  }

  template <int n>
  MK_METHOD void check(int atom, host::Where where) {
    static_assert(1 <= n && kSlotAtoms % n == 0, "atoms are done in parts of a slot");
    if (!open) host::fail(where, "the ring is drained");
    if (atom != expected) host::fail(where, "atom %d of the ring, where atom %d comes next", atom, expected);
  }
};

#else

// One wave's stream through a ring in shared memory. Each lane keeps its own part of a slot: it appears in wait(), and
// done() destroys it.
template <int slots, int slot_atoms>
struct Ring {
  static constexpr int kSlotAtoms = slot_atoms;
  static constexpr int kSlotBytes = kSlotAtoms * kWave * 16;
  static constexpr int kBytes = slots * kSlotBytes;  // of shared memory

  char* memory;
  const char *begin, *end, *at;  // at: the current slot's atoms
  int slot;
  bool waited, open;
  u32 used;  // bit i: atom i is done

  MK_METHOD void start(char* ring, char*, const void* stream, u64 bytes, host::Where where = host::here()) {
    if (bytes == 0 || bytes % kSlotBytes != 0) {
      host::fail(where, "the stream has %llu bytes, which is no whole number of slots of %d", bytes, kSlotBytes);
    }
    memory = ring + wave() * kBytes;
    begin = at = (const char*)stream;
    end = begin + bytes;
    slot = 0;
    waited = false;
    open = true;
    used = 0;
    for (slot = slots - 1; slot > 0; slot--) forget(0, kSlotAtoms);
    forget(0, kSlotAtoms);
    host::ring_meet("Ring::start", where);
    host::ring_open(1);
  }

  MK_METHOD void wait(host::Where where = host::here()) {
    if (!open) host::fail(where, "Ring::wait after drain");
    host::ring_meet("Ring::wait", where);
    if (waited) return;
    waited = true;
    for (int i = 0; i < kSlotAtoms; i++) *part(i) = host::load_data(at + (i * kWave + lane()) * 16, true, where);
  }

  template <int n>
  MK_METHOD void read(int atom, Vec4 (&w)[n], host::Where where = host::here()) {
    const u32 bits = range<n>(atom, where);
    if (!waited) host::fail(where, "Ring::read of a slot that was not waited for");
    if (used & bits) host::fail(where, "Ring::read of atom %d or one after it, which is done", atom);
    for (int i = 0; i < n; i++) w[i] = *part(atom + i);
  }

  template <int n>
  MK_METHOD void done(int atom, host::Where where = host::here()) {
    const u32 bits = range<n>(atom, where);
    if (!waited) host::fail(where, "Ring::done of a slot that was not waited for");
    if (used & bits) host::fail(where, "Ring::done of atom %d or one after it for the second time", atom);
    used |= bits;
    forget(atom, n);
  }

  MK_METHOD u32 next(host::Where where = host::here()) {
    if (!waited) host::fail(where, "Ring::next of a slot that was not waited for");
    if (used != (1u << kSlotAtoms) - 1) host::fail(where, "Ring::next of a slot whose atoms are not all done: %#x", used);
    host::ring_meet("Ring::next", where);
    at += kSlotBytes;
    if (at == end) at = begin;
    slot = slot + 1 == slots ? 0 : slot + 1;
    waited = false;
    used = 0;
    return 0;
  }

  // done() has taken the slots already.
  template <int n>
  MK_METHOD void give_back(const u32 (&)[n]) {}

  MK_METHOD void drain(host::Where where = host::here()) {
    if (!open) host::fail(where, "Ring::drain for the second time");
    host::ring_meet("Ring::drain", where);
    open = false;
    host::ring_open(-1);
  }

 private:
  MK_METHOD Vec4* part(int atom) { return (Vec4*)(memory + slot * kSlotBytes + (atom * kWave + lane()) * 16); }

  MK_METHOD void forget(int atom, int n) {
    constexpr u32 no = host::kUnwritten;
    for (int i = 0; i < n; i++) *part(atom + i) = {no, no, no, no};
  }

  template <int n>
  MK_METHOD u32 range(int atom, host::Where where) {
    static_assert(1 <= n && n <= kSlotAtoms);
    if (atom < 0 || atom + n > kSlotAtoms) {
      host::fail(where, "atoms %d to %d of a slot of %d", atom, atom + n - 1, kSlotAtoms);
    }
    return ((1u << n) - 1) << atom;
  }
};

#endif  // MK_REGISTER_RING

}  // namespace arch

#if defined(__SANITIZE_THREAD__)
#define MK_CHECKED 1
#elif defined(__has_feature)
#define MK_CHECKED __has_feature(thread_sanitizer)
#else
#define MK_CHECKED 0
#endif
constexpr host::Geometry host::geometry{MK_UNITS, MK_WAVES + MK_SERVICE_WAVES, MK_WAVE_SIZE, MK_SHARED_BYTES, MK_CHECKED};

}  // namespace mk
#endif  // MK_WAVE_SIZE
