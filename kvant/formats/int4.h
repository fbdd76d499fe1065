// int4: 4-bit integers in blocks of 32 channels of one token (affine_int.h).
#pragma once

#include "kvant/formats/affine_int.h"

namespace kvant::formats {

struct Int4 : AffineInt<4> {
  static constexpr FormatInfo kInfo = {
      .id = FormatId::kInt4,
      .name = "int4",
      .element = Element::kUnsigned,
      .code_bits = 4,
      .axis = BlockAxis::kHeadDim,
      .block_size = 32,
      .scale = Scale::kF16Pair,
      .global_scale = GlobalScale::kNone,
      .for_keys = true,
      .for_values = true,
      .summary = "4-bit integers, asymmetric, f16 scale and zero per 32",
  };
};

}  // namespace kvant::formats
