// bf16: values as they are, rounded to BF16. What open pages hold; also the base line of
// comparisons.
#pragma once

#include "kvant/base/small_floats.h"
#include "kvant/formats/block_math.h"
#include "kvant/formats/format.h"

namespace kvant::formats {

struct Bf16 {
  static constexpr FormatInfo kInfo = {
      .id = FormatId::kBf16,
      .name = "bf16",
      .element = Element::kBf16,
      .code_bits = 16,
      .axis = BlockAxis::kNone,
      .block_size = 0,
      .scale = Scale::kNone,
      .global_scale = GlobalScale::kNone,
      .for_keys = true,
      .for_values = true,
      .summary = "16-bit brain float, no quantisation",
  };
  using Code = uint16_t;

  KVANT_HD static constexpr uint32_t block_scale(const float*, int, float) { return 0; }
  KVANT_HD static constexpr Code encode(float x, uint32_t, float) {
    return is_nan(x) ? Code{0} : to_bf16_saturated(x);
  }
  KVANT_HD static constexpr float decode(Code code, uint32_t, float) { return from_bf16(code); }
  KVANT_HD static constexpr float max_magnitude(float) { return from_bf16(0x7f7f); }
};

}  // namespace kvant::formats
