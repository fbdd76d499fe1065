// Merges the partial results of units that several workers shared, in the order of their pages.
#include "kvant/backend/cuda/decode/combine.h"
#include "kvant/backend/cuda/decode/shape.cuh"

namespace kvant::backend::cuda {
namespace {

constexpr int kWarps = kCombineThreads / 32;

// Up to 32 partials: a warp merges 32 channels, lane i knows the state of partial i.
__device__ __forceinline__ void merge_few(const DecodeParams& params, const SplitUnit& unit, int r,
                                          int warp, int lane) {
  constexpr int kBatch = 6;  // loads in flight
  const int64_t first = static_cast<int64_t>(unit.first_partial) * params.max_rows + r;
  const QueryRow at = query_row(params, unit.first_row, unit.kv_head, r);
  float* out = params.out + (at.row * params.num_query_heads + at.head) * params.head_dim;
  for (int channel = warp * 32 + lane; channel - lane < params.head_dim; channel += kWarps * 32) {
    const bool valid = channel < params.head_dim;
    const float* partial = params.partial_sums + first * params.head_dim + (valid ? channel : 0);
    const int64_t stride = static_cast<int64_t>(params.max_rows) * params.head_dim;
    float value[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      value[b] = b < unit.num_partials ? __ldcg(partial + b * stride) : 0.0f;
    float2 state = {kNoReference, 0.0f};
    if (lane < unit.num_partials)
      state = __ldcg(params.partial_states + first + lane * params.max_rows);
    float reference = state.x;
    for (int distance = 16; distance > 0; distance /= 2)
      reference = fmaxf(reference, __shfl_xor_sync(~0u, reference, distance));
    const float factor = ptx::exp2_approx(state.x - reference);
    float weight = state.y * factor;
    for (int distance = 16; distance > 0; distance /= 2)
      weight += __shfl_xor_sync(~0u, weight, distance);
    float sum = 0.0f;
    for (int begin = 0; begin < unit.num_partials; begin += kBatch) {
      float now[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        now[b] = value[b];
        if (begin + kBatch + b < unit.num_partials)
          value[b] = __ldcg(partial + (begin + kBatch + b) * stride);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const float f = __shfl_sync(~0u, factor, (begin + b) % 32);
        if (begin + b < unit.num_partials) sum = fmaf(now[b], f, sum);
      }
    }
    const float scale = finish_row(params, at, {reference, weight}, valid && channel == 0);
    if (valid) out[channel] = sum * scale;
  }
}

// A block merges one query row of one unit. So few registers and threads that it fits beside a
// decode block of the next layer.
__global__ void __launch_bounds__(kCombineThreads, 16)
    combine_kernel(const __grid_constant__ DecodeParams params) {
  __shared__ float4 sums[kWarps][64];
  __shared__ float2 states[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  ptx::launch_dependents();
  const SplitUnit unit = params.split_units[blockIdx.x];
  const int r = static_cast<int>(blockIdx.y);
  if (r >= unit.num_rows) return;
  ptx::wait_prerequisites();
  if (unit.num_partials <= 32) {
    merge_few(params, unit, r, warp, lane);
    return;
  }
  const int64_t first = static_cast<int64_t>(unit.first_partial) * params.max_rows + r;
  const float2* partial_states = params.partial_states + first;
  const float4* partial_sums =
      reinterpret_cast<const float4*>(params.partial_sums + first * params.head_dim);
  const int quads = params.head_dim / 4;
  const int row_stride = params.max_rows * quads;

  for (int quad = lane; quad < quads; quad += 32) {
    float2 state = {kNoReference, 0.0f};
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 2
    for (int i = warp; i < unit.num_partials; i += kWarps) {
      const float2 next = __ldcg(partial_states + i * params.max_rows);
      const float4 x = __ldcg(partial_sums + static_cast<int64_t>(i) * row_stride + quad);
      const float reference = fmaxf(state.x, next.x);
      const float before = ptx::exp2_approx(state.x - reference);
      const float factor = ptx::exp2_approx(next.x - reference);
      state = {reference, fmaf(next.y, factor, state.y * before)};
      sum.x = fmaf(x.x, factor, sum.x * before), sum.y = fmaf(x.y, factor, sum.y * before);
      sum.z = fmaf(x.z, factor, sum.z * before), sum.w = fmaf(x.w, factor, sum.w * before);
    }
    sums[warp][quad] = sum;
    if (quad == lane && lane == 0) states[warp] = state;
  }
  __syncthreads();

  const QueryRow at = query_row(params, unit.first_row, unit.kv_head, r);
  float2 state = {kNoReference, 0.0f};
  for (const float2& other : states) state.x = fmaxf(state.x, other.x);
  for (const float2& other : states)
    state.y = fmaf(other.y, ptx::exp2_approx(other.x - state.x), state.y);
  const float scale = finish_row(params, at, state, threadIdx.x == 0);
  float* out = params.out + (at.row * params.num_query_heads + at.head) * params.head_dim;
  const float* values = reinterpret_cast<const float*>(&sums[0][0]);
  for (int channel = static_cast<int>(threadIdx.x); channel < params.head_dim;
       channel += kCombineThreads) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w)
      sum = fmaf(values[w * 256 + channel], ptx::exp2_approx(states[w].x - state.x), sum);
    out[channel] = sum * scale;
  }
}

}  // namespace

const void* combine_function() {
  return reinterpret_cast<const void*>(&combine_kernel);
}

}  // namespace kvant::backend::cuda
