// AMD, gfx942 (MI300) and gfx950 (MI350): waves of 64 lanes. Compiler builtins only, so that clang's HIP front end needs no
// headers and no device libraries. docs/amd.md says what of this has been checked, and how.
#pragma once

#include "args.h"

#if !defined(__AMDGCN__)
#error "the kernel is compiled for NVIDIA or AMD GPUs, or with MK_HOST for this CPU"
#endif

#define MK_DEVICE static __attribute__((device, always_inline, unused)) inline
#define MK_METHOD __attribute__((device, always_inline)) inline
#define MK_CONSTANT static __attribute__((constant))
// One work-group has a compute unit for itself: its waves share the registers of four SIMDs.
#define MK_KERNEL(threads)                                                                                             \
  extern "C" __attribute__((global, visibility("protected"), amdgpu_flat_work_group_size((threads), (threads)),        \
                            amdgpu_waves_per_eu(((threads) + 255) / 256, ((threads) + 255) / 256)))
#define MK_UNROLL _Pragma("unroll")
#define MK_NO_UNROLL _Pragma("unroll 1")
#define MK_REGISTER_RING 1

namespace mk {

struct alignas(16) Vec4 {
  u32 x, y, z, w;
};

extern __attribute__((device, shared, aligned(128))) char shared_memory[];

namespace arch {

constexpr int kWave = 64;

// Pointers that are known to point to global or shared memory. Others cost flat instructions, which count as both.
template <typename T>
using Global = __attribute__((address_space(1))) T;
template <typename T>
using Shared = __attribute__((address_space(3))) T;
using Words2 = u32 __attribute__((ext_vector_type(2)));
using Words4 = u32 __attribute__((ext_vector_type(4)));

// A value that the compiler knows nothing of: the same one.
template <typename T>
MK_DEVICE T fresh(T v) {
  asm volatile("" : "+v"(v));
  return v;
}
MK_DEVICE int unknown(int v) { return fresh(v); }
template <typename T>
MK_DEVICE T fresh_uniform(T v) {
  asm volatile("" : "+s"(v));
  return v;
}

constexpr bool kRenew = true;
MK_DEVICE bool fresh_truth(bool v) { return fresh_uniform((int)v) != 0; }
MK_DEVICE int unit() { return fresh_uniform((int)__builtin_amdgcn_workgroup_id_x()); }
MK_DEVICE int lane() { return fresh((int)(__builtin_amdgcn_workitem_id_x() & 63u)); }
// Taken from the first lane, so that the compiler knows that it is uniform.
MK_DEVICE int wave() { return fresh_uniform((int)__builtin_amdgcn_readfirstlane(__builtin_amdgcn_workitem_id_x() >> 6)); }
// The kernel's only argument, to be read again from where the launch put it.
MK_DEVICE const Args& arguments(const Args&) {
  return *(const Args*)fresh_uniform((const __attribute__((address_space(4))) char*)__builtin_amdgcn_kernarg_segment_ptr());
}
MK_DEVICE char* shared() { return shared_memory; }

// ---- Barriers ----

// The counters of group_sync are the last bytes of shared memory.
constexpr int kGroups = 8;
constexpr int kReservedShared = 64;
MK_DEVICE Shared<u32>* group_counter(int id) {
  return (Shared<u32>*)(Shared<char>*)(shared_memory + MK_SHARED_BYTES - kReservedShared) + id;
}

// Orders shared memory, and global memory inside the unit. Global loads stay in flight.
template <bool streams, int stream_registers>
MK_DEVICE void divide_registers() {}
MK_DEVICE void unit_sync() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

MK_DEVICE void open_gate() { unit_sync(); }
MK_DEVICE void pass_gate() { unit_sync(); }
MK_DEVICE void hand_over() { unit_sync(); }
MK_DEVICE void take_over() { unit_sync(); }
MK_DEVICE void hand_over_squares() { unit_sync(); }
MK_DEVICE void take_over_squares() { unit_sync(); }

MK_DEVICE void enter() {
  if (__builtin_amdgcn_workitem_id_x() < kGroups) {
    __hip_atomic_store(group_counter((int)__builtin_amdgcn_workitem_id_x()), 0u, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
  }
  unit_sync();
}

// There is one hardware barrier, for all waves. This one counts arrivals: wave k of a round raises the counter from
// waves * round + k, and leaves when the round is full. The counter never goes back in a launch.
template <int id, int waves>
MK_DEVICE void group_sync() {
  static_assert(1 <= id && id < kGroups, "no such barrier");
  Shared<u32>* counter = fresh(group_counter(id));  // in a register of every lane
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  u32 before = 0;
  if (lane() == 0) before = __hip_atomic_fetch_add(counter, 1u, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
  const u32 full = (u32)__builtin_amdgcn_readfirstlane(before) / waves * waves + waves;
  while ((i32)(__builtin_amdgcn_readfirstlane(__hip_atomic_load(counter, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP)) - full) < 0) {
    __builtin_amdgcn_s_sleep(1);
  }
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

// Lanes of a wave are always together; this keeps the order of their accesses.
MK_DEVICE void wave_sync() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
  __builtin_amdgcn_wave_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}

// ---- Numbers ----

MK_DEVICE u32 as_u32(float v) { return __builtin_bit_cast(u32, v); }
MK_DEVICE float as_f32(u32 v) { return __builtin_bit_cast(float, v); }
MK_DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MK_DEVICE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
MK_DEVICE float sqrt(float v) { return __builtin_sqrtf(v); }
MK_DEVICE double sqrt(double v) { return __builtin_sqrt(v); }
MK_DEVICE float fast_rsqrt(float v) { return __builtin_amdgcn_rsqf(v); }
MK_DEVICE float fast_divide(float a, float b) { return a * __builtin_amdgcn_rcpf(b); }
MK_DEVICE float fast_exp2(float v) { return __builtin_amdgcn_exp2f(v); }
// Round to nearest even; NaN stays NaN.
MK_DEVICE u32 to_bf16(float v) {
  const u32 bits = as_u32(v);
  return v == v ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : 0x7fc0u;
}
MK_DEVICE u32 pack_bf16(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }

// ---- Other lanes ----

MK_DEVICE u32 shuffle(u32 v, int from) { return (u32)__builtin_amdgcn_ds_bpermute(from * 4, (int)v); }
MK_DEVICE float shuffle(float v, int from) { return as_f32(shuffle(as_u32(v), from)); }

// A vector instruction's own way to read another lane of the same 16, without going through shared memory's crossbar.
template <int control>
MK_DEVICE u32 near(u32 v) {
  return (u32)__builtin_amdgcn_update_dpp(0, (int)v, control, 0xf, 0xf, true);
}
constexpr int kSwap1 = 0xb1, kSwap2 = 0x4e, kReverse4 = 0x1b, kReverse8 = 0x141, kRotate4 = 0x124, kRotate8 = 0x128;

MK_DEVICE u32 shuffle_xor(u32 v, int mask) {
  switch (mask) {  // a constant, once loops are unrolled
    case 1: return near<kSwap1>(v);
    case 2: return near<kSwap2>(v);
    case 4: return near<kReverse4>(near<kReverse8>(v));
    case 8: return near<kRotate8>(v);
    case 16: return (u32)__builtin_amdgcn_ds_swizzle((int)v, 0x401f);
    default: return shuffle(v, lane() ^ mask);
  }
}
MK_DEVICE float shuffle_xor(float v, int mask) { return as_f32(shuffle_xor(as_u32(v), mask)); }
MK_DEVICE float sum_fours(float v) {
  v += as_f32(near<kRotate8>(as_u32(v)));
  return v + as_f32(near<kRotate4>(as_u32(v)));
}
// A matrix instruction adds up the quarters: its A is all ones, its B has a quarter's lanes as one row.
MK_DEVICE float sum_quarters(float v) {
  using Sums = float __attribute__((ext_vector_type(4)));
  return __builtin_amdgcn_mfma_f32_16x16x4f32(1.0f, v, Sums{0.0f, 0.0f, 0.0f, 0.0f}, 0, 0, 0)[0];
}
MK_DEVICE u32 wave_max(u32 v) {
  MK_UNROLL
  for (int step = 1; step < kWave; step *= 2) {
    const u32 other = shuffle_xor(v, step);
    v = other > v ? other : v;
  }
  return v;
}
MK_DEVICE bool any(bool v) { return __builtin_amdgcn_ballot_w64(v) != 0; }

// ---- Memory ----

MK_DEVICE u32 load_word(const u32* p) {
  return __hip_atomic_load((const Global<u32>*)p, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
MK_DEVICE u32 load_byte(const u8* p) {
  return __hip_atomic_load((const Global<u8>*)p, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
// Two loads: 8 bytes is what the compiler has as one access for other units' data.
MK_DEVICE Vec4 load_words(const u32* p) {
  const u64 low = __hip_atomic_load((const Global<u64>*)p, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
  const u64 high = __hip_atomic_load((const Global<u64>*)p + 1, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
  return {(u32)low, (u32)(low >> 32), (u32)high, (u32)(high >> 32)};
}
MK_DEVICE void store_word(u32* p, u32 v) {
  __hip_atomic_store((Global<u32>*)p, v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
MK_DEVICE void store_half(u16* p, u32 v) {
  __hip_atomic_store((Global<u16>*)p, (u16)v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
MK_DEVICE bool halves_not_zero(const Vec4& v) {
  auto zeros = [](u32 w) { return (w - 0x10001u) & ~w & 0x80008000u; };
  return (zeros(v.x) | zeros(v.y) | zeros(v.z) | zeros(v.w)) == 0;
}
MK_DEVICE void store_byte(u8* p, u32 v) {
  __hip_atomic_store((Global<u8>*)p, (u8)v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
// Inside a die: stores go to its L2, and loads come from there once the L1 has been dropped; sc0 alone leaves a word that is in the
// L1 as it is.
MK_DEVICE u32 die() { return __builtin_amdgcn_s_getreg(20 | 3 << 11); }  // register XCC_ID
MK_DEVICE void look_again() { asm volatile("buffer_inv sc0" ::: "memory"); }
MK_DEVICE u32 load_near_word(const u32* p) {
  return __hip_atomic_load((const Global<u32>*)p, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
}
MK_DEVICE Vec4 load_near_words(const u32* p) {
  const u64 low = __hip_atomic_load((const Global<u64>*)p, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
  const u64 high = __hip_atomic_load((const Global<u64>*)p + 1, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
  return {(u32)low, (u32)(low >> 32), (u32)high, (u32)(high >> 32)};
}
MK_DEVICE void store_near_word(u32* p, u32 v) {
  __hip_atomic_store((Global<u32>*)p, v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
}
MK_DEVICE u32 add(u32* p, u32 v) {
  return __hip_atomic_fetch_add((Global<u32>*)p, v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
MK_DEVICE int shared_number(const int* p) { return fresh_uniform(__builtin_amdgcn_readfirstlane(*(const volatile Shared<int>*)p)); }
MK_DEVICE Vec4 load_shared_data(const void* p) { return load_words((const u32*)p); }
MK_DEVICE Vec4 load_once(const void* p) {
  const Words4 v = __builtin_nontemporal_load((const Global<Words4>*)p);
  return {v.x, v.y, v.z, v.w};
}
MK_DEVICE void prefetch(const void*, int) {}
MK_DEVICE void pause(u32) {}
MK_DEVICE void release() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "agent");
  // Compilers may leave out that the write-back must have ended (LLVM pull request 178316).
  asm volatile("s_waitcnt vmcnt(0)" ::: "memory");
}
MK_DEVICE void acquire() { __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "agent"); }
MK_DEVICE u32 load_host(const u32* p) {
  return __hip_atomic_load((const Global<u32>*)p, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
}
MK_DEVICE void store_host(u64* p, u64 v) {
  __hip_atomic_store((Global<u64>*)p, v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
}
MK_DEVICE bool claim(u32* p) {
  u32 expected = 0;
  return __hip_atomic_compare_exchange_strong((Global<u32>*)p, &expected, 1u, __ATOMIC_RELAXED, __ATOMIC_RELAXED,
                                              __HIP_MEMORY_SCOPE_AGENT);
}
MK_DEVICE u32 shared_add(u32* p, u32 v) {
  return __hip_atomic_fetch_add((Shared<u32>*)p, v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
}
MK_DEVICE u64 ticks() { return __builtin_amdgcn_s_memrealtime(); }  // 100 MHz, the same on the whole device
MK_DEVICE u64 wall_clock() { return ticks() * 10; }  // ns

// What is before is issued before what comes after, unless one needs the other.
MK_DEVICE void keep_order() { __builtin_amdgcn_sched_barrier(0); }

// ---- Matrices ----

template <bool bf16, int parts, int part>
MK_DEVICE void mfma_4x4x4(float (&c)[4], const u32 (&a)[2], const u32 (&b)[2]) {
  static_assert((parts == 1 || parts == 2 || parts == 4) && 0 <= part && part < parts, "no such lanes");
  constexpr int from = parts == 1 ? 0 : parts == 2 ? 1 + part : 4 + part;  // the instruction's BLGP
  using Sums = float __attribute__((ext_vector_type(4)));
  const Words2 a2 = {a[0], a[1]}, b2 = {b[0], b[1]};
  Sums sums = {c[0], c[1], c[2], c[3]};
  if constexpr (bf16) {
    using Elements = short __attribute__((ext_vector_type(4)));
    sums = __builtin_amdgcn_mfma_f32_4x4x4bf16_1k(__builtin_bit_cast(Elements, a2), __builtin_bit_cast(Elements, b2), sums, 0, 0, from);
  } else {
    using Elements = _Float16 __attribute__((ext_vector_type(4)));
    sums = __builtin_amdgcn_mfma_f32_4x4x4f16(__builtin_bit_cast(Elements, a2), __builtin_bit_cast(Elements, b2), sums, 0, 0, from);
  }
  c[0] = sums.x;
  c[1] = sums.y;
  c[2] = sums.z;
  c[3] = sums.w;
}

// ---- Stream ----

#if defined(MK_PLACED)
// Where the slots of a stream are whose pages lie anywhere. What the table says of a slot is asked for two slots before the slot is,
// so that it is there when 16 atoms that were asked for later may still be on their way.
struct Pages {
  static constexpr int kPageAtoms = kPageBytes / (kWave * 16);  // half a slot

  const Global<char>* streams;
  const Global<char>* table;  // Words2 [slots]
  u32 end, next;  // in bytes; next: what is to be looked up
  u32 last;         // place of a page at most
  Words2 found[2];  // of the slots after the one that is requested, the same in all lanes
  const Global<char>* page[2];  // of the slot that is requested

  MK_METHOD void start(const char* all, const i32* places, u32 last_place, u64 bytes) {
    streams = (const Global<char>*)all;
    table = (const Global<char>*)places;
    end = (u32)(bytes / kPageBytes) * (u32)sizeof(i32);
    last = last_place;
    next = 0;
    look(0);
    look(1);
    enter(0);
  }
  MK_METHOD void look(int i) {
    // By a vector load: a scalar one would be waited for with the next load of shared memory.
    found[i] = *(const Global<Words2>*)(table + fresh(next));
    next += (u32)sizeof(Words2);
    if (next == end) next = 0;
  }
  // Slot i of the ring is requested from now on.
  MK_METHOD void enter(int i) {
    MK_UNROLL
    for (int half = 0; half < 2; half++) {
      const u32 place = (u32)__builtin_amdgcn_readfirstlane(found[i][half]);
      page[half] = streams + (u64)(place < last ? place : last) * kPlaceBytes;
    }
    look(i);
  }
  MK_METHOD const Global<char>* atom(int i) const { return page[i / kPageAtoms] + i % kPageAtoms * (kWave * 16); }
};
#endif

// One wave's stream through registers. Every atom that is done makes room for the one kAtoms later, whose load is then on its
// way for as long as the wave multiplies the others, and across barriers. All indices are constants where this is used.
struct Ring {
  static constexpr int kSlotAtoms = 8;
  static constexpr int kAtoms = 16;  // in flight or not yet read: 16 KiB
  static constexpr int kAtomBytes = kWave * 16;

  Words4 atoms[kAtoms];
  u32 place;  // of this lane in an atom
#if defined(MK_PLACED)
  Pages pages;

  MK_METHOD void start(const char* streams, const i32* places, u32 last_place, u64 bytes) {
    pages.start(streams, places, last_place, bytes);
    place = (u32)lane() * 16;
    done<kSlotAtoms>(0);
    done<kSlotAtoms>(kSlotAtoms);
  }
#else
  const Global<char>*begin, *end, *request;

  MK_METHOD void start(char*, char*, const void* stream, u64 bytes) {
    begin = request = (const Global<char>*)stream;
    end = begin + bytes;
    place = (u32)lane() * 16;
    done<kSlotAtoms>(0);
    done<kSlotAtoms>(kSlotAtoms);
  }
#endif

  MK_METHOD void wait() {}

  template <int n>
  MK_METHOD void read(int atom, Vec4 (&w)[n]) {
    MK_UNROLL
    for (int i = 0; i < n; i++) w[i] = __builtin_bit_cast(Vec4, atoms[atom + i]);
  }

  template <int n>
  MK_METHOD void done(int atom) {
    static_assert(kSlotAtoms % n == 0, "atoms are done in parts of a slot");
    // Loads that were moved before the last use of a register's old contents would need other registers.
    __builtin_amdgcn_sched_barrier(0);
    MK_UNROLL
    for (int i = 0; i < n; i++) {
#if defined(MK_PLACED)
      const Global<char>* from = pages.atom((atom + i) % kSlotAtoms);
#else
      const Global<char>* from = request + (atom + i) % kSlotAtoms * kAtomBytes;
#endif
      atoms[atom + i] = __builtin_nontemporal_load((const Global<Words4>*)(from + place));
    }
    __builtin_amdgcn_sched_barrier(0);
    if ((atom + n) % kSlotAtoms == 0) {
#if defined(MK_PLACED)
      pages.enter((atom + n) / kSlotAtoms % 2);
#else
      request += kSlotAtoms * kAtomBytes;
      if (request == end) request = begin;
#endif
    }
  }

  MK_METHOD void next() {}
  MK_METHOD void drain() {}
};

}  // namespace arch
}  // namespace mk
