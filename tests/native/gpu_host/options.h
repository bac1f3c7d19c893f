// What a run is given and what it gives back. tests/gpu_host.py has the same structures.
#pragma once

#include "arch/host.h"

namespace mk::host {

// Memory that the kernel may touch.
struct Region {
  const char* name;
  char* begin;
  u64 bytes;
  u32 writable;
  u32 blank;   // its contents mean nothing before they are written
  u32 narrow;  // of single bytes, of which a word holds some that the reader does not want
  u32 unused;
};

enum class Policy : u32 {
  kRoundRobin,
  kForward,  // the first unit that has something to do
  kReverse,  // the last one
  kRandom,   // any, for a random number of steps
  kStarve,   // `unit` goes on only when all others wait for it
  kNewest,   // the unit that went on last, as long as it can
};

// When store_word becomes visible to other units.
enum class Stores : u32 {
  kNow,
  kRandom,  // some steps later, in any order; and loads may give the value before
  kLate,    // when all waves wait, some of them
};

enum class FaultKind : u32 { kNone, kDrop, kHold, kFlip, kLag /* until the next release */ };
enum class Watched : u64 { kAll, kNotZero, kZero };

// What goes wrong with the nth store_word (from 0) between these addresses.
struct Fault {
  FaultKind kind;
  u32 nth;
  const char *begin, *end;
  Watched watched;  // which stores are counted
};

// Which pages of 4096 bytes are near which dies: what is read once (weights) is counted by that.
struct Homes {
  const char* begin;  // of the first page
  const u8* of_pages;
  u64 pages;          // 0: nothing is counted
  const u8* of_dies;  // the home that is near each
};

struct Options {
  Args args;
  const Region* regions;
  u64 region_count;
  u64 seed;
  u64 max_steps;    // a kernel that needs more is taken to be stuck
  u64 cancel_step;  // when *args.cancel becomes 1; 0: never
  Policy policy;
  Stores stores;
  u64 unit;  // Policy::kStarve
  Fault fault;
  const u32* dies;  // of the units; null: all are on one
  Homes homes;
};

struct Statistics {
  u64 steps;
  u64 switches;
  u64 stores;   // of words
  u64 delayed;  // of these
  u64 stale;    // loads that gave an old value
  u64 faults;   // injected
  u64 watched;  // stores between the addresses of the fault
  u64 near, far;  // bytes read once from pages with a home, by units that are near to it or not
};

}  // namespace mk::host
