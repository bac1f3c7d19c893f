// The numbers of a custom call's attributes as a Program's fields. Not for code that is compiled for several instruction sets.
#pragma once

#include <cstddef>
#include <iterator>
#include <string>

#include "program.h"

namespace monokernel {

constexpr int64_t kFieldLimit = int64_t{1} << 40;  // far above any model

// Returns what is wrong with them; empty: nothing.
template <typename Ints, typename Floats>
std::string read_fields(const Ints& ints, const Floats& floats, Program* p) {
  constexpr const char* kInts[] = {
#define X(name) #name,
      MONOKERNEL_INT_FIELDS(X)
#undef X
  };
  constexpr const char* kFloats[] = {
#define X(name) #name,
      MONOKERNEL_FLOAT_FIELDS(X)
#undef X
  };
  if (ints.size() != std::size(kInts) || floats.size() != std::size(kFloats)) {
    return "the program was made by another version of jax_monokernel; trace or export it again";
  }
  size_t i = 0, f = 0;
#define X(name) p->name = ints[i++];
  MONOKERNEL_INT_FIELDS(X)
#undef X
#define X(name) p->name = floats[f++];
  MONOKERNEL_FLOAT_FIELDS(X)
#undef X
  for (size_t n = 0; n < std::size(kInts); n++) {
    if (ints[n] < -1 || ints[n] >= kFieldLimit) return std::string(kInts[n]) + " is out of range";
  }
  return "";
}

}  // namespace monokernel
