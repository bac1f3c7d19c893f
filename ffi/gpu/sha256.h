// SHA-256 (FIPS 180-4): names entries of the program cache and detects damaged ones.
#pragma once

#include <string>
#include <string_view>

namespace monokernel::gpu {

// 64 hexadecimal digits.
std::string sha256(std::string_view data);

}  // namespace monokernel::gpu
