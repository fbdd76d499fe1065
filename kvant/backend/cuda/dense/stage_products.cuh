// What a warp multiplies at a time in products of few rows: a stage of weights in shared memory
// with prepared rows. Sums stay in its registers.
#pragma once

#include <algorithm>

#include "kvant/backend/cuda/dense/prepared_rows.cuh"
#include "kvant/backend/cuda/dense/product_tiles.cuh"

namespace kvant::backend::cuda {

inline constexpr int kRowTile = 4;  // rows of x in one instruction: two columns each, high and low

// Sums of a warp: rows g and g + 8 of a strip of weights, row c of each tile of rows of x.
template <int kTiles>
struct Sums {
  float v[kTiles][2];
};

// A lane's part of prepared rows: column g of each tile of them, which is a part of row g / 2, and
// the scales of row c. Rows that are not there are read as the first: nobody reads what comes of
// them.
template <WeightType kType, int kTiles>
struct LaneRows {
  static constexpr int kPartBytes = kAsBytes<kType> ? 64 : 128;
  const uint8_t* data[kTiles];
  const uint8_t* scales[kTiles];

  __device__ LaneRows(const PreparedRows& rows, int first, int count, int lane) {
    const int g = lane / 4;
    const int c = lane % 4;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int row = n * kRowTile + g / 2;
      const int scale_row = n * kRowTile + c;
      data[n] = rows.data + (first + (row < count ? row : 0)) * int64_t{rows.row_bytes} +
                g % 2 * kPartBytes + c * 16;
      scales[n] =
          rows.scales + (first + (scale_row < count ? scale_row : 0)) * int64_t{rows.scale_bytes};
    }
  }
  __device__ uint4 words(int n, int tile, int half = 0) const {
    return *reinterpret_cast<const uint4*>(data[n] + tile * (2 * kPartBytes) + half * 64);
  }
  // Scale and scaled sum of both blocks of a tile.
  __device__ float4 block_scales(int n, int tile) const {
    return *reinterpret_cast<const float4*>(scales[n] + tile * 16);
  }
};

// sums += a block of weights times the same inputs of x, `words` of a tile. A block is what shares
// a scale.
template <WeightType kType>
__device__ __forceinline__ void add_block(const RawTile<kType>& raw, int block, const uint4& words,
                                          int (&sums)[4]) {
  constexpr bool kSigned = kSignBit<kType> != 0;
  uint32_t a[2 * kScaleSteps<kType>];
  raw.bytes(block, a);
  if constexpr (kScaleSteps<kType> == 2) {
    ptx::mma_bytes<kSigned>(sums, a, block == 0 ? words.x : words.z,
                            block == 0 ? words.y : words.w);
  } else {
    ptx::mma_bytes<kSigned>(sums, a,
                            block == 0   ? words.x
                            : block == 1 ? words.y
                            : block == 2 ? words.z
                                         : words.w);
  }
}

// Scales sums of block `block` of a tile, whose scales of x are `x`, and adds them.
template <WeightType kType>
__device__ __forceinline__ void add_scaled(const RowScales& scales, const float4& x, int block,
                                           const int (&sums)[4], float (&total)[2]) {
  constexpr int kBlocks = 4 / kScaleSteps<kType>;
  const float x_scale = block < kBlocks / 2 ? x.x : x.z;
  const float x_sum = block < kBlocks / 2 ? x.y : x.w;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const auto whole = static_cast<float>(sums[2 * r] * 256 + sums[2 * r + 1]);
    total[r] = fmaf(scales.scale[r] * x_scale, whole, total[r]);
    if constexpr (kHasOffset<kType>) total[r] = fmaf(scales.offset[r], x_sum, total[r]);
  }
}

// Sums of products with bytes are whole numbers; they are scaled block by block.
template <WeightType kType, int kTiles>
__device__ __forceinline__ void add_tile(const RawTile<kType>& raw,
                                         const LaneRows<kType, kTiles>& rows, int tile,
                                         Sums<kTiles>& total) {
  constexpr int kSteps = kScaleSteps<kType>;
  uint4 x[kTiles];
  float4 x_scales[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    x[n] = rows.words(n, tile);
    x_scales[n] = rows.block_scales(n, tile);
  }
#pragma unroll
  for (int block = 0; block < 4 / kSteps; ++block) {
    const RowScales scales = raw.row_scales(block * kSteps);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      int sums[4] = {};
      add_block(raw, block, x[n], sums);
      add_scaled<kType>(scales, x_scales[n], block, sums, total.v[n]);
    }
  }
}

// ---- a single row ----

// Columns of the right operand are the two parts of four rows. A single row leaves six of them
// idle, and three of four lanes would scale sums that nobody wants. So columns 2 t and 2 t + 1 are
// the parts of the row's tile t of a stage, and zero for other tiles: once all tiles of the stage
// have been added, lane c has the sums of tile c, and scales those. Blocks are added in another
// order than with more rows.
template <WeightType kType>
struct OneRow {
  const uint8_t* data;    // of the lane's column
  const uint8_t* scales;  // of the lane's tile

  __device__ OneRow(const PreparedRows& rows, int row, int /*count*/, int lane)
      : data(rows.data + row * int64_t{rows.row_bytes} + lane / 8 * 128 + lane / 4 % 2 * 64 +
             lane % 4 * 16),
        scales(rows.scales + row * int64_t{rows.scale_bytes} + lane % 4 * 16) {}
};

// A unit of a warp; `load(raw, i)` reads tile i of it, `first` is the first one's number in the
// strip.
template <WeightType kType, typename Load>
__device__ __forceinline__ void add_stage_of_one(const Load& load, const OneRow<kType>& row,
                                                 int first, int num_tiles, float (&total)[2]) {
  constexpr int kSteps = kScaleSteps<kType>;
  constexpr int kBlocks = 4 / kSteps;
  constexpr int kStageTiles = kUnitTiles<kType>;
  const int lane = threadIdx.x % 32;
  const int column_tile = lane / 8;
  const int sum_tile = lane % 4;
  uint4 x = {0, 0, 0, 0};
  if (column_tile < kStageTiles && first + column_tile < num_tiles)
    x = *reinterpret_cast<const uint4*>(row.data + first * 128);
  int sums[kBlocks][4] = {};
#pragma unroll
  for (int tile = 0; tile < kStageTiles; ++tile) {
    RawTile<kType> raw;
    load(raw, tile);
    const uint32_t mine = column_tile == tile ? ~0u : 0u;
    const uint4 words = {x.x & mine, x.y & mine, x.z & mine, x.w & mine};
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) add_block(raw, block, words, sums[block]);
  }
  if (sum_tile >= kStageTiles || first + sum_tile >= num_tiles) return;
  RawTile<kType> raw;  // what it has beside codes
  load(raw, sum_tile);
  const float4 x_scales = *reinterpret_cast<const float4*>(row.scales + first * 16);
#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
    add_scaled<kType>(raw.row_scales(block * kSteps), x_scales, block, sums[block], total);
}

// Every lane gets the sum over the lanes that have sums of the same outputs.
__device__ __forceinline__ void join_tiles(float (&total)[2]) {
#pragma unroll
  for (float& sum : total) {
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
  }
}

// ---- several rows in floats ----

// Column 2 c has the products with the high parts of row c, column 2 c + 1 those with the low ones.
template <int kTiles>
struct FloatSums {
  float v[kTiles][4];
};

template <typename Tile, WeightType kType, int kTiles>
__device__ __forceinline__ void add_tile(const Tile& raw, const LaneRows<kType, kTiles>& rows,
                                         int tile, FloatSums<kTiles>& total) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint4 x[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) x[n] = rows.words(n, tile, half);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t high[4];
      uint32_t low[4];
      raw.operands(2 * half + step, high, low);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const uint32_t b0 = step == 0 ? x[n].x : x[n].z;
        const uint32_t b1 = step == 0 ? x[n].y : x[n].w;
        ptx::mma_bf16(total.v[n], high, b0, b1);
        if constexpr (kTwoParts<kType>) ptx::mma_bf16(total.v[n], low, b0, b1);
      }
    }
  }
}

// Of kStageTiles tiles of a strip those that are there, from `first` on; `load(raw, i)` reads the
// i-th.
template <int kStageTiles, typename Load, WeightType kType, int kTiles, typename Total>
__device__ __forceinline__ void add_stage(const Load& load, const LaneRows<kType, kTiles>& rows,
                                          int first, int num_tiles, Total& total) {
  constexpr int kStep = std::min(2, kStageTiles);
#pragma unroll
  for (int step = 0; step < kStageTiles; step += kStep) {
    if (step > 0 && first + step >= num_tiles) return;
#pragma unroll
    for (int i = step; i < step + kStep; ++i) {
      typename TileOf<kType>::Type raw;
      load(raw, i);
      add_tile(raw, rows, first + i, total);
    }
  }
}

template <WeightType kType, int kTiles>
__device__ Sums<kTiles> finished(const Sums<kTiles>& total) {
  constexpr float kFactor = 1.0f / static_cast<float>(1 << kCodeShift<kType>);
  Sums<kTiles> out;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) out.v[n][r] = total.v[n][r] * kFactor;
  }
  return out;
}
template <WeightType kType, int kTiles>
__device__ Sums<kTiles> finished(const FloatSums<kTiles>& total) {
  Sums<kTiles> out;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) out.v[n][r] = total.v[n][2 * r] + total.v[n][2 * r + 1];
  }
  return out;
}

}  // namespace kvant::backend::cuda
