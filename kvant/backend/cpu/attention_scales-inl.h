// Scales of a closed page as vectors, sixteen at a time. Included like attention_simd.h, after
// KVANT_LEVEL is defined.
#pragma once

#include "kvant/backend/cpu/attention_kernels.h"
#include "kvant/backend/cpu/attention_simd.h"

namespace kvant::backend::cpu::KVANT_LEVEL {
namespace {

struct ScalePair {
  F scale;
  F zero;
};

// Sixteen scales (and zeros, which lie `zero_offset` bytes further) at element `index`.
KVANT_INLINE ScalePair load_scales(PageScale kind, const uint8_t* p, int index, int zero_offset) {
  switch (kind) {
    case PageScale::kE4m3: {
      return {mul(load_e4m3(p + index), bcast(kE4m3Factor)), zero()};
    }
    case PageScale::kE8m0: return {as_float(shl(load_u8(p + index), 23)), zero()};
    case PageScale::kF16: return {load_f16(p + 2 * index), zero()};
    case PageScale::kF16Pair:
      return {load_f16(p + 2 * index), load_f16(p + 2 * index + zero_offset)};
    case PageScale::kF32: return {as_float(load_i(p + 4 * index)), zero()};
    default: return {bcast(1.0f), zero()};
  }
}

KVANT_INLINE constexpr int scale_stride(
    PageScale kind) {  // bytes of one scale, a pair counted whole
  switch (kind) {
    case PageScale::kE4m3:
    case PageScale::kE8m0: return 1;
    case PageScale::kF16: return 2;
    case PageScale::kF16Pair:
    case PageScale::kF32: return 4;
    default: return 0;
  }
}

}  // namespace
}  // namespace kvant::backend::cpu::KVANT_LEVEL
