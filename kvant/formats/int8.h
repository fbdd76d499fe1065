// int8: symmetric 8-bit integers in blocks of 32 with an f16 scale.
//
//   s = f16(fl(amax / 127)), saturating; code clamp(RNE(fl(x / s)), +-127), 0 where s = 0 and for
//   NaN; decode fl(q * s).
#pragma once

#include "kvant/base/small_floats.h"
#include "kvant/formats/block_math.h"
#include "kvant/formats/format.h"

namespace kvant::formats {

struct Int8 {
  static constexpr FormatInfo kInfo = {
      .id = FormatId::kInt8,
      .name = "int8",
      .element = Element::kSigned,
      .code_bits = 8,
      .axis = BlockAxis::kHeadDim,
      .block_size = 32,
      .scale = Scale::kF16,
      .global_scale = GlobalScale::kNone,
      .for_keys = true,
      .for_values = true,
      .summary = "8-bit integers, symmetric, f16 scale per 32",
  };
  using Code = uint8_t;  // two's complement

  KVANT_HD static constexpr uint32_t block_scale(const float* x, int n, float) {
    return to_f16_saturated(finite_amax(x, n) / 127.0f);
  }
  KVANT_HD static constexpr Code encode(float x, uint32_t scale, float) {
    const float s = from_f16(static_cast<uint16_t>(scale));
    if (s == 0.0f || is_nan(x)) return 0;
    return static_cast<Code>(round_clamped(x / s, -127, 127));
  }
  KVANT_HD static constexpr float decode(Code code, uint32_t scale, float) {
    return static_cast<float>(static_cast<int8_t>(code)) * from_f16(static_cast<uint16_t>(scale));
  }
  KVANT_HD static constexpr float max_magnitude(float) { return 127.0f * 65504.0f; }
};

}  // namespace kvant::formats
