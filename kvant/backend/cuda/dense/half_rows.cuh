// Rows of activations as right operands of products that decode weights.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvant/backend/cuda/dense/weight_tiles.h"
#include "kvant/backend/cuda/ptx.cuh"

namespace kvant::backend::cuda {

// Rows that images have for so many: whole turns of the swizzle.
template <typename T>
constexpr T padded_rows(T rows) {
  return (rows + 7) / 8 * 8;
}

// Images of rows: [tile of 64 inputs][row] 128 bytes, swizzled as wgmma reads them, and what sums
// of each row are multiplied with. Rows are padded. In each 16 inputs those that a lane of
// weights holds lie where it expects them (half_operands.cuh): 4 c and 4 c + 1 at 2 c, the two
// after them at 2 c + 8.
struct HalfRows {
  uint8_t* image;
  float* factors;  // [rows]
  int64_t tile_bytes;

  HalfRows() = default;
  __host__ __device__ HalfRows(std::byte* at, int64_t rows, int64_t padded_cols)
      : image(reinterpret_cast<uint8_t*>(at)), tile_bytes(padded_rows(rows) * 128) {
    factors = reinterpret_cast<float*>(image + padded_cols / kTileCols * tile_bytes);
  }

  // Inputs at, .., at + 7 of a row.
  __device__ void put(int64_t row, int at, const float (&x)[8]) const {
    uint8_t* const tile = image + at / kTileCols * tile_bytes + row * 128;
    const int chunk = at % kTileCols / 16 * 2;
    const int in_chunk = at % 16;  // in bytes: 8 for the upper inputs
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto place = static_cast<int64_t>((chunk + half) ^ static_cast<int>(row % 8)) * 16;
      *reinterpret_cast<uint2*>(tile + place + in_chunk) =
          make_uint2(ptx::f16x2_of_f32(x[2 * half], x[2 * half + 1]),
                     ptx::f16x2_of_f32(x[2 * half + 4], x[2 * half + 5]));
    }
  }
};

}  // namespace kvant::backend::cuda
