// The weights by which tokens are drawn from a row of logits, and the order of their sums: the same
// bits on the host and on devices.
//
// A value's weight is exp_of_negative(max(kLeastExponent, (value - greatest) * scale)), in float.
// All weights of a row are summed in double: blocks of kWeightBlock values one after the other; in
// a block kWeightLanes chains, chain j of the values j, j + kWeightLanes, ... of as many whole
// groups as there are, then the chains in order, then the values that are left.
#pragma once

#include <bit>
#include <cstdint>

#include "kvant/base/host_device.h"

namespace kvant {

inline constexpr int kWeightBlock = 256;
inline constexpr int kWeightLanes = 8;           // so that compilers use vector registers
inline constexpr float kLeastExponent = -87.0f;  // exp of less is not a normal number: taken for 0

// exp(x) for kLeastExponent <= x <= 0, relative error below 2e-7; 0 at kLeastExponent. Without
// branches, so that loops over the vocabulary become vector code: Cephes' expf, by range reduction
// to |r| <= ln(2) / 2 and a polynomial of degree 5.
KVANT_HD inline float exp_of_negative(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and subtracting rounds to an integer
  const float rounded = x * 1.44269504f + kRound;
  const float n = rounded - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float mantissa = (p * r * r + r) + 1.0f;
  // The low bits of `rounded` are n: cheaper than a conversion, on GPUs by far.
  const uint32_t exponent =
      std::bit_cast<uint32_t>(rounded) - std::bit_cast<uint32_t>(kRound) + 127;
  const float power = std::bit_cast<float>(exponent << 23);
  const uint32_t keep = -static_cast<uint32_t>(x > kLeastExponent);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(mantissa * power) & keep);
}

}  // namespace kvant
