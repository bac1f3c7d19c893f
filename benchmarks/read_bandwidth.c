// How fast a team of threads can read memory: the roof for anything that must read every weight for every token.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { kVectorBytes = 64, kUnroll = 8, kBlockBytes = kVectorBytes * kUnroll };
typedef uint64_t Vector __attribute__((vector_size(kVectorBytes)));

typedef struct {
  const Vector* data;    // this thread's share
  size_t vectors;        // a multiple of kUnroll
  int threads, repeats;
  atomic_int* arrived;   // shared: counts the threads' arrivals, `threads` per hand-off
  double* seconds;       // [repeats], written by thread 0
  int index;
  uint64_t sum;          // keeps the reads from being optimised away
} Worker;

static double now_seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void wait_for_all(Worker* w, int hand_off) {
  atomic_fetch_add(w->arrived, 1);
  while (atomic_load(w->arrived) < hand_off * w->threads) continue;
}

static void* read_share(void* argument) {
  Worker* w = argument;
  Vector sums[kUnroll] = {0};
  for (int repeat = 0; repeat < w->repeats; ++repeat) {
    wait_for_all(w, 2 * repeat + 1);
    double start = now_seconds();
    for (size_t i = 0; i < w->vectors; i += kUnroll)
      for (int j = 0; j < kUnroll; ++j) sums[j] += w->data[i + j];
    wait_for_all(w, 2 * repeat + 2);
    if (w->index == 0) w->seconds[repeat] = now_seconds() - start;
  }
  for (int j = 0; j < kUnroll; ++j) w->sum += sums[j][0];
  return NULL;
}

// Reads `bytes` (rounded down to whole blocks per thread) `repeats` times with `threads` threads, each its own
// contiguous share in huge pages where the system has them. seconds [repeats]. Returns the bytes read per repeat, 0 for
// a failure.
size_t read_bandwidth(size_t bytes, int threads, int repeats, double* seconds) {
  size_t share = bytes / threads / kBlockBytes * kBlockBytes;
  const size_t huge_page_bytes = 2 << 20;
  size_t length = (share * threads / huge_page_bytes + 1) * huge_page_bytes;
  char* memory = aligned_alloc(huge_page_bytes, length);
  Worker* workers = calloc(threads, sizeof *workers);
  pthread_t* handles = calloc(threads, sizeof *handles);
  if (share == 0 || !memory || !workers || !handles) {
    free(memory), free(workers), free(handles);
    return 0;
  }
  madvise(memory, length, MADV_HUGEPAGE);  // advice: a refusal only makes it slower
  for (size_t i = 0; i < length / sizeof(uint64_t); ++i) ((uint64_t*)memory)[i] = i;
  atomic_int arrived = 0;
  int started = 0;
  for (; started < threads; ++started) {
    workers[started] = (Worker){.data = (const Vector*)(memory + started * share), .vectors = share / kVectorBytes,
                                .threads = threads, .repeats = repeats, .arrived = &arrived, .seconds = seconds,
                                .index = started};
    if (pthread_create(&handles[started], NULL, read_share, &workers[started])) abort();
  }
  for (int i = 0; i < threads; ++i) pthread_join(handles[i], NULL);
  free(memory), free(workers), free(handles);
  return share * threads;
}
