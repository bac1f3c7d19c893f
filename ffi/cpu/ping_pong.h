// What it takes one CPU to see what another one wrote.
#pragma once

#include <vector>

namespace monokernel::cpu {

// Two threads, one on each CPU (the system's numbers), pass a word to and fro `rounds` times in each of `batches`. Nanoseconds one
// way of each batch. Throws std::invalid_argument for numbers that make no sense, and std::runtime_error if a thread may not run
// there, or the other one does not answer within a second.
std::vector<double> ping_pong(int cpu, int other, int rounds, int batches);

}  // namespace monokernel::cpu
