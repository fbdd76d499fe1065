// Which decode kernels exist, and the facts that host and device code share about them.
#pragma once

#include <cstdint>

#include "kvant/formats/format.h"

namespace kvant::backend::cuda {

// How the kernel reads the stored keys. kAny decides at run time, by a uniform branch.
enum class KeyKernel : int {
  kNvfp4,
  kMxfp4,
  kE4m3,
  kE4m3Token,
  kE5m2,
  kMxfp8,
  kInt8,
  kInt4,
  kInt4Channel,
  kInt3Channel,
  kInt2Channel,
  kBf16,
  kF16,
  kAny,
};

enum class ValueKernel : int {
  kNvfp4,
  kMxfp4,
  kE4m3,
  kE4m3Token,
  kE5m2,
  kMxfp8,
  kInt8,
  kInt4,
  kBf16,
  kF16,
  kAny,
};

// The kernel works on codes in units that are cheap to unpack; a value is code * unit * g.
// E2M1 codes become fp16 scaled by 2^-14, unsigned integers fp16 subnormals n * 2^-24 (int4 keys:
// n * 2^-20 in rows 8 to 15 of a fragment).
constexpr float value_unit(ValueKernel kernel) {
  switch (kernel) {
    case ValueKernel::kNvfp4:
    case ValueKernel::kMxfp4: return 16384.0f;
    case ValueKernel::kInt4: return 16777216.0f;
    case ValueKernel::kE4m3Token: return 1.0f / 448.0f;  // its scales are multiplied by 448
    default: return 1.0f;
  }
}

// 16-bit pages are read a tile of 16 tokens at a time, others a page at a time.
constexpr bool is_16_bit(KeyKernel kernel) {
  return kernel == KeyKernel::kBf16 || kernel == KeyKernel::kF16;
}
constexpr bool is_16_bit(ValueKernel kernel) {
  return kernel == ValueKernel::kBf16 || kernel == ValueKernel::kF16;
}

// A scale and a zero per channel and page.
constexpr bool is_channel(KeyKernel kernel) {
  return kernel == KeyKernel::kInt4Channel || kernel == KeyKernel::kInt3Channel ||
         kernel == KeyKernel::kInt2Channel;
}

inline constexpr int kTileTokens = 16;

}  // namespace kvant::backend::cuda
