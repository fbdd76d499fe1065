// What int4 and the ":channel" formats share: unsigned integers with an f16 scale and an f16 zero.
//
//   m = f16(min), s = f16(fl(fl(max - min) / steps)), both saturating; code
//   clamp(RNE(fl(fl(x - m) / s)), 0, steps), 0 where s = 0 and for NaN; decode fl(fl(q * s) + m).
// Side data: the pair (s, m), s in the low half.
#pragma once

#include "kvant/base/small_floats.h"
#include "kvant/formats/block_math.h"
#include "kvant/formats/format.h"

namespace kvant::formats {

template <int kBits>
struct AffineInt {
  static constexpr int kSteps = unsigned_steps(kBits);
  using Code = uint8_t;

  KVANT_HD static constexpr uint32_t block_scale(const float* x, int n, float) {
    const FiniteRange range = finite_range(x, n);
    const uint32_t scale = to_f16_saturated((range.max - range.min) / static_cast<float>(kSteps));
    return scale | static_cast<uint32_t>(to_f16_saturated(range.min)) << 16;
  }
  KVANT_HD static constexpr Code encode(float x, uint32_t pair, float) {
    const float s = from_f16(static_cast<uint16_t>(pair));
    const float m = from_f16(static_cast<uint16_t>(pair >> 16));
    if (s == 0.0f || is_nan(x)) return 0;
    return static_cast<Code>(round_clamped((x - m) / s, 0, kSteps));
  }
  KVANT_HD static constexpr float decode(Code code, uint32_t pair, float) {
    const float s = from_f16(static_cast<uint16_t>(pair));
    const float m = from_f16(static_cast<uint16_t>(pair >> 16));
    const float product = static_cast<float>(code) * s;
    return product + m;
  }
  // Of the zero point: a block further out is stored at its edge.
  KVANT_HD static constexpr float max_magnitude(float) { return 65504.0f; }
};

}  // namespace kvant::formats
