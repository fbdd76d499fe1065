// Choice and sum of experts. Each enqueues one kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kvant/base/result.h"

namespace kvant::backend::cuda {

struct ChooseArgs {
  const float* logits = nullptr;  // [num_rows][num_experts]
  int64_t num_rows = 0;
  int num_experts = 0;
  int used = 0;
  bool normalize = true;      // weights of the chosen are scaled to sum to 1
  int32_t* chosen = nullptr;  // [num_rows][used], by falling weight; ties go to the lowest index
  float* weights = nullptr;   // [num_rows][used]
};
// At most kMaxExperts experts.
inline constexpr int kMaxExperts = 1024;
Status choose_experts(const ChooseArgs& args, cudaStream_t stream);

struct CombineArgs {
  const float* down = nullptr;      // [place][dim]
  const int64_t* places = nullptr;  // [pair], or null: pair i is place i
  const float* weights = nullptr;   // [pair]
  int64_t num_rows = 0;
  int used = 0;
  int64_t dim = 0;
  float* out = nullptr;  // [num_rows][dim] = sum over the row's pairs, in order
};
Status combine_experts(const CombineArgs& args, cudaStream_t stream);

}  // namespace kvant::backend::cuda
