// int4:channel: 4-bit integers, one block per channel over the page's tokens (affine_int.h). Keys
// only.
#pragma once

#include "kvant/formats/affine_int.h"

namespace kvant::formats {

struct Int4Channel : AffineInt<4> {
  static constexpr FormatInfo kInfo = {
      .id = FormatId::kInt4Channel,
      .name = "int4:channel",
      .element = Element::kUnsigned,
      .code_bits = 4,
      .axis = BlockAxis::kToken,
      .block_size = 0,
      .scale = Scale::kF16Pair,
      .global_scale = GlobalScale::kNone,
      .for_keys = true,
      .for_values = false,
      .summary = "4-bit integers, asymmetric, f16 scale and zero per channel and page",
  };
};

}  // namespace kvant::formats
