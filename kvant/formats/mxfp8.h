// mxfp8: E4M3 in blocks of 32 with an E8M0 scale (microscaling.h).
#pragma once

#include "kvant/formats/microscaling.h"

namespace kvant::formats {

struct Mxfp8 : Microscaling<8> {
  static constexpr FormatInfo kInfo = {
      .id = FormatId::kMxfp8,
      .name = "mxfp8",
      .element = Element::kE4m3,
      .code_bits = 8,
      .axis = BlockAxis::kHeadDim,
      .block_size = 32,
      .scale = Scale::kE8m0,
      .global_scale = GlobalScale::kNone,
      .for_keys = true,
      .for_values = true,
      .summary = "8-bit float E4M3, power-of-two scale per 32 (OCP MX)",
  };
  using Code = uint8_t;

  KVANT_HD static constexpr Code encode(float x, uint32_t scale, float) {
    return is_nan(x) ? Code{0} : to_e4m3(x * inverse(scale));
  }
  KVANT_HD static constexpr float decode(Code code, uint32_t scale, float) {
    return from_e4m3(code) * from_e8m0(static_cast<uint8_t>(scale));
  }
  // 448 * 2^119: the largest exponent field, 254, gives e = 119.
  KVANT_HD static constexpr float max_magnitude(float) { return 448.0f * 0x1p119f; }
};

}  // namespace kvant::formats
