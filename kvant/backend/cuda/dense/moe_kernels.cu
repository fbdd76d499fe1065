#include "kvant/backend/cuda/dense/moe_kernels.h"

#include <algorithm>

#include "kvant/backend/cuda/launch.h"
#include "kvant/backend/cuda/ptx.cuh"

namespace kvant::backend::cuda {
namespace {

constexpr int kPerLane = kMaxExperts / 32;

// A warp a row. Softmax, then the largest, again and again.
__global__ void choose_kernel(ChooseArgs args) {
  ptx::launch_dependents();
  ptx::wait_prerequisites();
  const int lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x * int64_t{blockDim.x / 32} + threadIdx.x / 32;
  if (row >= args.num_rows) return;
  const float* logits = args.logits + row * args.num_experts;
  float p[kPerLane];  // expert 32 i + lane
  float largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = 32 * i + lane;
    p[i] = expert < args.num_experts ? logits[expert] : -INFINITY;
    largest = fmaxf(largest, p[i]);
  }
  for (int step = 16; step > 0; step /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    p[i] = expf(p[i] - largest);
    sum += p[i];
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  float chosen_sum = 0.0f;
  for (int k = 0; k < args.used; ++k) {
    float best = -1.0f;
    int index = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (p[i] > best && 32 * i + lane < args.num_experts) {
        best = p[i];
        index = 32 * i + lane;
      }
    }
    for (int step = 16; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, best, step);
      const int other_index = __shfl_xor_sync(0xffffffffu, index, step);
      if (other > best || (other == best && other_index < index)) {
        best = other;
        index = other_index;
      }
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (32 * i + lane == index) p[i] = -2.0f;  // taken
    }
    const float weight = best / sum;
    chosen_sum += weight;
    if (lane == 0) {
      args.chosen[row * args.used + k] = index;
      args.weights[row * args.used + k] = weight;
    }
  }
  if (!args.normalize) return;
  __syncwarp();
  for (int k = lane; k < args.used; k += 32) args.weights[row * args.used + k] /= chosen_sum;
}

__global__ void combine_kernel(CombineArgs args) {
  ptx::launch_dependents();
  ptx::wait_prerequisites();
  for (int64_t at = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; at < args.num_rows * args.dim;
       at += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = at / args.dim;
    float sum = 0.0f;
    for (int64_t pair = row * args.used; pair < (row + 1) * args.used; ++pair) {
      const int64_t place = args.places != nullptr ? args.places[pair] : pair;
      sum = fmaf(args.weights[pair], args.down[place * args.dim + at % args.dim], sum);
    }
    args.out[at] = sum;
  }
}

}  // namespace

Status choose_experts(const ChooseArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0) return {};
  return launch_overlapped("choose_experts", choose_kernel,
                           {static_cast<unsigned>((args.num_rows + 3) / 4), 128, 0, stream}, args);
}

Status combine_experts(const CombineArgs& args, cudaStream_t stream) {
  const int64_t n = args.num_rows * args.dim;
  if (n == 0) return {};
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((n + 255) / 256, 1 << 16));
  return launch_overlapped("combine_experts", combine_kernel, {blocks, 256, 0, stream}, args);
}

}  // namespace kvant::backend::cuda
