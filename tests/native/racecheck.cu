// What compute-sanitizer's racecheck makes of hand-overs between two warps that are right, each by a kernel of its own:
//
//   nvcc -arch=sm_90a -o racecheck racecheck.cu && for i in $(seq 0 14); do compute-sanitizer --tool racecheck ./racecheck $i; done
//
// On an H200 with CUDA 13.0 it calls those a race where one side of a named barrier only arrives (0), where a lane arrives at an
// mbarrier for its warp, after __syncwarp (3, 5), and where one side meets at a named barrier of its own between a barrier of all and the
// access that this one orders: when it has written (8), before it writes again (10), or both (11). The others are the same hand-overs
// with both sides waiting (1, and 6 where the writers wait for each other before they meet the readers), all lanes arriving (2, 4),
// nothing between the two barriers (7, and 9 where some lanes write nothing), and an mbarrier at which all lanes arrive instead of the
// named barrier of one side (12, 13, 14). The decode kernel does 0, 3, 5, 8, 10 and 11; with MONOKERNEL_RACECHECK it does 1, 4, 12, 13
// and 14 instead (ffi/gpu/kernel/arch/cuda.h).
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr int kRounds = 8;

__device__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ void init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ void wait(uint64_t* barrier, int parity) {
  uint32_t over = 0;
  while (!over) {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(over)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  }
}
template <bool all>
__device__ void arrive(uint64_t* barrier) {
  if (!all) __syncwarp();
  if (all || threadIdx.x % 32 == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// The first warp writes and the second one reads, by turns.
template <bool both_wait>
__global__ void named_barriers(int* out) {
  __shared__ volatile int data[32];
  const int lane = threadIdx.x % 32;
  int sum = 0;
  for (int round = 0; round < kRounds; round++) {
    if (threadIdx.x < 32) {
      if (round > 0) asm volatile("barrier.sync 2, 64;" ::: "memory");
      data[lane] = round + lane;
      if (both_wait) {
        asm volatile("barrier.sync 1, 64;" ::: "memory");
      } else {
        asm volatile("barrier.arrive 1, 64;" ::: "memory");
      }
    } else {
      asm volatile("barrier.sync 1, 64;" ::: "memory");
      sum += data[31 - lane];
      if (round + 1 == kRounds) continue;
      if (both_wait) {
        asm volatile("barrier.sync 2, 64;" ::: "memory");
      } else {
        asm volatile("barrier.arrive 2, 64;" ::: "memory");
      }
    }
  }
  out[threadIdx.x] = sum;
}

// Two warps write, each what its neighbour's lanes see too, and a third one reads.
__global__ void inner_barrier(int* out) {
  __shared__ volatile int data[64];
  int sum = 0;
  for (int round = 0; round < kRounds; round++) {
    if (threadIdx.x < 64) {
      if (round > 0) asm volatile("barrier.sync 2, 96;" ::: "memory");
      data[threadIdx.x] = round;
      asm volatile("barrier.sync 3, 64;" ::: "memory");
      sum += data[63 - threadIdx.x];
      asm volatile("barrier.sync 1, 96;" ::: "memory");
    } else {
      asm volatile("barrier.sync 1, 96;" ::: "memory");
      sum += data[threadIdx.x % 32] + data[63 - threadIdx.x % 32];
      if (round + 1 < kRounds) asm volatile("barrier.sync 2, 96;" ::: "memory");
    }
  }
  out[threadIdx.x] = sum;
}

template <bool all>
__global__ void mbarriers(int* out) {
  __shared__ volatile int data[32];
  __shared__ uint64_t full, free;
  const int lane = threadIdx.x % 32;
  int sum = 0;
  if (threadIdx.x == 0) {
    init(&full, all ? 32 : 1);
    init(&free, all ? 32 : 1);
  }
  __syncthreads();
  for (int round = 0; round < kRounds; round++) {
    if (threadIdx.x < 32) {
      if (round > 0) wait(&free, (round - 1) & 1);
      data[lane] = round + lane;
      arrive<all>(&full);
    } else {
      wait(&full, round & 1);
      sum += data[31 - lane];
      arrive<all>(&free);
    }
  }
  out[threadIdx.x] = sum;
}

// A bulk copy writes.
template <bool all>
__global__ void copies(const int* from, int* out) {
  __shared__ alignas(128) int data[32];
  __shared__ uint64_t full, free;
  const int lane = threadIdx.x % 32;
  int sum = 0;
  if (threadIdx.x == 0) {
    init(&full, 1);
    init(&free, all ? 32 : 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  for (int round = 0; round < kRounds; round++) {
    if (threadIdx.x == 0) {
      if (round > 0) wait(&free, (round - 1) & 1);
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 128;" ::"r"(shared_address(&full)) : "memory");
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 128, [%2];" ::"r"(shared_address(data)),
                   "l"(from + 32 * round), "r"(shared_address(&full))
                   : "memory");
    }
    if (threadIdx.x >= 32) {
      wait(&full, round & 1);
      sum += *(volatile int*)&data[lane];
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      arrive<all>(&free);
    }
  }
  out[threadIdx.x] = sum;
}

enum Meeting { kNone, kNamed, kMbarrier };

// Of some warps: at a named barrier, or at an mbarrier at which all their lanes arrive.
template <Meeting by, int warps>
__device__ void meet(uint64_t* barrier) {
  if constexpr (by == kNamed) asm volatile("barrier.sync 1, %0;" ::"n"(warps * 32) : "memory");
  if constexpr (by == kMbarrier) {
    uint64_t state;
    uint32_t over = 0;
    asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];" : "=l"(state) : "r"(shared_address(barrier)) : "memory");
    while (!over) {
      asm volatile("{ .reg .pred p; mbarrier.test_wait.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(over)
                   : "r"(shared_address(barrier)), "l"(state)
                   : "memory");
    }
  }
}

// Seven warps write for six, which read it and write something back: all meet twice in a round. between: the seven also meet each other
// between the two. some: some of their lanes write nothing. after: the seven also meet each other when they have read.
template <Meeting between, bool some, Meeting after = kNone>
__global__ void two_sides(int* out) {
  constexpr int kReaders = 6, kWriters = 7;
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) init(&barrier, kWriters * 32);
  __syncthreads();
  __shared__ volatile int there[kWriters * 32], back[2][kReaders * 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int sum = 0;
  for (int round = 0; round < 8 * kRounds; round++) {
    if (warp >= kReaders) {
      const int writer = warp - kReaders;
      if (!some || lane < 24) there[writer * 32 + lane] = round + lane;
      __syncwarp();
      asm volatile("barrier.sync 8, %0;" ::"n"((kReaders + kWriters) * 32) : "memory");
      meet<between, kWriters>(&barrier);
      asm volatile("barrier.sync 9, %0;" ::"n"((kReaders + kWriters) * 32) : "memory");
      for (int i = writer * 32 + lane; i < kReaders * 32; i += kWriters * 32) sum += back[round % 2][i];
      __syncwarp();
      meet<after, kWriters>(&barrier);
    } else {
      asm volatile("barrier.sync 8, %0;" ::"n"((kReaders + kWriters) * 32) : "memory");
      for (int i = 0; i < kWriters; i++) sum += there[i * 32 + (lane + warp) % 24];
      back[round % 2][warp * 32 + lane] = sum;
      asm volatile("barrier.sync 9, %0;" ::"n"((kReaders + kWriters) * 32) : "memory");
    }
  }
  out[threadIdx.x] = sum;
}

}  // namespace

int main(int count, char** arguments) {
  const int which = count > 1 ? atoi(arguments[1]) : 0;
  int *from, *out;
  cudaMalloc(&from, 4096);
  cudaMalloc(&out, 8192);
  cudaMemset(from, 1, 4096);
  switch (which) {
    case 0: named_barriers<false><<<1, 64>>>(out); break;
    case 1: named_barriers<true><<<1, 64>>>(out); break;
    case 2: mbarriers<true><<<1, 64>>>(out); break;
    case 3: mbarriers<false><<<1, 64>>>(out); break;
    case 4: copies<true><<<1, 64>>>(from, out); break;
    case 5: copies<false><<<1, 64>>>(from, out); break;
    case 6: inner_barrier<<<1, 96>>>(out); break;
    case 7: two_sides<kNone, false><<<1, 13 * 32>>>(out); break;
    case 8: two_sides<kNamed, false><<<1, 13 * 32>>>(out); break;
    case 9: two_sides<kNone, true><<<1, 13 * 32>>>(out); break;
    case 10: two_sides<kNone, false, kNamed><<<1, 13 * 32>>>(out); break;
    case 11: two_sides<kNamed, false, kNamed><<<1, 13 * 32>>>(out); break;
    case 12: two_sides<kMbarrier, false><<<1, 13 * 32>>>(out); break;
    case 13: two_sides<kNone, false, kMbarrier><<<1, 13 * 32>>>(out); break;
    case 14: two_sides<kMbarrier, false, kMbarrier><<<1, 13 * 32>>>(out); break;
  }
  const cudaError_t error = cudaDeviceSynchronize();
  printf("%d: %s\n", which, cudaGetErrorString(error));
  return error != cudaSuccess;
}
