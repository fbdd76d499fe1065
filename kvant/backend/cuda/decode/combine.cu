// Merges the partial results of units that several blocks shared, in the order of their pages.
#include "kvant/backend/cuda/decode/combine.h"
#include "kvant/backend/cuda/decode/rotate_shared.cuh"
#include "kvant/backend/cuda/decode/shape.cuh"

namespace kvant::backend::cuda {
namespace {

constexpr int kWarps = kCombineThreads / 32;
constexpr int kBatch = 6;  // loads of a lane in flight

// Merged state of all partials, known to every lane.
__device__ __forceinline__ float2 merge_states(const float2* states, int count, int lane) {
  float2 merged = {kNoReference, 0.0f};
  for (int i = lane; i < count; i += 32) merged.x = fmaxf(merged.x, states[i].x);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    merged.x = fmaxf(merged.x, __shfl_xor_sync(~0u, merged.x, distance));
  for (int i = lane; i < count; i += 32)
    merged.y = fmaf(states[i].y, ptx::exp2_approx(states[i].x - merged.x), merged.y);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    merged.y += __shfl_xor_sync(~0u, merged.y, distance);
  return merged;
}

// A block merges one query row of one unit, 128 / kGroups channels of it: a lane has a channel, and
// kGroups groups of warps take turns with the partials, so that all of a row's loads are on their
// way at once. So few registers and threads that it fits beside a decode block of the next layer.
template <int kGroups>
__global__ void __launch_bounds__(kCombineThreads, ptx::kThreadsOfSm / kCombineThreads)
    combine_kernel(const __grid_constant__ DecodeParams params) {
  constexpr int kGroupWarps = kWarps / kGroups;
  __shared__ float2 states[kMaxCombined];
  __shared__ float sums[kGroups][kGroupWarps * 32];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int group = warp / kGroupWarps;
  const int place = warp % kGroupWarps * 32 + lane;
  ptx::launch_dependents();
  const SplitUnit unit = params.split_units[blockIdx.x];
  const int r = static_cast<int>(blockIdx.y);
  if (r >= unit.num_rows) return;
  const int channel = static_cast<int>(blockIdx.z) * kGroupWarps * 32 + place;
  const bool valid = channel < params.head_dim;
  const int64_t first = static_cast<int64_t>(unit.first_partial) * params.max_rows + r;
  const int64_t stride = static_cast<int64_t>(params.max_rows) * params.head_dim;
  const float* partial = params.partial_sums + first * params.head_dim + (valid ? channel : 0);
  const QueryRow at = query_row(params, unit.first_row, unit.kv_head, r);
  ptx::wait_prerequisites();

  float value[kBatch];
  const auto load = [&](int begin) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = (begin + b) * kGroups + group;
      value[b] = i < unit.num_partials ? __ldcg(partial + i * stride) : 0.0f;
    }
  };
  load(0);
  for (int i = static_cast<int>(threadIdx.x); i < unit.num_partials; i += kCombineThreads)
    states[i] = __ldcg(params.partial_states + first + static_cast<int64_t>(i) * params.max_rows);
  __syncthreads();
  const float2 state = merge_states(states, unit.num_partials, lane);
  float sum = 0.0f;
  for (int begin = 0; begin * kGroups < unit.num_partials; begin += kBatch) {
    if (begin > 0) load(begin);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = (begin + b) * kGroups + group;
      if (i < unit.num_partials) sum = fmaf(value[b], ptx::exp2_approx(states[i].x - state.x), sum);
    }
  }
  if constexpr (kGroups > 1) {
    sums[group][place] = sum;
    __syncthreads();
    if (group != 0) return;
#pragma unroll
    for (int g = 1; g < kGroups; ++g) sum += sums[g][place];
  }
  const float scale = finish_row(params, at, state, channel == 0);
  if (valid)
    params.out[(at.row * params.num_query_heads + at.head) * params.head_dim + channel] =
        sum * scale;
}

// A block merges one query row of one unit whose stored values are transformed.
__global__ void __launch_bounds__(kCombineThreads)
    combine_values_kernel(const __grid_constant__ DecodeParams params,
                          const __grid_constant__ ValueTransform transform) {
  __shared__ float2 states[kMaxCombined];
  __shared__ float stored[kMaxRotated];
  constexpr int kChannels = kMaxRotated / kCombineThreads;  // of a thread, at most
  const int thread = static_cast<int>(threadIdx.x);
  ptx::launch_dependents();
  const SplitUnit unit = params.split_units[blockIdx.x];
  const int r = static_cast<int>(blockIdx.y);
  if (r >= unit.num_rows) return;
  const int64_t first = static_cast<int64_t>(unit.first_partial) * params.max_rows + r;
  const int64_t stride = static_cast<int64_t>(params.max_rows) * params.head_dim;
  const QueryRow at = query_row(params, unit.first_row, unit.kv_head, r);
  ptx::wait_prerequisites();
  for (int i = thread; i < unit.num_partials; i += kCombineThreads)
    states[i] = __ldcg(params.partial_states + first + static_cast<int64_t>(i) * params.max_rows);
  __syncthreads();
  const float2 state = merge_states(states, unit.num_partials, thread % 32);
  const auto factor = [&](int i) { return ptx::exp2_approx(states[i].x - state.x); };
  float weight = 0.0f;  // of stored pages together
  for (int i = unit.first_stored; i < unit.end_stored; ++i)
    weight = fmaf(states[i].y, factor(i), weight);
  float plain[kChannels];
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    const int channel = thread + k * kCombineThreads;
    plain[k] = 0.0f;
    if (channel >= params.head_dim) continue;
    const float* partial = params.partial_sums + first * params.head_dim + channel;
    const auto sum_of = [&](int begin, int end, float sum) {
      for (int i = begin; i < end; ++i) sum = fmaf(__ldcg(partial + i * stride), factor(i), sum);
      return sum;
    };
    plain[k] = sum_of(0, unit.first_stored, 0.0f);
    plain[k] = sum_of(unit.end_stored, unit.num_partials, plain[k]);
    float sum = sum_of(unit.first_stored, unit.end_stored, 0.0f);
    if (transform.bias != nullptr)
      sum = fmaf(weight, transform.bias[unit.kv_head * params.head_dim + channel], sum);
    stored[channel] = sum;
  }
  rotate_shared(stored, params.head_dim, transform.rotation_block, transform.rotation_scale);
  const float scale = finish_row(params, at, state, thread == 0);
  float* out = params.out + (at.row * params.num_query_heads + at.head) * params.head_dim;
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    const int channel = thread + k * kCombineThreads;
    if (channel < params.head_dim) out[channel] = (stored[channel] + plain[k]) * scale;
  }
}

}  // namespace

CombineLaunch combine_values_launch(int num_units, int num_rows) {
  CombineLaunch launch;
  launch.kernel = reinterpret_cast<const void*>(&combine_values_kernel);
  launch.grid = dim3(static_cast<unsigned>(num_units), static_cast<unsigned>(num_rows));
  return launch;
}

CombineLaunch combine_launch(int num_units, int num_rows, int most_partials, int head_dim) {
  const int groups = most_partials <= kBatch ? 1 : most_partials <= 2 * kBatch ? 2 : 4;
  const int channels = kCombineThreads / groups;
  CombineLaunch launch;
  launch.kernel = reinterpret_cast<const void*>(groups == 1   ? &combine_kernel<1>
                                                : groups == 2 ? &combine_kernel<2>
                                                              : &combine_kernel<4>);
  launch.grid = dim3(static_cast<unsigned>(num_units), static_cast<unsigned>(num_rows),
                     static_cast<unsigned>((head_dim + channels - 1) / channels));
  return launch;
}

}  // namespace kvant::backend::cuda
