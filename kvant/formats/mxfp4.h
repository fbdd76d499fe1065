// mxfp4: E2M1 in blocks of 32 with an E8M0 scale (microscaling.h).
#pragma once

#include "kvant/formats/microscaling.h"

namespace kvant::formats {

struct Mxfp4 : Microscaling<2> {
  static constexpr FormatInfo kInfo = {
      .id = FormatId::kMxfp4,
      .name = "mxfp4",
      .element = Element::kE2m1,
      .code_bits = 4,
      .axis = BlockAxis::kHeadDim,
      .block_size = 32,
      .scale = Scale::kE8m0,
      .global_scale = GlobalScale::kNone,
      .for_keys = true,
      .for_values = true,
      .summary = "4-bit float E2M1, power-of-two scale per 32 (OCP MX)",
  };
  using Code = uint8_t;

  KVANT_HD static constexpr Code encode(float x, uint32_t scale, float) {
    return is_nan(x) ? Code{0} : to_e2m1(x * inverse(scale));
  }
  KVANT_HD static constexpr float decode(Code code, uint32_t scale, float) {
    return from_e2m1(code) * from_e8m0(static_cast<uint8_t>(scale));
  }
  // 6 * 2^125: the largest exponent field, 254, gives e = 125.
  KVANT_HD static constexpr float max_magnitude(float) { return 6.0f * 0x1p125f; }
};

}  // namespace kvant::formats
