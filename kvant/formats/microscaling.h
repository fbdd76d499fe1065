// What mxfp4 and mxfp8 share: blocks of 32 with a power-of-two scale.
//
//   e = floor(log2 amax) - emax, clamped to +-127, stored as byte e + 127 (0 for an all-zero
//   block); code RNE(x * 2^-e), saturating; decode q * 2^e.
// Source: OCP Microscaling Formats (MX) v1.0, section 6.3 (floor rule), with saturation instead of
// NaN.
#pragma once

#include "kvant/base/small_floats.h"
#include "kvant/formats/block_math.h"
#include "kvant/formats/format.h"

namespace kvant::formats {

// `kMaxExponent` is the exponent of the element's largest power of two (emax).
template <int kMaxExponent>
struct Microscaling {
  // floor(log2 amax) is the exponent field less 127; amax below 2^-126 clamps like zero.
  KVANT_HD static constexpr uint32_t block_scale(const float* x, int n, float) {
    const int32_t exponent_field =
        static_cast<int32_t>(std::bit_cast<uint32_t>(finite_amax(x, n)) >> 23);
    return exponent_field > kMaxExponent ? static_cast<uint32_t>(exponent_field - kMaxExponent)
                                         : 0u;
  }
  // 2^-e of a stored byte; for bytes up to 253, all that block_scale yields.
  KVANT_HD static constexpr float inverse(uint32_t byte) {
    return std::bit_cast<float>((254u - byte) << 23);
  }
};

}  // namespace kvant::formats
