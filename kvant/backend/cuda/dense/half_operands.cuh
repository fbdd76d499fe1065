// Tiles of weights (weight_tiles.h) decoded to FP16, as left operands of products with k = 16:
// register i, half h of lane 4 g + c = row g + 8 (i % 2), input 16 s + 4 c + 2 (i / 2) + h of
// step s.
//
// Codes are exact in FP16; scales and offsets that are products of numbers of the file are rounded
// to it (2^-12), and so are weights.
#pragma once

#include <cstdint>

#include "kvant/backend/cuda/dense/product_tiles.cuh"

namespace kvant::backend::cuda {

// An E4M3 code as exponent and mantissa of an FP16 number is 2^-8 of its value.
inline constexpr float kOfE4m3Halves = 0x1p8f;

// The first or second pair of a word of E4M3 codes.
template <bool kSecond>
__device__ inline uint32_t f16x2_of_e4m3_codes(uint32_t word) {
  const uint32_t bits = bf16x2_of_e4m3<kSecond>(word);  // magnitudes are at 10..4
  return and_xor(bits, 0x80008000u, (bits & 0x07f007f0u) << 3);
}

// Codes of step s of rows g + 8 (i % 2): whole numbers.
template <WeightType kType>
__device__ inline void half_codes(const RawTile<kType>& raw, int s, uint32_t (&a)[4]) {
  constexpr TileBytes kBytes = tile_bytes(kType);
  constexpr bool kWhole = kBytes.low == 1024;  // bytes instead of nibbles
  const uint4& words = raw.low[kWhole ? s / 2 : 0];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = i % 2;
    const int shift = 8 * (i / 2);
    const int at = kWhole ? 2 * (s % 2) + row : s;
    const uint32_t word = at == 0 ? words.x : at == 1 ? words.y : at == 2 ? words.z : words.w;
    // 1024 + code, the code being the lowest bits of the mantissa; or 64 + code, sixteen times as
    // high, which spares the shift of upper nibbles.
    const int place = !kWhole && row == 1 ? 4 : 0;
    constexpr uint32_t kBoth = 0x00010001u;
    const uint32_t bias = kBoth * ((place == 4 ? 0x5400u : 0x6400u) +
                                   (static_cast<uint32_t>(kSignBit<kType>) << place));
    uint32_t bits = and_xor(word >> shift, kBoth * ((kWhole ? 0xffu : 0x0fu) << place), bias);
    if constexpr (kBytes.high == 128) {
      bits = and_xor(shift_left(raw.high[0], 4 + place - shift - 2 * s - row),
                     kBoth * (0x10u << place), bits);
    }
    if constexpr (kBytes.high == 256) {
      bits = and_xor(shift_left(raw.high[s / 2], 4 + place - shift - 4 * (s % 2) - 2 * row),
                     kBoth * (0x30u << place), bits);
    }
    a[i] = ptx::hadd2(bits, bias ^ 0x80008000u);
  }
}

// Of steps 2 h and 2 h + 1 of rows g and g + 8: what codes are multiplied with and what is added,
// or without an offset what those of each step are multiplied with.
template <WeightType kType>
struct HalfScales {
  uint32_t pair[2];

  __device__ HalfScales(const RawTile<kType>& raw, int h) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if constexpr (kType == WeightType::kQ4_1 || kType == WeightType::kQ5_1) {
        pair[r] = raw.scales[2 * r + h];
      } else if constexpr (kHasOffset<kType>) {
        // Bytes as 1024 + byte; then scale and -minimum.
        const uint32_t bytes =
            ptx::permute_bytes(raw.scales[r], 0x64646464u, h == 0 ? 0x4140 : 0x4342);
        const uint32_t whole = ptx::hfma2(bytes, 0xbc003c00u, 0x6400e400u);
        pair[r] = ptx::hmul2(whole, raw.super[r]);
      } else if constexpr (kScaleSteps<kType> == 1) {
        const uint32_t bytes =
            ptx::permute_bytes(raw.scales[r] ^ 0x80808080u, 0x64646464u, h == 0 ? 0x4140 : 0x4342);
        const uint32_t whole = ptx::hadd2(bytes, 0xe480e480u);
        pair[r] =
            r == 0 ? ptx::hmul2_low(whole, raw.super[0]) : ptx::hmul2_high(whole, raw.super[0]);
      } else {
        pair[r] = raw.scales[r];
      }
    }
  }
  __device__ uint32_t apply(uint32_t codes, int row, int step) const {
    if constexpr (kHasOffset<kType>) return ptx::hfma2_halves(codes, pair[row]);
    const int half = kScaleSteps<kType> == 1 ? step % 2 : step / 2;
    return half == 0 ? ptx::hmul2_low(codes, pair[row]) : ptx::hmul2_high(codes, pair[row]);
  }
};

// The weights of steps 2 h and 2 h + 1, but for scales of whole rows.
template <WeightType kType>
__device__ __forceinline__ void half_operands(const typename TileOf<kType>::Type& raw, int h,
                                              uint32_t (*a)[4]) {
  if constexpr (kRowScaled<kType>) {
    const uint4& words = raw.words[h];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
      a[i / 2][i % 2] = f16x2_of_e4m3_codes<false>(word);
      a[i / 2][i % 2 + 2] = f16x2_of_e4m3_codes<true>(word);
    }
  } else {
    const HalfScales<kType> scales(raw, h);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      half_codes(raw, 2 * h + s, a[s]);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[s][i] = scales.apply(a[s][i], i % 2, 2 * h + s);
    }
  }
}

}  // namespace kvant::backend::cuda
