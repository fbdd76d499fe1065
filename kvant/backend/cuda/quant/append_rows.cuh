// Writing new rows into BF16 pages (`sm90` order), a warp per run of tokens, KV head and side.
#pragma once

#include "kvant/backend/cuda/append.h"
#include "kvant/backend/cuda/dense/rotate.cuh"
#include "kvant/backend/cuda/quant/close_general.cuh"
#include "kvant/backend/cuda/quant/numbers.cuh"

namespace kvant::backend::cuda::quant {

// Values that BF16 holds as Inf or NaN.
__device__ __forceinline__ bool is_non_finite_bf16(float x) {
  return (as_bits(x) & 0x7fffffffu) >= 0x7f7f8000u;
}

// One run: where its rows start and the codes of its side of the unit.
struct RowRun {
  const float* rows;  // of this head: the next token is `stride` values on
  int64_t stride;
  int token;
  int count;
  uint8_t* codes;
};

__device__ __forceinline__ RowRun find_run(const AppendRowsArgs& args, const AppendItem& item,
                                           int head, bool values) {
  const int64_t stride = static_cast<int64_t>(args.num_kv_heads) * args.head_dim;
  std::byte* page = args.kinds[item.kind].unit(item.slot, head);
  return {args.rows[values ? 1 : 0] + item.row * stride + head * args.head_dim, stride, item.token,
          item.count,
          reinterpret_cast<uint8_t*>(page) +
              (values ? int64_t{args.page_tokens} * args.head_dim * 2 : 0)};
}

// Half-word index of an element of a BF16 side.
__device__ __forceinline__ int bf16_index(bool values, int head_dim, int token, int channel) {
  const Fragment at = fragment_of(values, token, channel);
  return ((at.tile * (head_dim / kTile) + at.step) * kLanes * 4 + at.lane * 4 + at.reg) * 2 +
         at.parity;
}

// Some tokens of a tile, element by element. Returns how many are not finite (of this lane).
__device__ __noinline__ int append_some(RowRun run, bool values, int head_dim, int lane) {
  int non_finite = 0;
  auto* halves = reinterpret_cast<uint16_t*>(run.codes);
  const int quads = head_dim / 4;
  for (int i = lane; i < run.count * quads; i += kLanes) {
    const int token = i / quads;
    const int channel = i % quads * 4;
    const float4 x = *reinterpret_cast<const float4*>(run.rows + token * run.stride + channel);
    non_finite += is_non_finite_bf16(x.x) + is_non_finite_bf16(x.y) + is_non_finite_bf16(x.z) +
                  is_non_finite_bf16(x.w);
    const uint16_t h[4] = {to_bf16(x.x), to_bf16(x.y), to_bf16(x.z), to_bf16(x.w)};
    const int at = bf16_index(values, head_dim, run.token + token, channel);
    if (values) {  // the next channel is four lanes on
      for (int c = 0; c < 4; ++c) halves[at + c * 32] = h[c];
    } else {
      *reinterpret_cast<uint32_t*>(halves + at) = h[0] | static_cast<uint32_t>(h[1]) << 16;
      *reinterpret_cast<uint32_t*>(halves + at + 8) = h[2] | static_cast<uint32_t>(h[3]) << 16;
    }
  }
  return non_finite;
}

// A lane's words of a k-step of a whole tile.
template <bool kValues>
__device__ __forceinline__ uint4 load_fragment(const RowRun& run, int step, int lane) {
  const int g = lane / 4;
  const int t = lane % 4;
  const float* from = run.rows + step * kTile;
  if constexpr (kValues) {
    const float* at = from + 2 * t * run.stride + g;
    const float* next = at + 8 * run.stride;
    return make_uint4(ptx::bf16x2_of_f32(at[0], at[run.stride]),
                      ptx::bf16x2_of_f32(at[8], at[run.stride + 8]),
                      ptx::bf16x2_of_f32(next[0], next[run.stride]),
                      ptx::bf16x2_of_f32(next[8], next[run.stride + 8]));
  } else {
    const float* at = from + g * run.stride + 2 * t;
    const float2 a = *reinterpret_cast<const float2*>(at);
    const float2 b = *reinterpret_cast<const float2*>(at + 8 * run.stride);
    const float2 c = *reinterpret_cast<const float2*>(at + 8);
    const float2 d = *reinterpret_cast<const float2*>(at + 8 * run.stride + 8);
    return make_uint4(ptx::bf16x2_of_f32(a.x, a.y), ptx::bf16x2_of_f32(b.x, b.y),
                      ptx::bf16x2_of_f32(c.x, c.y), ptx::bf16x2_of_f32(d.x, d.y));
  }
}

// All 16 tokens of a tile. Returns whether something is not finite: NaNs are then to be written
// again, with the payload that to_bf16 keeps.
template <bool kValues>
__device__ __forceinline__ bool append_tile(const RowRun& run, int head_dim, int lane,
                                            uint4* shared) {
  const int num_steps = head_dim / kTile;
  const int first = run.token / kTile * num_steps;
  auto* out = reinterpret_cast<uint4*>(run.codes) + first * kLanes + lane;
  uint32_t largest = 0;
#pragma unroll 4
  for (int step = 0; step < num_steps; ++step) {
    const uint4 words = load_fragment<kValues>(run, step, lane);
    largest = __vmaxu2(largest, __vmaxu2(__vmaxu2(words.x & 0x7fff7fffu, words.y & 0x7fff7fffu),
                                         __vmaxu2(words.z & 0x7fff7fffu, words.w & 0x7fff7fffu)));
    out[step * kLanes] = words;
    if (shared != nullptr) shared[source_chunk(first + step, lane)] = words;
  }
  return (largest & 0xffffu) >= 0x7f80u || largest >> 16 >= 0x7f80u;
}

inline constexpr int kAppendThreads = 128;

// A warp. `shared`: see append_tile; only for whole tiles.
template <bool kValues>
__device__ __forceinline__ void append_run(const AppendRowsArgs& args, const RowRun& run, int lane,
                                           uint4* shared) {
  if (run.count == kTile) {
    const bool bad = append_tile<kValues>(run, args.head_dim, lane, shared);
    if (!__any_sync(0xffffffffu, bad)) return;
    __syncwarp();
  }
  const int non_finite =
      __reduce_add_sync(0xffffffffu, append_some(run, kValues, args.head_dim, lane));
  if (non_finite > 0 && lane == 0)
    atomicAdd(&args.counters->non_finite, static_cast<unsigned long long>(non_finite));
  if (shared == nullptr) return;
  __syncwarp();
  const int num_steps = args.head_dim / kTile;
  const int first = run.token / kTile * num_steps;
  const auto* from = reinterpret_cast<const uint4*>(run.codes) + first * kLanes + lane;
  for (int step = 0; step < num_steps; ++step)
    shared[source_chunk(first + step, lane)] = __ldcg(from + step * kLanes);
}

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
    append_run<true>(args, run, lane, nullptr);
  } else {
    append_run<false>(args, run, lane, nullptr);
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
    append_run<true>(args, run, lane, nullptr);
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
  append_run<false>(args, run, lane, nullptr);
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
