// The kernel that merges partial results of decode attention.
#pragma once

#include "kvant/backend/cuda/decode/kernel_params.h"

namespace kvant::backend::cuda {

inline constexpr int kCombineThreads = 128;

// Grid: (split units, query rows of a tile), parameter DecodeParams.
const void* combine_function();

}  // namespace kvant::backend::cuda
