// Writing new rows into BF16 pages (`sm90` order), a warp per run of tokens, KV head and side.
#pragma once

#include "kvant/backend/cuda/quant/close_args.cuh"
#include "kvant/backend/cuda/quant/numbers.cuh"
#include "kvant/base/small_floats.h"

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
__device__ __noinline__ inline int append_some(RowRun run, bool values, int head_dim, int lane) {
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

__device__ __forceinline__ uint32_t largest_magnitudes(uint32_t largest, const uint4& words) {
  return __vmaxu2(largest, __vmaxu2(__vmaxu2(words.x & 0x7fff7fffu, words.y & 0x7fff7fffu),
                                    __vmaxu2(words.z & 0x7fff7fffu, words.w & 0x7fff7fffu)));
}

// Where a word of a fragment lies in shared memory.
__device__ __forceinline__ uint32_t* source_word(uint4* shared, int fragment, int lane, int reg) {
  return reinterpret_cast<uint32_t*>(shared + source_chunk(fragment, lane)) + reg;
}

// All 16 tokens of a tile to shared memory, whole rows at a time: a lane has four channels of some
// tokens, and what shares a word or two words of a fragment is in the same lane.
template <bool kValues>
__device__ __forceinline__ void stage_tile(const RowRun& run, int head_dim, int first_fragment,
                                           int lane, uint4* shared) {
  for (int channel = 4 * lane; channel < head_dim; channel += 4 * kLanes) {
    const int fragment = first_fragment + channel / kTile;
    const int in_step = channel % kTile;
    const float* from = run.rows + channel;
    const auto row = [&](int token) {
      return __ldg(reinterpret_cast<const float4*>(from + token * run.stride));
    };
#pragma unroll 2
    for (int n = 0; n < kTile / 4; ++n) {
      if constexpr (kValues) {  // a word: tokens 2t and 2t + 1 of a channel
        const int t = n;
        const float4 rows[4] = {row(2 * t), row(2 * t + 1), row(2 * t + 8), row(2 * t + 9)};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float4& a = rows[2 * half];
          const float4& b = rows[2 * half + 1];
          const uint32_t words[4] = {ptx::bf16x2_of_f32(a.x, b.x), ptx::bf16x2_of_f32(a.y, b.y),
                                     ptx::bf16x2_of_f32(a.z, b.z), ptx::bf16x2_of_f32(a.w, b.w)};
#pragma unroll
          for (int c = 0; c < 4; ++c)
            *source_word(shared, fragment, 4 * (in_step % 8 + c) + t, 2 * half + in_step / 8) =
                words[c];
        }
      } else {  // a word: channels 2t and 2t + 1; the next one is of the token eight on
#pragma unroll
        for (int g = 2 * n; g < 2 * n + 2; ++g) {
          const float4 a = row(g);
          const float4 b = row(g + 8);
          const int place = 4 * g + in_step % 8 / 2;
          const int reg = in_step / 8 * 2;
          *reinterpret_cast<uint2*>(source_word(shared, fragment, place, reg)) =
              make_uint2(ptx::bf16x2_of_f32(a.x, a.y), ptx::bf16x2_of_f32(b.x, b.y));
          *reinterpret_cast<uint2*>(source_word(shared, fragment, place + 1, reg)) =
              make_uint2(ptx::bf16x2_of_f32(a.z, a.w), ptx::bf16x2_of_f32(b.z, b.w));
        }
      }
    }
  }
  __syncwarp();
}

// All 16 tokens of a tile, with kStaged to shared memory, too. Returns whether something is not
// finite: NaNs are then to be written again, with the payload that to_bf16 keeps.
template <bool kValues, bool kStaged>
__device__ __forceinline__ bool append_tile(const RowRun& run, int head_dim, int lane,
                                            uint4* shared) {
  const int num_steps = head_dim / kTile;
  const int first = run.token / kTile * num_steps;
  auto* out = reinterpret_cast<uint4*>(run.codes) + first * kLanes + lane;
  uint32_t largest = 0;
  if constexpr (kStaged) stage_tile<kValues>(run, head_dim, first, lane, shared);
#pragma unroll 4
  for (int step = 0; step < num_steps; ++step) {
    const uint4 words = kStaged ? shared[source_chunk(first + step, lane)]
                                : load_fragment<kValues>(run, step, lane);
    largest = largest_magnitudes(largest, words);
    out[step * kLanes] = words;
  }
  return (largest & 0xffffu) >= 0x7f80u || largest >> 16 >= 0x7f80u;
}

// A warp. With kStaged also to `shared`, and the run is a whole tile.
template <bool kValues, bool kStaged>
__device__ __forceinline__ void append_run(const AppendRowsArgs& args, const RowRun& run, int lane,
                                           uint4* shared) {
  if (run.count == kTile) {
    const bool bad = append_tile<kValues, kStaged>(run, args.head_dim, lane, shared);
    if (!__any_sync(0xffffffffu, bad)) return;
    __syncwarp();
  }
  const int non_finite =
      __reduce_add_sync(0xffffffffu, append_some(run, kValues, args.head_dim, lane));
  if (non_finite > 0 && lane == 0)
    atomicAdd(&args.counters->non_finite, static_cast<unsigned long long>(non_finite));
  if constexpr (!kStaged) return;
  __syncwarp();
  const int num_steps = args.head_dim / kTile;
  const int first = run.token / kTile * num_steps;
  const auto* from = reinterpret_cast<const uint4*>(run.codes) + first * kLanes + lane;
  for (int step = 0; step < num_steps; ++step)
    shared[source_chunk(first + step, lane)] = __ldcg(from + step * kLanes);
}

}  // namespace kvant::backend::cuda::quant
