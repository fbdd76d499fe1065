// int2:channel: 2-bit integers, one block per channel over the page's tokens (affine_int.h). Keys
// only.
#pragma once

#include "kvant/formats/affine_int.h"

namespace kvant::formats {

struct Int2Channel : AffineInt<2> {
  static constexpr FormatInfo kInfo = {
      .id = FormatId::kInt2Channel,
      .name = "int2:channel",
      .element = Element::kUnsigned,
      .code_bits = 2,
      .axis = BlockAxis::kToken,
      .block_size = 0,
      .scale = Scale::kF16Pair,
      .global_scale = GlobalScale::kNone,
      .for_keys = true,
      .for_values = false,
      .summary = "2-bit integers, asymmetric, f16 scale and zero per channel and page",
  };
};

}  // namespace kvant::formats
