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

}  // namespace kvant::backend::cuda
