// fp8e5m2: E5M2 with one fp32 scale per layer and side, from the plan (1 without one).
#pragma once

#include "kvant/formats/scaled_float8.h"

namespace kvant::formats {

struct Fp8E5m2 : ScaledFloat8<E5m2Element> {
  static constexpr FormatInfo kInfo = {
      .id = FormatId::kFp8E5m2,
      .name = "fp8e5m2",
      .element = Element::kE5m2,
      .code_bits = 8,
      .axis = BlockAxis::kNone,
      .block_size = 0,
      .scale = Scale::kNone,
      .global_scale = GlobalScale::kPerTensor,
      .for_keys = true,
      .for_values = true,
      .summary = "8-bit float E5M2, one scale per layer and side",
  };
};

}  // namespace kvant::formats
