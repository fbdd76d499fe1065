// Merges the partial results of units that several blocks shared, in the order of their pages.
#include "kvant/backend/cuda/decode/combine.h"
#include "kvant/backend/cuda/decode/rotate_shared.cuh"
#include "kvant/backend/cuda/decode/shape.cuh"

namespace kvant::backend::cuda {
namespace {

constexpr int kWarps = kCombineThreads / 32;

// Merged state of all partials, known to every lane: each has those from `lane` on, 32 apart.
__device__ __forceinline__ float2 merge_states(const float2* states, int count, int lane) {
  float2 merged = {kNoReference, 0.0f};
  for (int i = lane; i < count; i += 32) merged.x = fmaxf(merged.x, states[i].x);
  merged.x = ptx::warp_max(merged.x);
  for (int i = lane; i < count; i += 32)
    merged.y = fmaf(states[i].y, ptx::exp2_approx(states[i].x - merged.x), merged.y);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    merged.y += __shfl_xor_sync(~0u, merged.y, distance);
  return merged;
}

// How the four warps of a block share its work: a lane has kVec channels, kGroupWarps warps make a
// row's channels (or a part of them), kGroups such groups take turns with the partials, and what
// warps are left have other rows. So all of a row's loads are on their way at once, up to 24, and
// where units have few partials there are few blocks: kernels behind this one begin when the last
// of them has, beside decode blocks there is room for one on each multiprocessor.
template <int kVecs, int kNumGroups, int kWarpsOfGroup>
struct CombineShape {
  static constexpr int kVec = kVecs;
  static constexpr int kGroups = kNumGroups;
  static constexpr int kGroupWarps = kWarpsOfGroup;
  static constexpr int kRows = kWarps / (kGroups * kGroupWarps);
  static constexpr int kChannels = kGroupWarps * 32 * kVec;
  static constexpr int kBatch = kVec == 4 ? 3 : 6;  // loads of a lane in flight
};
// By the most partials of a unit.
using Merge3 = CombineShape<4, 1, 1>;
using Merge6 = CombineShape<2, 1, 2>;
using Merge12 = CombineShape<1, 2, 2>;
using MergeMany = CombineShape<1, 4, 1>;

template <int kVec>
struct Channels {
  float x[kVec];
};
template <int kVec>
__device__ __forceinline__ Channels<kVec> load_channels(const float* from) {
  if constexpr (kVec == 4) {
    const float4 v = __ldcg(reinterpret_cast<const float4*>(from));
    return {{v.x, v.y, v.z, v.w}};
  } else if constexpr (kVec == 2) {
    const float2 v = __ldcg(reinterpret_cast<const float2*>(from));
    return {{v.x, v.y}};
  } else {
    return {{__ldcg(from)}};
  }
}
template <int kVec>
__device__ __forceinline__ void store_channels(float* to, const Channels<kVec>& value) {
  if constexpr (kVec == 4) {
    *reinterpret_cast<float4*>(to) = make_float4(value.x[0], value.x[1], value.x[2], value.x[3]);
  } else if constexpr (kVec == 2) {
    *reinterpret_cast<float2*>(to) = make_float2(value.x[0], value.x[1]);
  } else {
    *to = value.x[0];
  }
}

template <typename Shape>
__global__ void __launch_bounds__(kCombineThreads, ptx::kThreadsOfSm / kCombineThreads)
    combine_kernel(const __grid_constant__ DecodeParams params) {
  constexpr int kVec = Shape::kVec;
  constexpr int kBatch = Shape::kBatch;
  constexpr int kGroups = Shape::kGroups;
  __shared__ float2 states[kGroups > 1 ? kMaxCombined : 1];
  __shared__ Channels<kVec> sums[kGroups][Shape::kGroupWarps * 32];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int group = warp / Shape::kGroupWarps % kGroups;
  const int place = warp % Shape::kGroupWarps * 32 + lane;
  ptx::launch_dependents();
  const SplitUnit unit = params.split_units[blockIdx.x];
  const int r = static_cast<int>(blockIdx.y) * Shape::kRows + warp / (kGroups * Shape::kGroupWarps);
  if (r >= unit.num_rows) return;  // with several groups the block has one row
  const int channel = static_cast<int>(blockIdx.z) * Shape::kChannels + place * kVec;
  const bool valid = channel < params.head_dim;
  // Registers are short: places are 32-bit numbers of values, of which there are far fewer.
  const auto max_rows = static_cast<unsigned>(params.max_rows);
  const auto head_dim = static_cast<unsigned>(params.head_dim);
  const auto first =
      static_cast<unsigned>(unit.first_partial) * max_rows + static_cast<unsigned>(r);
  const unsigned from = first * head_dim + static_cast<unsigned>(valid ? channel : 0);
  ptx::wait_prerequisites();

  Channels<kVec> value[kBatch];
  const auto load = [&](int begin) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = (begin + b) * kGroups + group;
      if (i < unit.num_partials)
        value[b] = load_channels<kVec>(params.partial_sums + from +
                                       static_cast<unsigned>(i) * max_rows * head_dim);
    }
  };
  const auto state_of = [&](int i) {
    return __ldcg(params.partial_states + first + static_cast<unsigned>(i) * max_rows);
  };
  load(0);
  float2 state;
  float own = 0.0f;  // factor of the partial of this lane's number
  if constexpr (kGroups > 1) {
    for (int i = static_cast<int>(threadIdx.x); i < unit.num_partials; i += kCombineThreads)
      states[i] = state_of(i);
    __syncthreads();
    state = merge_states(states, unit.num_partials, lane);
  } else {
    const bool has_one = lane < unit.num_partials;
    const float2 mine = has_one ? state_of(lane) : make_float2(kNoReference, 0.0f);
    state = merge_states(&mine, has_one ? 1 : 0, 0);
    own = ptx::exp2_approx(mine.x - state.x);
  }
  Channels<kVec> sum = {};
  for (int begin = 0; begin * kGroups < unit.num_partials; begin += kBatch) {
    if (begin > 0) load(begin);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = (begin + b) * kGroups + group;
      if (i >= unit.num_partials) break;
      const float factor =
          kGroups > 1 ? ptx::exp2_approx(states[i].x - state.x) : __shfl_sync(~0u, own, i);
#pragma unroll
      for (int c = 0; c < kVec; ++c) sum.x[c] = fmaf(value[b].x[c], factor, sum.x[c]);
    }
  }
  if constexpr (kGroups > 1) {
    sums[group][place] = sum;
    __syncthreads();
    if (group != 0) return;
#pragma unroll
    for (int g = 1; g < kGroups; ++g) {
#pragma unroll
      for (int c = 0; c < kVec; ++c) sum.x[c] += sums[g][place].x[c];
    }
  }
  const QueryRow at = query_row(params, unit.first_row, unit.kv_head, r);
  const float scale = finish_row(params, at, state, channel == 0);
#pragma unroll
  for (int c = 0; c < kVec; ++c) sum.x[c] *= scale;
  if (valid)
    store_channels(
        params.out + (at.row * params.num_query_heads + at.head) * params.head_dim + channel, sum);
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

namespace {

// Whether so many partials are on their way at once.
template <typename Shape>
constexpr bool loads_at_once(int partials) {
  return partials <= Shape::kBatch * Shape::kGroups;
}

template <typename Shape>
CombineLaunch launch_of(int num_units, int num_rows, int head_dim) {
  const int rows = (num_rows + Shape::kRows - 1) / Shape::kRows;
  const int parts = (head_dim + Shape::kChannels - 1) / Shape::kChannels;
  CombineLaunch launch;
  launch.kernel = reinterpret_cast<const void*>(&combine_kernel<Shape>);
  launch.grid = dim3(static_cast<unsigned>(num_units), static_cast<unsigned>(rows),
                     static_cast<unsigned>(parts));
  return launch;
}

}  // namespace

CombineLaunch combine_launch(int num_units, int num_rows, int most_partials, int head_dim) {
  if (loads_at_once<Merge3>(most_partials)) return launch_of<Merge3>(num_units, num_rows, head_dim);
  if (loads_at_once<Merge6>(most_partials)) return launch_of<Merge6>(num_units, num_rows, head_dim);
  if (loads_at_once<Merge12>(most_partials))
    return launch_of<Merge12>(num_units, num_rows, head_dim);
  return launch_of<MergeMany>(num_units, num_rows, head_dim);
}

}  // namespace kvant::backend::cuda
