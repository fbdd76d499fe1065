// f16: IEEE half precision, saturating at 65504.
#pragma once

#include "kvant/base/small_floats.h"
#include "kvant/formats/block_math.h"
#include "kvant/formats/format.h"

namespace kvant::formats {

struct F16 {
  static constexpr FormatInfo kInfo = {
      .id = FormatId::kF16,
      .name = "f16",
      .element = Element::kF16,
      .code_bits = 16,
      .axis = BlockAxis::kNone,
      .block_size = 0,
      .scale = Scale::kNone,
      .global_scale = GlobalScale::kNone,
      .for_keys = true,
      .for_values = true,
      .summary = "IEEE half precision, saturating at 65504",
  };
  using Code = uint16_t;

  KVANT_HD static constexpr uint32_t block_scale(const float*, int, float) { return 0; }
  KVANT_HD static constexpr Code encode(float x, uint32_t, float) {
    return is_nan(x) ? Code{0} : to_f16_saturated(x);
  }
  KVANT_HD static constexpr float decode(Code code, uint32_t, float) { return from_f16(code); }
  KVANT_HD static constexpr float max_magnitude(float) { return 65504.0f; }
};

}  // namespace kvant::formats
