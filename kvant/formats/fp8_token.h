// fp8:token: E4M3 with one fp32 scale per token-head.
//
//   s = fl(amax / 448); code RNE(fl(x / s)), all 0 where s = 0; decode fl(q * s).
#pragma once

#include "kvant/base/small_floats.h"
#include "kvant/formats/block_math.h"
#include "kvant/formats/format.h"

namespace kvant::formats {

struct Fp8Token {
  static constexpr FormatInfo kInfo = {
      .id = FormatId::kFp8Token,
      .name = "fp8:token",
      .element = Element::kE4m3,
      .code_bits = 8,
      .axis = BlockAxis::kHeadDim,
      .block_size = 0,
      .scale = Scale::kF32,
      .global_scale = GlobalScale::kNone,
      .for_keys = true,
      .for_values = true,
      .summary = "8-bit float E4M3, one fp32 scale per token-head",
  };
  using Code = uint8_t;

  KVANT_HD static constexpr uint32_t block_scale(const float* x, int n, float) {
    return std::bit_cast<uint32_t>(finite_amax(x, n) / 448.0f);
  }
  KVANT_HD static constexpr Code encode(float x, uint32_t scale, float) {
    const float s = std::bit_cast<float>(scale);
    return s == 0.0f || is_nan(x) ? Code{0} : to_e4m3(x / s);
  }
  KVANT_HD static constexpr float decode(Code code, uint32_t scale, float) {
    return from_e4m3(code) * std::bit_cast<float>(scale);
  }
  KVANT_HD static constexpr float max_magnitude(float) { return std::bit_cast<float>(0x7f7fffffu); }
};

}  // namespace kvant::formats
