// What a launch of products of few rows is told: plain data, passed to kernels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kvant/backend/cuda/dense/product.h"

namespace kvant::backend::cuda {

struct ProductArgs {
  ProductTarget targets[kMaxProductTargets];
  int first_strip[kMaxProductTargets];  // of each target among all
  int num_targets;
  int64_t stride;  // of a strip, or of a row of floats, in bytes
  int num_groups;  // of rows of x
  int num_items;   // strips x groups
  const float* x;
  int64_t num_rows;
  ExpertChoice choice;
  RowNorm norm;
  bool gated;
  GateKind gate;
  uint8_t* prepared;  // all rows of x; null: each block prepares them for itself
  int prepared_rows;
};

// Rows of x of an item, at most.
inline int rows_of_items(const ProductArgs& args) {
  if (args.choice.experts != nullptr) return 1;
  return static_cast<int>(std::min<int64_t>(args.num_rows, kGroupRows));
}

// Rows of x that blocks prepare for themselves, each block all of them: beyond that a kernel that
// does it once is faster, though it is one launch more. Measured on an H100 (cuda-linear.md).
inline constexpr int kMostNormedInBlocks = 4;
inline constexpr int kMostValuesInBlocks = 12288;  // of rows as they are, if there is more than one

inline bool prepares_in_blocks(const ProductArgs& args) {
  if (args.norm.weight != nullptr) return args.prepared_rows <= kMostNormedInBlocks;
  return args.prepared_rows == 1 ||
         args.prepared_rows * args.targets[0].weights.padded_cols() <= kMostValuesInBlocks;
}

}  // namespace kvant::backend::cuda
