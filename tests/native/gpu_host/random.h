// A small generator: the same numbers from the same seed on every machine.
#pragma once

#include "args.h"

namespace mk::host {

class Random {
 public:
  explicit Random(u64 seed) : state_(seed) {}

  u64 next() {  // splitmix64
    u64 z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  u64 below(u64 n) { return ((next() >> 32) * n) >> 32; }  // n < 2^32
  bool one_in(u64 n) { return below(n) == 0; }

 private:
  u64 state_;
};

}  // namespace mk::host
