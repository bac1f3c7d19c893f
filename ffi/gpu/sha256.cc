#include "gpu/sha256.h"

#include <array>
#include <bit>
#include <cstdint>

namespace monokernel::gpu {
namespace {

// Fractional parts of the square roots (initial state) and cube roots (constants) of the first primes, from their definition.
struct Tables {
  std::array<uint32_t, 8> initial;
  std::array<uint32_t, 64> constants;
};

// The first 32 bits of the fractional part of prime^(1/power): the largest n with (n / 2^32)^power <= prime, by bisection.
uint32_t root_bits(uint32_t prime, int power) {
  uint64_t low = 0, high = uint64_t{20} << 32;
  while (high - low > 1) {
    const uint64_t middle = low + (high - low) / 2;
    using Wide = unsigned __int128;
    const Wide square = static_cast<Wide>(middle) * middle;
    const bool below = power == 2 ? square <= static_cast<Wide>(prime) << 64 : square * middle <= static_cast<Wide>(prime) << 96;
    (below ? low : high) = middle;
  }
  return static_cast<uint32_t>(low);
}

Tables make_tables() {
  Tables t{};
  size_t n = 0;
  for (uint32_t candidate = 2; n < 64; candidate++) {
    bool prime = true;
    for (uint32_t d = 2; d * d <= candidate; d++) prime = prime && candidate % d != 0;
    if (!prime) continue;
    if (n < 8) t.initial[n] = root_bits(candidate, 2);
    t.constants[n++] = root_bits(candidate, 3);
  }
  return t;
}

void compress(std::array<uint32_t, 8>& state, const unsigned char* block, const Tables& t) {
  uint32_t w[64];
  for (int i = 0; i < 16; i++) {
    w[i] = static_cast<uint32_t>(block[4 * i]) << 24 | static_cast<uint32_t>(block[4 * i + 1]) << 16 |
           static_cast<uint32_t>(block[4 * i + 2]) << 8 | block[4 * i + 3];
  }
  for (int i = 16; i < 64; i++) {
    const uint32_t a = w[i - 15], b = w[i - 2];
    w[i] = w[i - 16] + (std::rotr(a, 7) ^ std::rotr(a, 18) ^ a >> 3) + w[i - 7] +
           (std::rotr(b, 17) ^ std::rotr(b, 19) ^ b >> 10);
  }
  auto [a, b, c, d, e, f, g, h] = state;
  for (size_t i = 0; i < 64; i++) {
    const uint32_t x =
        h + (std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25)) + ((e & f) ^ (~e & g)) + t.constants[i] + w[i];
    const uint32_t y = (std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + x, d = c, c = b, b = a, a = x + y;
  }
  const uint32_t sum[] = {a, b, c, d, e, f, g, h};
  for (size_t i = 0; i < 8; i++) state[i] += sum[i];
}

}  // namespace

std::string sha256(std::string_view data) {
  static const Tables tables = make_tables();
  std::array<uint32_t, 8> state = tables.initial;
  std::string tail(data.substr(data.size() / 64 * 64));
  tail += static_cast<char>(0x80);
  tail.append((56 - tail.size() % 64 + 64) % 64, '\0');
  for (int shift = 56; shift >= 0; shift -= 8) tail += static_cast<char>(static_cast<uint64_t>(data.size()) * 8 >> shift);
  const auto* bytes = reinterpret_cast<const unsigned char*>(data.data());
  for (size_t i = 0; i + 64 <= data.size(); i += 64) compress(state, bytes + i, tables);
  bytes = reinterpret_cast<const unsigned char*>(tail.data());
  for (size_t i = 0; i < tail.size(); i += 64) compress(state, bytes + i, tables);
  std::string hex;
  for (uint32_t word : state) {
    for (int shift = 28; shift >= 0; shift -= 4) hex += "0123456789abcdef"[word >> shift & 15];
  }
  return hex;
}

}  // namespace monokernel::gpu
