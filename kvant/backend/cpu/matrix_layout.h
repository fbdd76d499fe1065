// How the CPU backend stores a matrix: tiles of 16 output rows, one row per 32-bit SIMD lane.
//
// A tile holds its codes for all inputs, then its scales. Inputs are walked in order, so any number
// of activation rows gives the same bits (ADR 0003). Inputs form blocks of 32 and, inside a block,
// 16 pairs: a lane of a weight vector holds one pair as two 16-bit numbers, the shape that vpdpwssd
// / vpmaddwd multiply. docs/kernels/cpu-linear.md has a picture.
//
//   codes of one block, `r` = row in the tile (lane), input = 2 * pair + w,
//   pair = 4 v + 2 j + e; the pairs with equal v and e are group 2 v + e, four codes that also are
//   the four bytes 2 w + j of a lane, the shape that vpdpbusd multiplies:
//     low nibbles   [4 vectors][r] u32: bits 16 w + 8 j + 4 e of vector v
//     + 1 bit       [1 vector][r]  u32: bit  16 w + 8 j + group
//     + 2 bits      [2 vectors][r] u32: bits 16 w + 8 j + 2 (group % 4) of vector group / 4
//     8-bit codes   [8 vectors][r] u32: bits 16 w + 8 j of vector `group`
//   floats: [input][r] in the file's own type; F8_E4M3: behind them fp32 row scales [r], times 2^8
//
// Sources built for a SIMD level include this header: no containers, nothing with code.
#pragma once

#include <cstdint>

namespace kvant::backend::cpu {

inline constexpr int kTileRows = 16;
inline constexpr int kBlock = 32;          // inputs that share a scale of the activations
inline constexpr int kSuperBlock = 256;    // inputs that share the f16 scales of Q4_K, Q5_K, Q6_K
inline constexpr int kMaxPanelRows = 12;   // activation rows that one kernel call handles at most
inline constexpr int kWidePanelRows = 16;  // activation rows of a panel for matrix units
inline constexpr int kMaxWidePanels = 6;   // that one kernel call handles at most
inline constexpr int kMinWideCols = 2 * kBlock;

// What the kernels tell apart; one row per formats::WeightType.
enum class WeightKind : int {
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kQ4_K,
  kQ5_K,
  kQ6_K,
  kF32,
  kF16,
  kBF16,
  kF8_E4M3
};
inline constexpr int kNumWeightKinds = 12;

// Activations of `n` rows (a panel), prepared for integer products; one record per block:
//   int16 codes [n][32], float scale [n], float scale * sum [n], int32 -sum of inputs 0..15 [n],
//   int32 -sum of inputs 16..31 [n]
// A panel of one row may hold the codes as bytes instead (Simd::kDotsBytes), of each group of
// inputs
//   int8 high [4], int8 low [4] with code = 128 * high + low
// The codes have 15 bits (|q| <= 16256 = 127 * 128): x = scale * q within scale / 2.
inline constexpr int kQuantisedBlockBytes = 2 * kBlock + 16;  // of one row
inline constexpr float kMaxActivationCode = 16256.0f;
// Blocks whose largest magnitude is below this are taken as zero (1 / amax would overflow).
inline constexpr float kMinActivation = 1e-30f;

// Wide panels (wide_kernels.h) hold the same codes as sums of two bfloat16: high parts are
// multiples of 128, low parts at most 64. One record per block; rows that are missing are zeros:
//   bf16 high parts [16][32], bf16 low parts [16][32], float scale [16], float scale * sum [16]
inline constexpr int kWideBlockBytes = kWidePanelRows * (4 * kBlock + 8);  // of 16 rows

// For float matrices: fp32 values [block][n][32], padded with zeros.
inline constexpr int kFloatBlockBytes = 4 * kBlock;  // of one row

}  // namespace kvant::backend::cpu
