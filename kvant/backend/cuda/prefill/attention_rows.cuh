// What a warpgroup of prefill attention does with its 64 rows besides matrix products: queries in,
// masks, softmax, outputs. A thread has two rows, (thread % 128) / 32 * 16 + lane / 4 and 8
// further, and in both the columns 8 j + 2 (lane % 4) and the next: the accumulator layout of wgmma
// and of mma.m16n8k16.
#pragma once

#include "kvant/backend/cuda/matrices.cuh"
#include "kvant/backend/cuda/prefill/attention_shape.cuh"

namespace kvant::backend::cuda {

// 64 rows of queries, scaled, as FP16 in shared memory. Rows without a token are zero. Loads go out
// several at a time: nothing else of the warpgroup runs meanwhile.
template <int kHeadDim>
__device__ __forceinline__ void load_queries(const PrefillKernelArgs& args, const QueryTile& tile,
                                             int kv_head, int warpgroup, uint32_t queries) {
  constexpr int kChunks = kHeadDim / 8;
  constexpr int kPerThread = 64 * kChunks / 128;
  constexpr int kAtOnce = kPerThread % 4 == 0 ? 4 : kPerThread % 5 == 0 ? 5 : 3;
  static_assert(kPerThread % kAtOnce == 0, "every thread loads equally much");
  const int thread = threadIdx.x % 128;
  const int num_tokens = tile.num_tokens;
  const float* first =
      args.q +
      (static_cast<int64_t>(tile.row) * args.num_query_heads + kv_head * args.group) * kHeadDim;
#pragma unroll 1
  for (int batch = 0; batch < kPerThread; batch += kAtOnce) {
    float4 x[kAtOnce], y[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int index = (batch + i) * 128 + thread;
      const int row = warpgroup * 64 + index / kChunks;
      const int token = row / args.group;
      x[i] = y[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (token < num_tokens) {
        const float4* q = reinterpret_cast<const float4*>(
            first +
            (static_cast<int64_t>(token) * args.num_query_heads + row - token * args.group) *
                kHeadDim +
            index % kChunks * 8);
        x[i] = __ldg(q);
        y[i] = __ldg(q + 1);
      }
    }
    const float c = args.q_scale;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int index = (batch + i) * 128 + thread;
      const int row = warpgroup * 64 + index / kChunks;
      const int chunk = index % kChunks;
      store_shared(
          queries + (chunk / 8) * (kTileRows * 128) + row * 128 + (((chunk % 8) ^ (row % 8)) << 4),
          make_uint4(ptx::f16x2_of_f32(x[i].x * c, x[i].y * c),
                     ptx::f16x2_of_f32(x[i].z * c, x[i].w * c),
                     ptx::f16x2_of_f32(y[i].x * c, y[i].y * c),
                     ptx::f16x2_of_f32(y[i].z * c, y[i].w * c)));
    }
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

// Scores of keys that a row may not read become -inf. A row's own and recent pages count in the
// BF16 segment, earlier ones in the others. `first_key`: of the scores, from the first slice's.
template <int kKeys>
__device__ __forceinline__ void mask_scores(float (&s)[kKeys / 2], const PrefillKernelArgs& args,
                                            const QueryTile& tile, int first_slice, int first_key,
                                            const int (&position)[2]) {
  const int column = 2 * (threadIdx.x % 4);
  int near[2], window[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    near[h] = ((position[h] >> args.page_shift) - tile.recent_pages) << args.page_shift;
    window[h] = args.window > 0 ? position[h] - args.window + 1 : 0;
  }
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
    const int at = first_key + 8 * j;
    const int slice = first_slice + (at >> args.slice_shift);
    const int stored = slice - tile.num_sink;
    const bool bf16 = stored >= tile.num_stored;
    const int first = stored < 0 ? slice
                      : bf16     ? tile.bf16_first + stored - tile.num_stored
                                 : tile.stored_first + stored;
    const int key = (first << args.slice_shift) + (at & ((1 << args.slice_shift) - 1)) + column;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int low = bf16 ? near[h] : 0;
      const int high = slice < 0 ? -1 : bf16 ? position[h] : near[h] - 1;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int k = key + c;
        const bool seen = k >= low && k <= high && (k >= window[h] || k < args.sink_tokens);
        if (!seen) s[4 * j + 2 * h + c] = -INFINITY;
      }
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
  int64_t activation[2];  // row * num_query_heads + head of q and out; -1: no such token
};

__device__ __forceinline__ RowPlace place_rows(const PrefillKernelArgs& args, const QueryTile& tile,
                                               int kv_head, int warpgroup) {
  RowPlace place;
  const int warp = (threadIdx.x % 128) / 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    place.row[h] = warpgroup * 64 + warp * 16 + (threadIdx.x % 32) / 4 + 8 * h;
    const int token = place.row[h] / args.group;
    place.position[h] = tile.position + min(token, tile.num_tokens - 1);
    place.activation[h] = token < tile.num_tokens
                              ? static_cast<int64_t>(tile.row + token) * args.num_query_heads +
                                    kv_head * args.group + place.row[h] - token * args.group
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

template <int kHeadDim>
__device__ __forceinline__ void store_rows(const PrefillKernelArgs& args, const QueryTile& tile,
                                           const RowPlace& place, const float (&shift)[2],
                                           float value_scale, RowState<kHeadDim>& state) {
  constexpr float kLog2e = 1.4426950408889634f;
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum = state.sum[h];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (place.activation[h] < 0) continue;
    float scale = value_scale / sum;
    const float total = state.max[h] + log2f(sum);
    if (tile.continues != 0) {
      if (t == 0) args.state[place.activation[h]] = total;
    } else {
      if (args.lse != nullptr && t == 0) {
        args.lse[place.activation[h]] = (total + shift[h]) / kLog2e;
      }
      if (args.sink_logits != nullptr) {
        const int head = static_cast<int>(place.activation[h] % args.num_query_heads);
        const float sink = args.sink_logits[head] * kLog2e - shift[h];
        scale *= 1.0f / (1.0f + ptx::exp2_approx(sink - total));
      }
    }
    float* out = args.out + place.activation[h] * kHeadDim + 2 * t;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      *reinterpret_cast<float2*>(out + 8 * j) =
          make_float2(state.out[4 * j + 2 * h] * scale, state.out[4 * j + 2 * h + 1] * scale);
    }
  }
}

}  // namespace kvant::backend::cuda
