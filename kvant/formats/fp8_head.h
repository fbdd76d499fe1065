// fp8:head: E4M3 with one fp32 scale per KV head, from the plan (1 without one).
#pragma once

#include "kvant/formats/scaled_float8.h"

namespace kvant::formats {

struct Fp8Head : ScaledFloat8<E4m3Element> {
  static constexpr FormatInfo kInfo = {
      .id = FormatId::kFp8Head,
      .name = "fp8:head",
      .element = Element::kE4m3,
      .code_bits = 8,
      .axis = BlockAxis::kNone,
      .block_size = 0,
      .scale = Scale::kNone,
      .global_scale = GlobalScale::kPerHead,
      .for_keys = true,
      .for_values = true,
      .summary = "8-bit float E4M3, one scale per KV head",
  };
};

}  // namespace kvant::formats
