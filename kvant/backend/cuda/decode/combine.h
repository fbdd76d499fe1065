// The kernel that merges partial results of decode attention.
#pragma once

#include <cuda_runtime_api.h>

#include "kvant/backend/cuda/decode/kernel_params.h"

namespace kvant::backend::cuda {

inline constexpr int kCombineThreads = 128;
inline constexpr int kMaxCombined = 640;  // partial results of a unit

// What to launch, with DecodeParams as its parameter, for `num_units` split units of up to
// `num_rows` query rows and `most_partials` (at most kMaxCombined) partial results. The order of
// sums depends on most_partials: kMaxCombined makes it depend on a unit's own number only.
struct CombineLaunch {
  const void* kernel = nullptr;
  dim3 grid;
};
CombineLaunch combine_launch(int num_units, int num_rows, int most_partials, int head_dim);

// Values that are stored rotated, or less a bias (codecs.md section 3): the unit's results of
// stored pages are merged by themselves, given their bias and rotated back, then joined to the
// others.
struct ValueTransform {
  const float* bias = nullptr;  // [num_kv_heads][head_dim] or null
  int rotation_block = 0;       // 0: not rotated
  float rotation_scale = 1.0f;
};
// With DecodeParams and ValueTransform as its parameters; PlanShape::values_apart.
CombineLaunch combine_values_launch(int num_units, int num_rows);

}  // namespace kvant::backend::cuda
