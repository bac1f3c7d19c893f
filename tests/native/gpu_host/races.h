// Watches every access of an instrumented build: addresses out of bounds, memory read before it was written, and pairs of
// accesses, one of them a write, that nothing orders.
#pragma once

#include <string>
#include <vector>

#include "memory.h"

namespace mk::host {

class Machine;

class Races {
 public:
  Races(Machine& machine, const Options& options);

  // Atomic accesses order nothing, but they do not race with each other.
  enum class Kind { kRead, kWrite, kAtomicRead, kAtomicWrite };
  void access(const void* p, u64 bytes, Kind kind, const void* pc);

 private:
  struct Event {
    u32 lane = 0;  // index + 1; 0: there was none
    u32 clock = 0;
    u32 pc = 0;    // offset in the library
    u32 atomic = 0;
  };
  struct Cell {  // of a byte
    Event write, reads[2];
  };
  struct Range {
    std::string name;
    const char* begin;
    u64 bytes;
    bool writable, blank, narrow, shared;
    Zeroed<Cell> cells;  // only if writable
  };

  bool in_own_stack(const void* p) const;
  Range* range(const void* p);
  bool ordered(const Event& event) const;
  bool read_before(const Event& event) const;  // the event is a read that has been made
  [[noreturn]] void report(const Range& range, u64 offset, const char* what, Kind kind, const void* pc, const Event* other);
  std::string place(const void* pc) const;

  Machine& machine_;
  const char *image_begin_ = nullptr, *image_end_ = nullptr;  // the library: its tables
  std::vector<Range> ranges_;
  Range* last_ = nullptr;
};

}  // namespace mk::host
