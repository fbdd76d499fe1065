// The kernels that append.
#pragma once

#include "kvant/backend/cuda/append.h"
#include "kvant/backend/cuda/dense/rotate.cuh"
#include "kvant/backend/cuda/quant/append_rows.cuh"
#include "kvant/backend/cuda/quant/close_general.cuh"

namespace kvant::backend::cuda::quant {

inline constexpr int kAppendThreads = 128;

__global__ void __launch_bounds__(kAppendThreads)
    append_rows_kernel(const __grid_constant__ AppendRowsArgs args) {
  ptx::launch_dependents();
  ptx::wait_prerequisites();
  const int warp = static_cast<int>((blockIdx.x * kAppendThreads + threadIdx.x) / kLanes);
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const bool values = warp % 2 == 1;
  const int unit = warp / 2;
  if (unit >= args.num_items * args.num_kv_heads) return;
  const AppendItem item = args.items[unit / args.num_kv_heads];
  const RowRun run = find_run(args, item, unit % args.num_kv_heads, values);
  if (values) {
    append_run<true, false>(args, run, lane, nullptr);
  } else {
    append_run<false, false>(args, run, lane, nullptr);
  }
}

// Rotates one head's vector in place; a warp.
__device__ __forceinline__ void rotate_head(float* x, const float* table, int rotary_dim,
                                            int lane) {
  const int half = rotary_dim / 2;
  for (int i = lane; i < half; i += kLanes) rotate_pair(x, table, half, i);
}

// The warps of append_rows_kernel, keys rotated first, and a warp for each query head.
__global__ void __launch_bounds__(kAppendThreads)
    rotate_append_kernel(const __grid_constant__ AppendRowsArgs args,
                         const __grid_constant__ AppendRotation rotation) {
  ptx::launch_dependents();
  const int warp = static_cast<int>((blockIdx.x * kAppendThreads + threadIdx.x) / kLanes);
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const bool values = warp % 2 == 1;
  const int unit = warp / 2;
  const int num_units = args.num_items * args.num_kv_heads;
  if (unit >= num_units) {
    const int head = warp - 2 * num_units;
    ptx::wait_prerequisites();
    if (head >= rotation.num_rows * rotation.num_query_heads) return;
    rotate_head(rotation.q + static_cast<int64_t>(head) * args.head_dim,
                rotation.table + head / rotation.num_query_heads * rotation.rotary_dim,
                rotation.rotary_dim, lane);
    return;
  }
  const AppendItem item = args.items[unit / args.num_kv_heads];
  const int kv_head = unit % args.num_kv_heads;
  const RowRun run = find_run(args, item, kv_head, values);
  ptx::wait_prerequisites();
  if (values) {
    append_run<true, false>(args, run, lane, nullptr);
    return;
  }
  if (rotation.rotate_keys) {
    for (int token = 0; token < item.count; ++token) {
      const int64_t row = item.row + token;
      rotate_head(rotation.k + (row * args.num_kv_heads + kv_head) * args.head_dim,
                  rotation.table + row * rotation.rotary_dim, rotation.rotary_dim, lane);
    }
    __syncwarp();
  }
  append_run<false, false>(args, run, lane, nullptr);
}

// ---- +strict ----

template <typename F>
__device__ void round_row(const SideMap& map, bool four_over_six, float g, float* x,
                          float* rounded) {
  const int length = map.num_blocks == 0 ? kTile : map.block_size;
  for (int first = static_cast<int>(threadIdx.x) * length; first < map.head_dim;
       first += static_cast<int>(blockDim.x) * length) {
    const int n = min(length, map.head_dim - first);
    const uint32_t scale = scale_of_block<F>(x + first, n, g, four_over_six);
    for (int i = first; i < first + n; ++i)
      rounded[i] = F::decode(F::encode(x[i], scale, g), scale, g);
  }
}

// Rounds the row in `x` through the codec of its side; a warp.
__device__ inline void round_strict(const CloseSide& side, const DeviceSideParams& params, float* x,
                                    float* rounded) {
  const int d = side.map.head_dim;
  const bool smooth = side.format.smooth && params.smooth != nullptr;
  const bool bias = side.format.bias && params.bias != nullptr;
  for (int c = threadIdx.x; c < d; c += blockDim.x) {
    if (smooth) x[c] = x[c] / params.smooth[c];
  }
  if (side.format.rotate) rotate_rows(x, 1, d, side.rotation_scale);
  for (int c = threadIdx.x; c < d; c += blockDim.x) {
    if (bias) x[c] = __fadd_rn(x[c], -params.bias[c]);
  }
  __syncthreads();
  switch (side.map.base) {
#define KVANT_FORMAT(number, Type, header)                                                  \
  case formats::FormatId::k##Type:                                                          \
    if constexpr (formats::Type::kInfo.axis != formats::BlockAxis::kToken)                  \
      round_row<formats::Type>(side.map, side.format.four_over_six, params.global_scale, x, \
                               rounded);                                                    \
    break;
#include "kvant/formats/formats.def"
#undef KVANT_FORMAT
  }
  __syncthreads();
  for (int c = threadIdx.x; c < d; c += blockDim.x) {
    if (bias) rounded[c] = __fadd_rn(rounded[c], params.bias[c]);
  }
  if (side.format.rotate) rotate_rows(rounded, 1, d, side.rotation_scale);
  __syncthreads();
  for (int c = threadIdx.x; c < d; c += blockDim.x) {
    if (smooth) rounded[c] = __fmul_rn(rounded[c], params.smooth[c]);
  }
  __syncthreads();
}

// A warp per run, head and side, token by token: for comparisons, not for speed.
__global__ void __launch_bounds__(kLanes)
    append_strict_kernel(const __grid_constant__ AppendRowsArgs args) {
  ptx::launch_dependents();
  ptx::wait_prerequisites();
  __shared__ __align__(16) float x[512];
  __shared__ __align__(16) float rounded[512];
  const bool values = blockIdx.x % 2 == 1;
  const int unit = static_cast<int>(blockIdx.x / 2);
  const int lane = static_cast<int>(threadIdx.x);
  const AppendItem item = args.items[unit / args.num_kv_heads];
  const RowRun run = find_run(args, item, unit % args.num_kv_heads, values);
  const CloseSide& side = args.sides[values ? 1 : 0];
  int non_finite = 0;
  for (int token = 0; token < run.count; ++token) {
    for (int c = lane; c < args.head_dim; c += kLanes) {
      x[c] = run.rows[token * run.stride + c];
      non_finite += is_non_finite_bf16(x[c]);
    }
    __syncthreads();
    round_strict(side, side.params[unit % args.num_kv_heads], x, rounded);
    append_some({rounded, 0, run.token + token, 1, run.codes}, values, args.head_dim, lane);
    __syncthreads();
  }
  non_finite = __reduce_add_sync(0xffffffffu, non_finite);
  if (non_finite > 0 && lane == 0)
    atomicAdd(&args.counters->non_finite, static_cast<unsigned long long>(non_finite));
}

}  // namespace kvant::backend::cuda::quant
