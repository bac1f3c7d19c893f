// Runs the probe of a device's topology (probe/probe.h, docs/topology.md). What to measure, and what it means, is Python's part.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "gpu/device.h"
#include "gpu/probe/probe.h"

namespace monokernel::gpu {

class Probe {
 public:
  // What one launch does; the fields are those of topology::Args.
  struct Work {
    std::vector<uint32_t> unit_of;            // of each place, or none
    std::vector<topology::Job> jobs;
    std::vector<topology::Range> tracks;
    std::vector<int32_t> track_of;            // one for each unit, or none
    std::vector<uint32_t> blocks;
    std::vector<topology::Range> readings;    // one for each unit, or none
    uint32_t steps = 0, block_shift = 12, batches = 1, rounds = 1, warm_up = 0, touch = 0, looks = 0;
    double limit_s = 1;                       // after which the launch ends, whatever is left to do
  };
  struct Found {
    std::vector<topology::Result> results;    // of the jobs
    std::vector<topology::Line> lines;        // of the blocks, if units look at them
    std::vector<topology::Unit> units;
  };

  // Compiles and loads the probe, and allocates `memory_bytes`, or if there is less the most of half, a quarter ... that there is.
  // With an `address` it works in that memory instead, whose words hold afterwards what they held before. Throws Failure.
  Probe(Vendor vendor, int ordinal, uint64_t memory_bytes, uint64_t address = 0);
  ~Probe();
  Probe(const Probe&) = delete;
  Probe& operator=(const Probe&) = delete;

  // Throws Failure, among others for work that would reach outside the memory or wait for itself. Lasts little longer than limit_s.
  Found run(const Work& work);

  // CUDA: for each block of a launch of clusters of 2, 4 or 8, SM and cluster; empty if the device has none.
  std::vector<uint32_t> clusters(int size);

  const Device& device() const { return device_; }
  uint64_t memory_bytes() const { return memory_bytes_; }

 private:
  void* function(const char* name) const;
  void check(const Work& work) const;
  void wait(double limit_s);

  Device& device_;
  void* module_ = nullptr;
  void* function_ = nullptr;
  unsigned shared_bytes_ = 0;
  void* memory_ = nullptr;
  bool owns_memory_ = true;
  uint64_t memory_bytes_ = 0;
  uint32_t next_value_ = 1;  // of words
  bool lost_ = false;        // a launch did not end, so its memory is not given back
};

const char* probe_source();

}  // namespace monokernel::gpu
