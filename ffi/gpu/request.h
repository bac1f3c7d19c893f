// What a kernel is built for: the program of the custom call's attributes, and what the call adds to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "gpu/driver.h"
#include "program.h"

namespace monokernel::gpu {

// As XLA or Python passes them; the tables are those of program.h.
struct Attributes {
  std::span<const int64_t> ints;
  std::span<const float> floats;
  std::span<const int64_t> layers;
  std::span<const double> ropes;
  std::span<const int64_t> tiles;
};

struct Request {
  Program program;     // points into the attributes
  int64_t batch = 0;
  int64_t splits = 0;      // parts of the context that are attended to separately
  int64_t task_heads = 0;  // query heads of one attention task
  int64_t capacity = 0;    // positions of the KV cache, from which the others follow: for messages
  bool long_parts = false;  // of the context, so that keys and values are better copied to shared memory (set_capacity)
  bool trace = false;
  bool near = false;  // words that stay inside a group go no further than the cache of its die
  bool racecheck = false;  // for compute-sanitizer's racecheck
  bool placed = false;  // the streams' pages lie where a table says, and units are dealt to dies

  int threads() const {
    const int64_t feed_waves = program.wave_size == 32;  // MK_FEED_WAVE of kernel/arch/cuda.h
    return static_cast<int>((program.waves + program.service_waves + feed_waves) * program.wave_size);
  }
};

// Of the operand with all streams.
std::vector<int64_t> stream_shape(const Program& program);

// Pages of the streams, if they can be placed; else 0.
int64_t pages(const Program& program);

constexpr int64_t kMaxBatch = 16;
constexpr int64_t kMaxSplits = 4096;
constexpr int64_t kMaxGroups = 64;

// Checks everything that leads to an address, because an exported program may have been changed on its way here. Throws
// Failure kInvalid.
Request read_request(const Attributes& attributes, int64_t batch, int64_t splits, int64_t task_heads);

// Sets what follows from the cache's capacity. That decides, because a kernel is compiled before it is known how much of it is in use.
void set_capacity(Request& request, int64_t capacity);

// The bytes that requests differ in: a key for kernels that are loaded.
std::string request_key(const Attributes& attributes, const Request& request);

// The source that is compiled (docs/kernel.md).
std::string stub(const Request& request, int64_t shared_bytes);

struct WorkspaceSize {
  int64_t bytes;
  int64_t exchange_bytes;  // at its start, zeroed before every launch
};

WorkspaceSize workspace_size(const Request& request);

// Bytes of the timeline that a MK_TRACE build writes, equally many for each unit; kernel/service.h says what they mean.
int64_t trace_bytes(const Request& request);

}  // namespace monokernel::gpu
