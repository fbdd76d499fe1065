// How the CUDA backend stores a matrix. Host code sees sizes, kernels the places.
//
// Blocks of GGUF types become tiles of 16 output rows x 64 inputs in the order in which a warp's
// tensor-core instruction (mma.m16n8k16, weights as its left operand) takes them, so that every
// lane reads 16 contiguous bytes and needs no shuffles. Codes keep their bits; scales keep their
// numbers (those of Q4_K and Q5_K take 8 bits instead of 6). 16 rows form a strip; its planes:
//
//   low codes    [tile][lane] 16 bytes of nibbles (Q8_0 and F8_E4M3: [tile][2][lane] 16 bytes of
//                bytes)
//   high codes   [tile][lane] 4 bytes (fifth bits) or 8 bytes (Q6_K's upper pairs)
//   scales       [tile][row g of 8] of rows g and g + 8, see product_tiles.cuh
//   super scales [4 tiles][row g of 8] f16 of rows g and g + 8 (Q4_K, Q5_K, Q6_K)
//   row scales   [row] fp32, padded to a cache line (F8_E4M3)
//
// Input 16 s + 4 c + j of a tile belongs to step s, lanes 4 g + c. F32, F16 and BF16 stay rows.
// Rows are padded with zeros to whole pairs of tiles.
#pragma once

#include <cstdint>

#include "kvant/formats/weight_types.h"

namespace kvant::backend::cuda {

inline constexpr int kStripRows = 16;
inline constexpr int kTileCols = 64;
inline constexpr int kGroupTiles = 4;  // that share super scales

struct TileBytes {  // of one tile; `super` of four, `rows` of a strip
  int low;
  int high;
  int scales;
  int super;
  int rows = 0;
};

constexpr bool is_tiled(formats::WeightType type) {
  return type != formats::WeightType::kF32 && type != formats::WeightType::kF16 &&
         type != formats::WeightType::kBF16;
}

constexpr TileBytes tile_bytes(formats::WeightType type) {
  using formats::WeightType;
  switch (type) {
    case WeightType::kQ4_0: return {512, 0, 64, 0};
    case WeightType::kQ4_1: return {512, 0, 128, 0};
    case WeightType::kQ5_0: return {512, 128, 64, 0};
    case WeightType::kQ5_1: return {512, 128, 128, 0};
    case WeightType::kQ8_0: return {1024, 0, 64, 0};
    case WeightType::kQ4_K: return {512, 0, 64, 64};
    case WeightType::kQ5_K: return {512, 128, 64, 64};
    case WeightType::kQ6_K: return {512, 256, 64, 32};
    case WeightType::kF8_E4M3: return {1024, 0, 0, 0, 128};
    default: return {0, 0, 0, 0};
  }
}

// Offsets of the planes in a strip, and its size. Kernels give the tile's bytes as a constant.
struct StripPlanes {
  int high;
  int scales;
  int super;
  int rows;
  int bytes;

  constexpr StripPlanes(TileBytes tile, int num_tiles)
      : high(num_tiles * tile.low),
        scales(high + num_tiles * tile.high),
        super(scales + num_tiles * tile.scales),
        rows(super + (num_tiles + kGroupTiles - 1) / kGroupTiles * tile.super),
        bytes(rows + tile.rows) {}
};

// One matrix in device memory: plain data, passed to kernels.
struct WeightTiles {
  formats::WeightType type = formats::WeightType::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
  const uint8_t* data = nullptr;

  constexpr int64_t num_tiles() const { return (cols + 2 * kTileCols - 1) / (2 * kTileCols) * 2; }
  constexpr int64_t num_strips() const { return (rows + kStripRows - 1) / kStripRows; }
  constexpr int64_t padded_cols() const { return num_tiles() * kTileCols; }
  constexpr StripPlanes planes() const {
    return StripPlanes(tile_bytes(type), static_cast<int>(num_tiles()));
  }
  constexpr int64_t strip_bytes() const { return planes().bytes; }
  constexpr int64_t element_bytes() const { return type == formats::WeightType::kF32 ? 4 : 2; }
  constexpr int64_t bytes() const {
    return is_tiled(type) ? num_strips() * strip_bytes() : rows * padded_cols() * element_bytes();
  }
};

}  // namespace kvant::backend::cuda
