// Products of few rows with weights as they are stored: y = x W^T, bound by reading the weights.
//
// With codes that are integers, activations enter as numbers of 16 bits in blocks of 32 that share
// a scale; products of a block are summed exactly. With float weights, of 8 bits too, they enter as
// two BF16 numbers each (16 bits of mantissa). Sums over blocks are fp32. The order of a sum is
// that of tiles over a fixed number of warps, so that a row's bits depend on nothing but the row
// and the matrix; up to four rows have orders of their own (bulk_product.h), unless
// `deterministic`. docs/kernels/cuda-linear.md.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "kvant/backend/backend.h"
#include "kvant/backend/cuda/dense/weight_tiles.h"
#include "kvant/base/result.h"

namespace kvant::backend::cuda {

struct ProductTarget {
  WeightTiles weights;
  const float* bias = nullptr;  // [rows] or null
  float* out = nullptr;         // [num_rows][rows]
  bool accumulate = false;
};

// With `experts`, row i is multiplied with matrix experts[i] of a device table of `matrices` that
// all look like weights (whose data is not read), and reads row i / rows_per_x of x.
struct ExpertChoice {
  const int32_t* experts = nullptr;
  const uint8_t* const* matrices = nullptr;
  int rows_per_x = 1;
};

inline constexpr int kMaxProductTargets = 4;

// x is normed first, as rms_norm() does.
struct RowNorm {
  const float* weight = nullptr;  // [cols]; null: it is not
  float epsilon = 0.0f;
};

struct RowProduct {
  const float* x = nullptr;  // [num_rows][cols]; with experts [num_rows / rows_per_x][cols]
  int64_t num_rows = 0;
  ExpertChoice choice = {};
  RowNorm norm = {};   // where can_norm()
  bool gated = false;  // where can_norm(): targets are a gate and what it is for, both of one size;
  GateKind gate = GateKind::kSilu;  // the first one's `out` gets act(gate) * up
  int num_sms = 1;
  bool deterministic = false;  // a row has the same bits alone as among others
  // For rows of x in the form in which they are multiplied, unless blocks prepare them.
  std::byte* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

// Rows that the workspace of a product holds; more are multiplied in turns.
inline constexpr int64_t kPreparedRows = 64;

// Strips of 16 outputs times groups of 16 rows are what teams of warps take in turns.
inline constexpr int kGroupRows = 16;
inline constexpr int kTeamsOfBlock = 2;  // a block a multiprocessor
constexpr int64_t num_row_groups(int64_t num_rows) {
  return (num_rows + kGroupRows - 1) / kGroupRows;
}
constexpr int64_t num_teams(int num_sms) {
  return int64_t{kTeamsOfBlock} * num_sms;
}

// Whether products with such a matrix can norm their rows, and end in a gate.
bool can_norm(const WeightTiles& weights);

// Any number of rows. At most kMaxProductTargets targets with the same type and
// number of columns; with a choice of experts exactly one.
Status multiply_rows(const RowProduct& product, std::span<const ProductTarget> targets,
                     cudaStream_t stream);

// Values of rows [first_row, first_row + num_rows) rounded to BF16: out [num_rows][padded_cols].
// first_row is a multiple of 16.
struct Bf16Piece {
  WeightTiles weights;
  int64_t first_row = 0;
  int64_t num_rows = 0;
  uint16_t* out = nullptr;
};
// One launch for 1 to kMaxProductTargets pieces of one type.
Status dequantize_to_bf16(std::span<const Bf16Piece> pieces, cudaStream_t stream);

// Strips [first_strip, first_strip + num_strips) of a tiled matrix from file blocks of their rows,
// in device memory.
Status pack_tiles(const WeightTiles& weights, int64_t first_strip, int64_t num_strips,
                  const uint8_t* file_rows, cudaStream_t stream);

}  // namespace kvant::backend::cuda
