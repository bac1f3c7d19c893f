// What the memory can deliver: the roof that decode is measured against.
#pragma once

#include <cstdint>
#include <vector>

namespace monokernel::cpu {

// Reads a freshly written buffer of `bytes` `repeats` times with `threads` threads, each its own contiguous part, with the
// widest loads that the machine has. Bytes per second of each pass; the first ones may find cold caches.
// Throws std::invalid_argument for sizes that make no sense and std::bad_alloc.
std::vector<double> read_bandwidth(int64_t bytes, int threads, int repeats);

}  // namespace monokernel::cpu
