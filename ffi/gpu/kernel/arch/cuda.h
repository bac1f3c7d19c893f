// NVIDIA, compute capability 9.0 and later.
#pragma once

#define MK_DEVICE static __device__ __forceinline__
#define MK_METHOD __device__ __forceinline__
#define MK_CONSTANT static __constant__
#define MK_KERNEL(threads) extern "C" __global__ __launch_bounds__(threads, 1)
#define MK_UNROLL _Pragma("unroll")
#define MK_NO_UNROLL _Pragma("unroll 1")

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

MK_DEVICE void enter() {}
MK_DEVICE void unit_sync() { asm volatile("barrier.sync 0;" ::: "memory"); }
template <int id, int waves>
MK_DEVICE void group_sync() {
  asm volatile("barrier.sync %0, %1;" ::"n"(id), "n"(waves * 32) : "memory");
}
MK_DEVICE void wave_sync() { __syncwarp(); }

MK_DEVICE u32 as_u32(float v) { return __float_as_uint(v); }
MK_DEVICE float as_f32(u32 v) { return __uint_as_float(v); }
MK_DEVICE u32 shuffle(u32 v, int from) { return __shfl_sync(0xffffffffu, v, from); }
MK_DEVICE float shuffle(float v, int from) { return __shfl_sync(0xffffffffu, v, from); }
MK_DEVICE u32 shuffle_xor(u32 v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
MK_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
MK_DEVICE bool any(bool v) { return __any_sync(0xffffffffu, v); }

MK_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
MK_DEVICE double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
MK_DEVICE float sqrt(float v) { return __fsqrt_rn(v); }
MK_DEVICE double sqrt(double v) { return __dsqrt_rn(v); }

// Within 2 units in the last place.
MK_DEVICE float fast_rsqrt(float v) { return rsqrtf(v); }
MK_DEVICE float fast_divide(float a, float b) { return __fdividef(a, b); }
// Two floats, rounded to nearest even, as the low and the high half of a word.
MK_DEVICE u32 pack_bf16(float low, float high) {
  u32 v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}

MK_DEVICE u32 load_word(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
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
MK_DEVICE void store_byte(u8* p, u32 v) { *p = (u8)v; }
MK_DEVICE Vec4 load_shared_data(const void* p) { return load_words((const u32*)p); }
MK_DEVICE Vec4 load_once(const void* p) {
  Vec4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
MK_DEVICE void release() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
MK_DEVICE void acquire() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
MK_DEVICE u32 load_host(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
MK_DEVICE bool claim(u32* p) { return atomicCAS(p, 0u, 1u) == 0u; }
MK_DEVICE u32 shared_add(u32* p, u32 v) { return atomicAdd(p, v); }
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
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

MK_DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// One wave's stream through a ring in shared memory, filled by bulk copies that lane 0 requests. A slot's barrier counts
// one arrival (the request) and its bytes.
template <int slots, int slot_atoms>
struct Ring {
  static constexpr int kSlotAtoms = slot_atoms;
  static constexpr int kSlotBytes = kSlotAtoms * 512;
  static constexpr int kBytes = slots * kSlotBytes;  // of shared memory
  static constexpr int kBarrierBytes = slots * 8;

  u32 memory, barriers;
  const char *begin, *end, *request;
  u32 slot, parity;

  MK_METHOD void start(char* ring, char* full, const void* stream, u64 bytes) {
    memory = shared_address(ring);
    barriers = shared_address(full);
    begin = request = (const char*)stream;
    end = begin + bytes;
    slot = 0;
    parity = 0;
    if (lane() == 0) {
      for (int i = 0; i < slots; i++) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers + i * 8) : "memory");
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    wave_sync();
    for (int i = 0; i < slots; i++) fill(i);
  }

  MK_METHOD void wait() {
    u32 ready;
    do {
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
          : "=r"(ready)
          : "r"(barriers + slot * 8), "r"(parity)
          : "memory");
    } while (!ready);
  }

  template <int n>
  MK_METHOD void read(int atom, Vec4 (&w)[n]) {
    const u32 from = memory + slot * kSlotBytes + atom * 512 + lane() * 16;
    MK_UNROLL
    for (int i = 0; i < n; i++) {
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(w[i].x), "=r"(w[i].y), "=r"(w[i].z), "=r"(w[i].w)
                   : "r"(from + i * 512)
                   : "memory");
    }
  }

  template <int n>
  MK_METHOD void done(int) {}

  MK_METHOD void next() {
    wave_sync();
    fill(slot);
    step();
  }

  MK_METHOD void drain() {
    for (int i = 0; i < slots; i++) {
      wait();
      step();
    }
  }

 private:
  MK_METHOD void step() {
    slot++;
    if (slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }

  MK_METHOD void fill(u32 i) {
    if (lane() == 0) {
      const u32 bar = barriers + i * 8;
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "n"(kSlotBytes) : "memory");
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(memory + i * kSlotBytes),
          "l"(request), "n"(kSlotBytes), "r"(bar)
          : "memory");
    }
    request += kSlotBytes;
    if (request == end) request = begin;
  }
};

}  // namespace arch
}  // namespace mk
