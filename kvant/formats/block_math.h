// Small exact pieces that format headers share: finite statistics of a block, rounding to integers.
//
// Host and device, constant expressions. Every fp32 operation rounds once (codecs.md, first lines).
#pragma once

#include <bit>
#include <cstdint>

#include "kvant/base/host_device.h"

namespace kvant::formats {

KVANT_HD constexpr uint32_t magnitude_bits(float x) {
  return std::bit_cast<uint32_t>(x) & 0x7fffffffu;
}
KVANT_HD constexpr bool is_finite(float x) {
  return magnitude_bits(x) < 0x7f800000u;
}
KVANT_HD constexpr bool is_nan(float x) {
  return magnitude_bits(x) > 0x7f800000u;
}
KVANT_HD constexpr float magnitude(float x) {
  return std::bit_cast<float>(magnitude_bits(x));
}

// Largest magnitude of the finite values of x[0..n); 0 if there is none.
KVANT_HD constexpr float finite_amax(const float* x, int n) {
  float amax = 0.0f;
  for (int i = 0; i < n; ++i) {
    if (is_finite(x[i]) && magnitude(x[i]) > amax) amax = magnitude(x[i]);
  }
  return amax;
}

// Integers in the order of the floats, with -0 below +0, so that minima do not depend on the order
// in which values are compared.
KVANT_HD constexpr int32_t order_key(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

struct FiniteRange {
  float min = 0.0f;
  float max = 0.0f;
};

// Over the finite values of x[0..n), -0 < +0; zeros if there is none.
KVANT_HD constexpr FiniteRange finite_range(const float* x, int n) {
  FiniteRange range;
  bool any = false;
  for (int i = 0; i < n; ++i) {
    if (!is_finite(x[i])) continue;
    if (!any || order_key(x[i]) < order_key(range.min)) range.min = x[i];
    if (!any || order_key(x[i]) > order_key(range.max)) range.max = x[i];
    any = true;
  }
  return range;
}

// clamp(RNE(y), low, high) for integers |low|, |high| < 2^22; not for NaN. Clamping first is the
// same.
KVANT_HD constexpr int32_t round_clamped(float y, int32_t low, int32_t high) {
  const float clamped = y < static_cast<float>(low)    ? static_cast<float>(low)
                        : y > static_cast<float>(high) ? static_cast<float>(high)
                                                       : y;
  // At 1.5 * 2^23 one ulp is 1: the addition rounds to the nearest even integer.
  constexpr float kMagic = 12582912.0f;
  return std::bit_cast<int32_t>(clamped + kMagic) - std::bit_cast<int32_t>(kMagic);
}

}  // namespace kvant::formats
