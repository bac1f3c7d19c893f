// The kernel of hand_off.py.
typedef unsigned int u32;
typedef unsigned long long u64;
struct __align__(16) Vec4 { u32 x, y, z, w; };
struct Args { const char* stream; u64 bytes; u32* words; u64* copies; int size, rounds, depth; };
extern __shared__ __align__(128) char memory[];
static constexpr int kCopy = 4096, kMost = 4, kWaves = 8, kRing = 1024;  // kRing: where the copies go

__device__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ bool is_over(u32 barrier, u32 parity) {
  u32 over;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(over) : "r"(barrier), "r"(parity) : "memory");
  return over != 0;
}

__device__ void stream(const Args& a) {
  const int wave = threadIdx.x / 32;
  const u64 part = a.bytes / (gridDim.x * kWaves) / kCopy * kCopy;
  const char* from = a.stream + (blockIdx.x * kWaves + wave) * part;
  const u32 ring = address(memory + kRing) + wave * kMost * kCopy, barriers = address(memory) + 64 + wave * kMost * 8;
  if (threadIdx.x % 32 != 0 || a.depth == 0) return;
  u64 at = 0, count = 0;
  auto ask = [&](int slot) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barriers + slot * 8), "n"(kCopy) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(ring + slot * kCopy),
                 "l"(from + at), "n"(kCopy), "r"(barriers + slot * 8) : "memory");
    at = at + kCopy == part ? 0 : at + kCopy;
  };
  for (int i = 0; i < a.depth; i++) ask(i);
  for (u32 parity = 0;; parity ^= 1) {
    const bool stop = *(volatile u32*)memory != 0;
    for (int slot = 0; slot < a.depth; slot++) {
      while (!is_over(barriers + slot * 8, parity)) {}
      count++;
      if (!stop) ask(slot);
    }
    if (stop) break;
  }
  a.copies[blockIdx.x * kWaves + wave] = count;
}

__device__ bool ready(const Vec4& v, u32 parity) {
  return (((v.x ^ parity) | (v.y ^ parity) | (v.z ^ parity) | (v.w ^ parity)) & 1u) == 0;
}

__device__ void exchange(const Args& a) {
  const int lane = threadIdx.x - kWaves * 32, share = (a.size + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * share;
  for (int round = 0; round < a.rounds; round++) {
    // Three hand-offs by turns, as a word may be written again only when all have read it.
    u32* words = a.words + round % 3 * a.size;
    const u32 parity = (round / 3 + 1) & 1;
    if (lane < share && begin + lane < a.size) {
      asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(words + begin + lane), "r"((u32)round << 1 | parity) : "memory");
    }
    for (int i = lane * 4; i < a.size; i += kWaves * 32 * 4) {
      Vec4 v;
      do {
        asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(words + i) : "memory");
      } while (!ready(v, parity));
    }
    asm volatile("barrier.sync 1, 256;" ::: "memory");
  }
  *(volatile u32*)memory = 1;
}

extern "C" __global__ __launch_bounds__(512, 1) void hand_off(Args a) {
  if (threadIdx.x == 0) {
    *(volatile u32*)memory = 0;
    for (int i = 0; i < kWaves * kMost; i++) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(memory) + 64 + i * 8) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x < kWaves * 32) stream(a); else exchange(a);
}
