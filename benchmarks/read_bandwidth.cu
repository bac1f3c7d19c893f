// The kernel of gpu.py's probe: every unit reads its own part of the memory, by bulk copies into a ring of shared memory, and
// does nothing else.
typedef unsigned int u32;
typedef unsigned long long u64;
struct Args { const char* data; u64 bytes; u32* sums; int passes; };
extern __shared__ __align__(128) char memory[];
static constexpr int kCopy = 16384, kSlots = 12, kRing = 1024;  // kRing: where the copies go

__device__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

extern "C" __global__ __launch_bounds__(32, 1) void read_bandwidth(Args a) {
  if (threadIdx.x != 0) return;
  const u32 barriers = address(memory), ring = barriers + kRing;
  for (int i = 0; i < kSlots; i++) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers + i * 8) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  const u64 copies = a.bytes / kCopy / gridDim.x, total = copies * a.passes;
  const char* from = a.data + blockIdx.x * copies * kCopy;
  auto ask = [&](u64 i) {
    const u32 slot = (u32)(i % kSlots);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barriers + slot * 8), "n"(kCopy) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(ring + slot * kCopy),
                 "l"(from + i % copies * kCopy), "n"(kCopy), "r"(barriers + slot * 8) : "memory");
  };
  for (u64 i = 0; i < kSlots && i < total; i++) ask(i);
  u32 sum = 0;
  for (u64 i = 0; i < total; i++) {
    const u32 slot = (u32)(i % kSlots), parity = (u32)(i / kSlots) & 1;
    u32 over;
    do {
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(over) : "r"(barriers + slot * 8), "r"(parity) : "memory");
    } while (!over);
    sum += *(volatile u32*)(memory + kRing + slot * kCopy);  // of every copy a word, to show that it came
    if (i + kSlots < total) ask(i + kSlots);
  }
  a.sums[blockIdx.x] = sum;
}
