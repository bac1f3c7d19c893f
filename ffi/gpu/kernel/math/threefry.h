// Random bits: threefry2x32 with 20 rounds (Salmon et al., 2011), as jax.random has them. See docs/sampling.md.
#pragma once

#include "arch/arch.h"

namespace mk {

struct Key {
  u32 a, b;
};

template <int rotation>
MK_DEVICE void threefry_round(Key& x) {
  x.a += x.b;
  x.b = (x.b << rotation | x.b >> (32 - rotation)) ^ x.a;
}

MK_DEVICE Key threefry2x32(Key key, Key x) {
  const u32 c = key.a ^ key.b ^ 0x1bd11bdau;
  auto even = [&x] {
    threefry_round<13>(x);
    threefry_round<15>(x);
    threefry_round<26>(x);
    threefry_round<6>(x);
  };
  auto odd = [&x] {
    threefry_round<17>(x);
    threefry_round<29>(x);
    threefry_round<16>(x);
    threefry_round<24>(x);
  };
  auto add = [&x](u32 a, u32 b) {
    x.a += a;
    x.b += b;
  };
  add(key.a, key.b);
  even();
  add(key.b, c + 1u);
  odd();
  add(c, key.a + 2u);
  even();
  add(key.a, key.b + 3u);
  odd();
  add(key.b, c + 4u);
  even();
  add(c, key.a + 5u);
  return x;
}

MK_DEVICE Key fold_in(Key key, u32 data) { return threefry2x32(key, {0u, data}); }

// jax.random.bits(step_key, (n,), uint32)[i] for any n > i.
MK_DEVICE u32 random_bits(Key step_key, u32 i) {
  const Key x = threefry2x32({arch::fresh(step_key.a), arch::fresh(step_key.b)}, {0u, i});
  return x.a ^ x.b;
}

}  // namespace mk
