// What a warpgroup of prefill attention does with its 64 rows besides matrix products: queries in,
// masks, softmax, outputs. A thread has two rows, (thread % 128) / 32 * 16 + lane / 4 and 8
// further, and in both the columns 8 j + 2 (lane % 4) and the next: the accumulator layout of wgmma
// and of mma.m16n8k16.
#pragma once

#include "kvant/backend/cuda/matrices.cuh"
#include "kvant/backend/cuda/prefill/attention_shape.cuh"

namespace kvant::backend::cuda {

// 64 rows of queries on their way to shared memory as FP16: four channels of a row at a time, those
// of a row by neighbours.
template <int kHeadDim>
struct QueryChunks {
  static constexpr int kOfRow = kHeadDim / 4;
  static constexpr int kPerThread = 64 * kOfRow / 128;
  static constexpr int kRowsOfWarp = 32 / kOfRow;  // at the same time, if whole ones
};

// A thread's chunks [first, first + kCount). Rows without a token get those of the last one.
template <int kHeadDim, int kCount>
__device__ __forceinline__ void request_queries(const PrefillKernelArgs& args,
                                                const QueryTile& tile, int kv_head, int warpgroup,
                                                int first, float4 (&x)[kCount]) {
  using Chunks = QueryChunks<kHeadDim>;
  const int64_t tile_row = static_cast<int64_t>(tile.row) * args.num_query_heads;
  const float* q = args.q + (tile_row + max(kv_head, 0) * args.group) * kHeadDim;
  const int last_token = max(tile.num_tokens - 1, 0);
  uint32_t inverse = args.group_inverse;
  asm volatile("" : "+r"(inverse));  // rows' places are not worth registers between items
  const auto offset_of = [&](int row) {
    const int token = static_cast<int>(row * inverse >> 16);
    return (min(token, last_token) * args.num_query_heads + row - token * args.group) * kHeadDim;
  };
  const int thread = threadIdx.x % 128;
  if constexpr (32 % Chunks::kOfRow == 0 && kCount * Chunks::kRowsOfWarp <= 32) {
    // A lane works out a row, all use it.
    constexpr int kRows = Chunks::kRowsOfWarp;
    const int lane = thread % 32;
    const int mine = offset_of(warpgroup * 64 + (first + lane / kRows) * (4 * kRows) +
                               thread / 32 * kRows + lane % kRows);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int offset = __shfl_sync(~0u, mine, i * kRows + lane / Chunks::kOfRow);
      x[i] = ptx::load_float4(q + offset + lane % Chunks::kOfRow * 4);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int index = (first + i) * 128 + thread;
      x[i] = ptx::load_float4(q + offset_of(warpgroup * 64 + index / Chunks::kOfRow) +
                              index % Chunks::kOfRow * 4);
    }
  }
}
template <int kHeadDim, int kCount>
__device__ __forceinline__ void put_queries(float scale, int warpgroup, uint32_t queries, int first,
                                            const float4 (&x)[kCount]) {
  constexpr int kOfRow = QueryChunks<kHeadDim>::kOfRow;
  queries += warpgroup * 64 * 128;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint32_t index = (first + i) * 128u + threadIdx.x % 128;
    const uint32_t row = index / kOfRow;
    const uint32_t chunk = index % kOfRow;  // 8 bytes
    asm volatile("st.shared.v2.u32 [%0],{%1,%2};" ::"r"(queries + (chunk / 16) * (kTileRows * 128) +
                                                        row * 128 + (((chunk / 2 ^ row) % 8) << 4) +
                                                        chunk % 2 * 8),
                 "r"(ptx::f16x2_of_f32(x[i].x * scale, x[i].y * scale)),
                 "r"(ptx::f16x2_of_f32(x[i].z * scale, x[i].w * scale))
                 : "memory");
  }
}
// Both, several chunks at a time.
template <int kHeadDim>
__device__ __forceinline__ void load_queries(const PrefillKernelArgs& args, const QueryTile& tile,
                                             int kv_head, int warpgroup, uint32_t queries) {
  constexpr int kPerThread = QueryChunks<kHeadDim>::kPerThread;
  constexpr int kAtOnce = kPerThread % 8 == 0 ? 8 : kPerThread % 5 == 0 ? 10 : 6;
  static_assert(kPerThread % kAtOnce == 0, "every batch has equally many");
#pragma unroll 1
  for (int first = 0; first < kPerThread; first += kAtOnce) {
    float4 x[kAtOnce];
    request_queries<kHeadDim>(args, tile, kv_head, warpgroup, first, x);
    put_queries<kHeadDim>(args.q_scale, warpgroup, queries, first, x);
  }
}

// q . b of 64 rows, in the scores' units: two threads a row, who leave half a sum each.
template <int kHeadDim>
__device__ __forceinline__ void load_shifts(const PrefillKernelArgs& args, const QueryTile& tile,
                                            int kv_head, int warpgroup, uint32_t shifts) {
  const int thread = threadIdx.x % 128;
  const int row = warpgroup * 64 + thread % 64;
  const int token = row / args.group;
  float sum = 0.0f;
  if (token < tile.num_tokens) {
    const int head = kv_head * args.group + row - token * args.group;
    const int begin = (thread / 64) * (kHeadDim / 2);
    const float* q =
        args.q + (static_cast<int64_t>(tile.row + token) * args.num_query_heads + head) * kHeadDim +
        begin;
    const float* b = args.references +
                     (static_cast<int64_t>(tile.sequence) * args.num_kv_heads + kv_head) *
                         reference_floats(kHeadDim) +
                     begin;
    for (int c = 0; c < kHeadDim / 2; c += 4) {
      const float4 x = __ldg(reinterpret_cast<const float4*>(q + c));
      const float4 y = __ldg(reinterpret_cast<const float4*>(b + c));
      sum = fmaf(x.x, y.x, sum);
      sum = fmaf(x.y, y.y, sum);
      sum = fmaf(x.z, y.z, sum);
      sum = fmaf(x.w, y.w, sum);
    }
  }
  asm volatile("st.shared.f32 [%0],%1;" ::"r"(shifts + ((thread / 64) * kTileRows + row) * 4),
               "f"(sum * args.q_scale)
               : "memory");
}

__device__ __forceinline__ float shift_of(uint32_t shifts, int row) {
  float a, b;
  asm volatile("ld.shared.f32 %0,[%1];" : "=f"(a) : "r"(shifts + row * 4));
  asm volatile("ld.shared.f32 %0,[%1];" : "=f"(b) : "r"(shifts + (kTileRows + row) * 4));
  return a + b;
}

// A thread's columns of the scores below `end`: bit 2 j + c is column 8 j + 2 (lane % 4) + c.
__device__ __forceinline__ uint32_t columns_below(int end) {
  const int n = end - static_cast<int>(2 * (threadIdx.x % 4));
  return ptx::low_bits(static_cast<uint32_t>(max(2 * (n >> 3) + min(n & 7, 2), 0)));
}

// Scores of keys that a row may not read become -inf. A row's own and recent pages count in the
// BF16 segment, earlier ones in the others. `first_key`: of the scores, from the first slice's.
template <int kKeys>
__device__ __forceinline__ void mask_scores(float (&s)[kKeys / 2], const PrefillKernelArgs& args,
                                            const QueryTile& tile, int first_slice, int first_key,
                                            const int (&position)[2]) {
  static_assert(kKeys <= 128, "a thread's columns are the bits of a word");
  const int shift = args.slice_shift;
  const int stored_slice = tile.num_sink;
  const int bf16_slice = stored_slice + tile.num_stored;
  // A segment begins at a column; key = column + offset.
  const auto column_of = [&](int slice) { return ((slice - first_slice) << shift) - first_key; };
  const auto offset_of = [&](int first, int slice) {
    return ((first - slice + first_slice) << shift) + first_key;
  };
  const int sink_offset = offset_of(0, 0);
  const int stored_column = column_of(stored_slice);
  const int stored_offset = offset_of(tile.stored_first, stored_slice);
  const int bf16_column = column_of(bf16_slice);
  const int bf16_offset = offset_of(tile.bf16_first, bf16_slice);
  const uint32_t before_stored = columns_below(stored_column);
  uint32_t seen[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int near = ((position[h] >> args.page_shift) - tile.recent_pages) << args.page_shift;
    uint32_t stored = columns_below(min(near - stored_offset, bf16_column)) & ~before_stored;
    uint32_t bf16 = columns_below(position[h] + 1 - bf16_offset) &
                    ~columns_below(max(near - bf16_offset, bf16_column));
    uint32_t sink = 0;
    if (args.window > 0) {
      const int window = position[h] + 1 - args.window;
      const auto in_window = [&](int offset) {
        return ~columns_below(window - offset) | columns_below(args.sink_tokens - offset);
      };
      sink = columns_below(min(near - sink_offset, stored_column)) & ~columns_below(column_of(0)) &
             in_window(sink_offset);
      stored &= in_window(stored_offset);
      bf16 &= in_window(bf16_offset);
    }
    seen[h] = sink | stored | bf16;
  }
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((seen[i / 2] >> (2 * j + i % 2) & 1) == 0) s[4 * j + i] = -INFINITY;
    }
  }
}

// cap * tanh(x + shift): 1 - 2 / (1 + e^2x) keeps an absolute error of 2^-22 times the cap.
__device__ __forceinline__ float capped(float x, float shift, float cap) {
  constexpr float kTwoLog2e = 2.885390081777927f;
  const float e = ptx::exp2_approx((x + shift) * kTwoLog2e);
  return fmaf(-2.0f * cap, ptx::reciprocal_fast(1.0f + e), cap);
}

// Softmax of one tile over a thread's two rows: s becomes the weights; `factor` is what earlier
// sums shrink by.
template <int kKeys, bool kGuard>
__device__ __forceinline__ void softmax_tile(float (&s)[kKeys / 2], float (&row_max)[2],
                                             float (&row_sum)[2], float (&factor)[2]) {
  float x[8];  // independent chains
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    x[u] = fmaxf(s[4 * u], s[4 * u + 1]);
    x[4 + u] = fmaxf(s[4 * u + 2], s[4 * u + 3]);
  }
#pragma unroll
  for (int j = 4; j < kKeys / 8; j += 4) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        x[u] = fmaxf(x[u], s[4 * (j + u) + h]);
        x[4 + u] = fmaxf(x[4 + u], s[4 * (j + u) + 2 + h]);
      }
    }
  }
  float base[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float m = fmaxf(fmaxf(x[4 * r], x[4 * r + 1]), fmaxf(x[4 * r + 2], x[4 * r + 3]));
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
    m = fmaxf(m, row_max[r]);
    base[r] = kGuard && m == -INFINITY ? 0.0f : m;  // a row that has seen no key yet
    factor[r] = ptx::exp2_approx(row_max[r] - base[r]);
    row_max[r] = m;
  }
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
    s[4 * j] = ptx::exp2_approx(s[4 * j] - base[0]);
    s[4 * j + 1] = ptx::exp2_approx(s[4 * j + 1] - base[0]);
    s[4 * j + 2] = ptx::exp2_approx(s[4 * j + 2] - base[1]);
    s[4 * j + 3] = ptx::exp2_approx(s[4 * j + 3] - base[1]);
  }
  float a[8] = {};
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
    a[j % 2] += s[4 * j];
    a[2 + j % 2] += s[4 * j + 1];
    a[4 + j % 2] += s[4 * j + 2];
    a[6 + j % 2] += s[4 * j + 3];
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    row_sum[r] =
        fmaf(row_sum[r], factor[r], (a[4 * r] + a[4 * r + 1]) + (a[4 * r + 2] + a[4 * r + 3]));
  }
}

// Everything of a warpgroup that outlives a key tile.
template <int kHeadDim>
struct RowState {
  float out[kHeadDim / 2];
  float max[2];
  float sum[2];  // of this thread's columns
};

// A thread's two rows of the query tile.
struct RowPlace {
  int row[2];
  int position[2];
  int head[2];            // of queries
  int64_t activation[2];  // row * num_query_heads + head of q and out; -1: no such token
};

__device__ __forceinline__ RowPlace place_rows(const PrefillKernelArgs& args, const QueryTile& tile,
                                               int kv_head, int warpgroup) {
  RowPlace place;
  const int warp = (threadIdx.x % 128) / 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    place.row[h] = warpgroup * 64 + warp * 16 + (threadIdx.x % 32) / 4 + 8 * h;
    const int token = static_cast<int>(place.row[h] * args.group_inverse >> 16);
    place.position[h] = tile.position + min(token, tile.num_tokens - 1);
    place.head[h] = (kv_head - token) * args.group + place.row[h];
    place.activation[h] =
        token < tile.num_tokens
            ? static_cast<int64_t>(tile.row + token) * args.num_query_heads + place.head[h]
            : -1;
  }
  return place;
}

// What an earlier batch left: normalised outputs and log2 of the sum of weights. `bits`: log2 of
// the sum that they start with.
template <int kHeadDim>
__device__ __forceinline__ void resume_rows(const PrefillKernelArgs& args, const RowPlace& place,
                                            float scale, float bits, RowState<kHeadDim>& state) {
  const int t = threadIdx.x % 4;
  const float sum = exp2f(bits);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (place.activation[h] < 0) continue;
    state.max[h] = args.state[place.activation[h]] - bits;
    state.sum[h] = t == 0 ? sum : 0.0f;
    const float* out = args.out + place.activation[h] * kHeadDim + 2 * t;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      const float2 x = *reinterpret_cast<const float2*>(out + 8 * j);
      state.out[4 * j + 2 * h] = x.x * scale * sum;
      state.out[4 * j + 2 * h + 1] = x.y * scale * sum;
    }
  }
}

// What outputs are multiplied with, once all keys have been seen; writes LSE or, for a later batch,
// log2 of the sum. Without branches that a warp's threads part at: products may be on their way.
template <int kHeadDim>
__device__ __forceinline__ void finish_rows(const PrefillKernelArgs& args, const QueryTile& tile,
                                            const RowPlace& place, const float (&shift)[2],
                                            float value_scale, const RowState<kHeadDim>& state,
                                            float (&scale)[2]) {
  constexpr float kLog2e = 1.4426950408889634f;
  const bool first = threadIdx.x % 4 == 0;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum = state.sum[h];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    scale[h] = value_scale * ptx::reciprocal_fast(sum);
    const float total = state.max[h] + ptx::log2_approx(sum);
    const int64_t at = place.activation[h];
    const bool last = tile.continues == 0;
    ptx::store_if(first && at >= 0 && !last, args.state + at, total);
    ptx::store_if(first && at >= 0 && last && args.lse != nullptr, args.lse + at,
                  (total + shift[h]) / kLog2e);
    if (args.sink_logits != nullptr) {
      const float sink = __ldg(args.sink_logits + place.head[h]) * kLog2e - shift[h];
      if (last) scale[h] *= 1.0f / (1.0f + ptx::exp2_approx(sink - total));
    }
  }
}
template <int kHeadDim>
__device__ __forceinline__ void scale_rows(const float (&scale)[2], RowState<kHeadDim>& state) {
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) state.out[i] *= scale[i / 2 % 2];
}
template <int kHeadDim>
__device__ __forceinline__ void write_rows(const PrefillKernelArgs& args, const RowPlace& place,
                                           const RowState<kHeadDim>& state) {
  constexpr bool kSwap = kHeadDim <= 128;  // else registers are short
  const bool odd = threadIdx.x % 2 != 0;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    // Pairs of threads swap halves of two blocks of eight columns: 16 bytes each.
    float4 x[kSwap ? kHeadDim / 16 : 1];
    if constexpr (kSwap) {
#pragma unroll
      for (int j = 0; j < kHeadDim / 16; ++j) {
        const float* low = state.out + 8 * j + 2 * h;
        const float* high = low + 4;
        const float a = odd ? high[0] : low[0];
        const float b = odd ? high[1] : low[1];
        const float c = __shfl_xor_sync(~0u, odd ? low[0] : high[0], 1);
        const float d = __shfl_xor_sync(~0u, odd ? low[1] : high[1], 1);
        x[j] = odd ? make_float4(c, d, a, b) : make_float4(a, b, c, d);
      }
    }
    if (place.activation[h] < 0) continue;
    float* out = args.out + place.activation[h] * kHeadDim;
    if constexpr (kSwap) {
      out += 2 * (threadIdx.x & 2) + (odd ? 8 : 0);
#pragma unroll
      for (int j = 0; j < kHeadDim / 16; ++j) *reinterpret_cast<float4*>(out + 16 * j) = x[j];
    } else {
      out += 2 * (threadIdx.x % 4);
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        *reinterpret_cast<float2*>(out + 8 * j) =
            make_float2(state.out[4 * j + 2 * h], state.out[4 * j + 2 * h + 1]);
      }
    }
  }
}
template <int kHeadDim>
__device__ __forceinline__ void store_rows(const PrefillKernelArgs& args, const QueryTile& tile,
                                           const RowPlace& place, const float (&shift)[2],
                                           float value_scale, RowState<kHeadDim>& state) {
  float scale[2];
  finish_rows<kHeadDim>(args, tile, place, shift, value_scale, state, scale);
  scale_rows<kHeadDim>(scale, state);
  write_rows<kHeadDim>(args, place, state);
}

}  // namespace kvant::backend::cuda
