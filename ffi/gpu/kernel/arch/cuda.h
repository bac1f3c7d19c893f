// NVIDIA, compute capability 9.0 and later.
#pragma once

#define MK_DEVICE static __device__ __forceinline__
#define MK_METHOD __device__ __forceinline__
#define MK_CONSTANT static __constant__
#define MK_KERNEL(threads) extern "C" __global__ __launch_bounds__(threads, 1)
#define MK_UNROLL _Pragma("unroll")
#define MK_NO_UNROLL _Pragma("unroll 1")
#define MK_FEED_WAVE 1

namespace mk {

struct alignas(16) Vec4 {
  u32 x, y, z, w;
};

namespace arch {

constexpr int kWave = 32;

MK_DEVICE int unit() { return (int)blockIdx.x; }
MK_DEVICE int lane() { return (int)(threadIdx.x & 31); }
// Taken from lane 0, so that the compiler knows that it is uniform.
MK_DEVICE int wave() { return __shfl_sync(0xffffffffu, (int)(threadIdx.x >> 5), 0); }
MK_DEVICE char* shared() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

constexpr bool kRenew = false;
MK_DEVICE const Args& arguments(const Args& args) { return args; }
MK_DEVICE u32 fresh(u32 v) { return v; }
MK_DEVICE bool fresh_truth(bool v) { return v; }
MK_DEVICE int unknown(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

MK_DEVICE void enter() {}
template <bool streams, int stream_registers>
MK_DEVICE void divide_registers() {
  if constexpr (stream_registers > 0 && streams) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(stream_registers));
  if constexpr (stream_registers > 0 && !streams) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(256 - stream_registers));
}
MK_DEVICE void unit_sync() { asm volatile("barrier.sync 0;" ::: "memory"); }
// compute-sanitizer's racecheck does not see what orders one side of a barrier that only arrives before the other, nor the lanes of
// a wave for which one of them arrives, nor what other barriers order if some of the waves also meet at a named one
// (tests/native/racecheck.cu). For it, both sides wait, whole waves at a time, all lanes arrive, and the service waves meet at an
// mbarrier: slower.
#if defined(MK_RACECHECK)
constexpr bool kRacecheck = true;
#else
constexpr bool kRacecheck = false;
#endif
MK_DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
MK_DEVICE u64* meeting();  // that mbarrier (config.h)
// By one lane, before others come.
MK_DEVICE void make_meeting() {
  if constexpr (kRacecheck) asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(meeting())), "n"(MK_SERVICE_WAVES * 32) : "memory");
}
template <int id, int waves>
MK_DEVICE void group_sync() {
  if constexpr (kRacecheck) {
    static_assert(id == 1 && waves == MK_SERVICE_WAVES);
    u64 state;
    u32 over;
    asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];" : "=l"(state) : "r"(shared_address(meeting())) : "memory");
    do {
      asm volatile("{ .reg .pred p; mbarrier.test_wait.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(over)
                   : "r"(shared_address(meeting())), "l"(state)
                   : "memory");
    } while (!over);
    return;
  }
  asm volatile("barrier.sync %0, %1;" ::"n"(id), "n"(waves * 32) : "memory");
}
// Barriers at which one side arrives and the other waits; group_sync has those up to 7.
constexpr int kOpened = 8, kHandedOver = 9, kSquares = 10, kAllLanes = (MK_WAVES + MK_SERVICE_WAVES) * 32;
template <int barrier>
MK_DEVICE void wait_at() {
  if constexpr (kRacecheck) __syncwarp();
  asm volatile("barrier.sync %0, %1;" ::"n"(barrier), "n"(kAllLanes) : "memory");
}
template <int barrier>
MK_DEVICE void arrive_at() {
  if constexpr (kRacecheck) {
    wait_at<barrier>();
  } else {
    asm volatile("barrier.arrive %0, %1;" ::"n"(barrier), "n"(kAllLanes) : "memory");
  }
}
MK_DEVICE void open_gate() { arrive_at<kOpened>(); }
MK_DEVICE void pass_gate() { wait_at<kOpened>(); }
MK_DEVICE void hand_over() { arrive_at<kHandedOver>(); }
MK_DEVICE void take_over() { wait_at<kHandedOver>(); }
MK_DEVICE void hand_over_squares() { arrive_at<kSquares>(); }
MK_DEVICE void take_over_squares() { wait_at<kSquares>(); }
MK_DEVICE void wave_sync() { __syncwarp(); }

MK_DEVICE u32 as_u32(float v) { return __float_as_uint(v); }
MK_DEVICE float as_f32(u32 v) { return __uint_as_float(v); }
MK_DEVICE u32 shuffle(u32 v, int from) { return __shfl_sync(0xffffffffu, v, from); }
MK_DEVICE float shuffle(float v, int from) { return __shfl_sync(0xffffffffu, v, from); }
MK_DEVICE u32 shuffle_xor(u32 v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
MK_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
MK_DEVICE u32 wave_max(u32 v) { return __reduce_max_sync(0xffffffffu, v); }
MK_DEVICE bool any(bool v) { return __any_sync(0xffffffffu, v); }

MK_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
MK_DEVICE double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
MK_DEVICE float sqrt(float v) { return __fsqrt_rn(v); }
MK_DEVICE double sqrt(double v) { return __dsqrt_rn(v); }

// Within 2 units in the last place.
MK_DEVICE float fast_rsqrt(float v) { return rsqrtf(v); }
MK_DEVICE float fast_divide(float a, float b) { return __fdividef(a, b); }
MK_DEVICE float fast_exp2(float v) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(v));
  return y;
}
// Two floats, rounded to nearest even, as the low and the high half of a word.
MK_DEVICE u32 pack_bf16(float low, float high) {
  u32 v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}

MK_DEVICE u32 low_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x5410); }
MK_DEVICE u32 high_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x7632); }

MK_DEVICE u32 load_word(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
MK_DEVICE u32 load_byte(const u8* p) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u8 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
MK_DEVICE Vec4 load_words(const u32* p) {
  Vec4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
MK_DEVICE void store_word(u32* p, u32 v) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
MK_DEVICE void store_half(u16* p, u32 v) {
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(p), "h"((u16)v) : "memory");
}
MK_DEVICE bool halves_not_zero(const Vec4& v) {
  u32 low, high;
  asm("min.u16x2 %0, %1, %2;" : "=r"(low) : "r"(v.x), "r"(v.y));
  asm("min.u16x2 %0, %1, %2;" : "=r"(high) : "r"(v.z), "r"(v.w));
  asm("min.u16x2 %0, %0, %1;" : "+r"(low) : "r"(high));
  return ((low - 0x10001u) & ~low & 0x80008000u) == 0;
}
MK_DEVICE void store_byte(u8* p, u32 v) { *p = (u8)v; }
MK_DEVICE Vec4 load_shared_data(const void* p) { return load_words((const u32*)p); }
MK_DEVICE Vec4 load_once(const void* p) {
  Vec4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
MK_DEVICE void prefetch(const void* p, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
}
MK_DEVICE void pause(u32 nanoseconds) {
  if (nanoseconds > 0) asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds));
}
MK_DEVICE void release() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
MK_DEVICE void acquire() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
MK_DEVICE u32 load_host(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
MK_DEVICE void store_host(u64* p, u64 v) { asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory"); }
MK_DEVICE bool claim(u32* p) { return atomicCAS(p, 0u, 1u) == 0u; }
MK_DEVICE u32 shared_add(u32* p, u32 v) { return atomicAdd(p, v); }
MK_DEVICE int shared_number(const int* p) { return *p; }
MK_DEVICE u64 ticks() {
  u64 v;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(v)::"memory");
  return v;
}

MK_DEVICE u64 wall_clock() {
  u64 v;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(v)::"memory");
  return v;
}

template <bool bf16>
MK_DEVICE void mma_16x8x16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (bf16) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

MK_DEVICE void make_copy_barrier(u64* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
MK_DEVICE void announce_copies(u64* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
MK_DEVICE void copy_in(void* to, const void* from, int bytes, u64* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
MK_DEVICE void await_copies(u32 barrier, u32 parity) {
  u32 ready;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(ready)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (!ready);
}
MK_DEVICE void await_copies(u64* barrier, u32 parity) { await_copies(shared_address(barrier), parity); }
MK_DEVICE void leave_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
MK_DEVICE void publish_to_copies() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

struct Flight {
  u32 slow, rest, calm;  // entries of a ring that are on their way at most: of the first slow_bytes, of the rest, where it is calm
};

// The streams of a unit's waves, which are in step, through a ring in shared memory. An entry is a slot of every wave; the feed
// wave keeps entries filled by bulk copies. However many are free, only a few copies are on their way at a time, and they are
// requested at an even pace: what other units have written waits behind all that the memory has been asked for
// (docs/performance-log.md). An entry has two barriers: one for the arrival of its bytes, one for the end of their use.
template <int slots, int slot_atoms>
struct Ring {
  static constexpr int kSlotAtoms = slot_atoms;
  static constexpr int kSlotBytes = kSlotAtoms * 512;
  static constexpr int kEntryBytes = MK_WAVES * kSlotBytes;
  static constexpr int kGivers = kRacecheck ? MK_WAVES * 32 : MK_WAVES;  // who gives an entry back

  const char* memory;  // of this lane in the slot with number 0
  u32 barriers;
  u32 slot, parity;

  // By all lanes of the feed wave, before the others start.
  static MK_METHOD void make_barriers(char* all) {
    for (int i = lane(); i < slots * 2; i += 32) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(all) + i * 8), "r"(i < slots ? 1 : kGivers) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  // What a lane of the feed wave does until *stop: keeps the ring filled with `bytes` of each wave's stream, again and again. The
  // first wave's stream is at `streams`, the others `stride` bytes apart. The first slow_bytes are requested no faster than one entry in
  // `pace` clock ticks. calm(): of the entry that has just been requested, whether flight.calm is the limit from now on.
  template <typename Calm>
  static MK_METHOD void feed(char* ring, char* all_barriers, u32* stop, const char* streams, u32 bytes, i64 stride,
                             u32 slow_bytes, Flight flight, i32 pace, Calm calm) {
    const u32 barriers = shared_address(all_barriers);
    Place arriving = {0, 0}, next = {0, 1};
    u32 flying = 0, at = 0, due = clock();
    bool is_calm = false;
    for (;;) {
      if (flying > 0 && is_over(barriers + arriving.slot * 8, arriving.parity)) {
        flying--;
        arriving.step();
      }
      const bool slow = at < slow_bytes;
      if (flying < (is_calm ? flight.calm : slow ? flight.slow : flight.rest) && (!slow || (i32)(clock() - due) >= 0) &&
          is_over(barriers + (slots + next.slot) * 8, next.parity)) {
        const u32 now = clock();  // time that was not used before is no reason to hurry
        due = (slow && at > 0 && (i32)(now - due) < pace ? due : now) + pace;
        const u32 to = shared_address(ring) + next.slot * kEntryBytes, arrival = barriers + next.slot * 8;
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(arrival), "n"(kEntryBytes) : "memory");
        MK_UNROLL
        for (int i = 0; i < MK_WAVES; i++) copy(to + i * kSlotBytes, streams + at + i * stride, arrival);
        flying++;
        next.step();
        at = at + kSlotBytes == bytes ? 0 : at + kSlotBytes;
        is_calm = calm();
      } else if ((kRacecheck ? shared_add(stop, 0) : *(const volatile u32*)stop) != 0) {
        break;
      }
    }
    for (; flying > 0; flying--) {
      while (!is_over(barriers + arriving.slot * 8, arriving.parity)) {
      }
      arriving.step();
    }
  }

  MK_METHOD void start(char* ring, char* all_barriers, const void*, u64) {
    memory = ring + wave() * kSlotBytes + lane() * 16;
    barriers = shared_address(all_barriers);
    slot = parity = 0;
  }

  MK_METHOD void wait() { await_copies(barriers + slot * 8, parity); }

  template <int n>
  MK_METHOD void read(int atom, Vec4 (&w)[n]) {
    const char* from = memory + slot * kEntryBytes + atom * 512;
    MK_UNROLL
    for (int i = 0; i < n; i++) w[i] = *(const Vec4*)(from + i * 512);
  }

  template <int n>
  MK_METHOD void done(int) {}

  // On to the next slot. Returns what give_back needs of this one.
  MK_METHOD u32 next() {
    const u32 freed = barriers + (slots + slot) * 8;
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
    return freed;
  }

  // What has been read of these slots is in registers. The copies that will fill them are not ordered behind loads that are only
  // on their way when the feed wave is told, unless a fence says so: without it a wave was seen to multiply with what came later.
  template <int n>
  MK_METHOD void give_back(const u32 (&freed)[n]) {
    leave_to_copies();
    wave_sync();
    MK_UNROLL
    for (int i = 0; i < n; i++) {
      if (kRacecheck || lane() == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(freed[i]) : "memory");
    }
  }

  MK_METHOD void drain() {}

 private:
  // A place in the ring that goes round.
  struct Place {
    u32 slot, parity;
    MK_METHOD void step() {
      if (++slot == slots) {
        slot = 0;
        parity ^= 1;
      }
    }
  };

  static MK_METHOD u32 clock() {
    u32 v;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(v));
    return v;
  }

  static MK_METHOD bool is_over(u32 barrier, u32 parity) {
    u32 over;
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(over)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return over != 0;
  }

  // Weights leave the L2 cache first: what stays is keys, values and words.
  static MK_METHOD void copy(u32 to, const char* from, u32 arrival) {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
        "l"(from), "n"(kSlotBytes), "r"(arrival), "l"(policy)
        : "memory");
  }
};

}  // namespace arch
}  // namespace mk
