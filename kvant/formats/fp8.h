// fp8: E4M3 with one fp32 scale per layer and side, from the plan (1 without one).
#pragma once

#include "kvant/formats/scaled_float8.h"

namespace kvant::formats {

struct Fp8 : ScaledFloat8<E4m3Element> {
  static constexpr FormatInfo kInfo = {
      .id = FormatId::kFp8,
      .name = "fp8",
      .element = Element::kE4m3,
      .code_bits = 8,
      .axis = BlockAxis::kNone,
      .block_size = 0,
      .scale = Scale::kNone,
      .global_scale = GlobalScale::kPerTensor,
      .for_keys = true,
      .for_values = true,
      .summary = "8-bit float E4M3, one scale per layer and side",
  };
};

}  // namespace kvant::formats
