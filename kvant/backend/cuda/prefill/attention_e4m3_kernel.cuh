// Prefill attention with E4M3 operands (--attn fp8): as attention_kernel.cuh, with products at
// twice the rate.
//
// Queries are scaled row by row so that the largest of a row is 448; weights run up to 2^8, of
// which E4M3 keeps normal numbers down to 2^-14 of the largest. What wgmma leaves of scores is the
// A operand of P V without a shuffle, because V images have their tokens in that order
// (prefill_plan.h).
//
// Accumulation has two levels: wgmma's accumulators keep about 14 bits, so they hold one key tile
// only, which is then added to outputs in fp32 by the instruction that rescales them anyway. Sums
// of weights are products with ones.
#pragma once

#include <algorithm>
#include <string>
#include <type_traits>

#include "kvant/backend/cuda/prefill/attention_producer.cuh"
#include "kvant/backend/cuda/prefill/attention_rows.cuh"
#include "kvant/backend/cuda/prefill/wgmma_e4m3.cuh"
#include "kvant/backend/cuda/status.h"

namespace kvant::backend::cuda {

constexpr float kLargestE4m3 = 448.0f;
constexpr float kWeightBits = 8.0f;
constexpr float kNoBase = -1e30f;  // of a row that has seen no key: weights of masked keys are 0
// Sums of an earlier batch start that much above the base, so that later keys, of small weight
// each, are not rounded away.
constexpr float kResumedBits = 30.0f;

// 64 rows of queries in E4M3, as core matrices [row / 8][channel / 16], and what a row was divided
// by. A warp a row, a lane a word of four channels of a group of 16: 2 t, 2 t + 1 and both + 8.
template <int kHeadDim>
__device__ __forceinline__ void load_queries_e4m3(const PrefillKernelArgs& args,
                                                  const QueryTile& tile, int kv_head, int warpgroup,
                                                  uint32_t queries, uint32_t scales) {
  constexpr int kQueryDim = PrefillShapeE4m3<kHeadDim>::kQueryDim;
  constexpr int kWords = kQueryDim / 4;
  constexpr int kPerLane = (kWords + 31) / 32;
  constexpr int kAtOnce = 4 / kPerLane;
  const int lane = threadIdx.x % 32;
  const float* first =
      args.q +
      (static_cast<int64_t>(tile.row) * args.num_query_heads + kv_head * args.group) * kHeadDim;
#pragma unroll 1
  for (int batch = 0; batch < 16; batch += kAtOnce) {
    const int first_row = warpgroup * 64 + (threadIdx.x % 128) / 32 * 16 + batch;
    float2 x[kAtOnce][kPerLane][2];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int token = (first_row + i) / args.group;
      const float* q = first + (static_cast<int64_t>(token) * args.num_query_heads + first_row + i -
                                token * args.group) *
                                   kHeadDim;
#pragma unroll
      for (int n = 0; n < kPerLane; ++n) {
        const int word = n * 32 + lane;
        const int channel = word / 4 * 16 + word % 4 * 2;
        x[i][n][0] = x[i][n][1] = make_float2(0.0f, 0.0f);
        if (word < kHeadDim / 4 && token < tile.num_tokens) {
          x[i][n][0] = __ldg(reinterpret_cast<const float2*>(q + channel));
          x[i][n][1] = __ldg(reinterpret_cast<const float2*>(q + channel + 8));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = first_row + i;
      float largest = 1e-20f;
#pragma unroll
      for (int n = 0; n < kPerLane; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          largest = fmaxf(largest, fmaxf(fabsf(x[i][n][h].x), fabsf(x[i][n][h].y)));
        }
      }
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
      }
      const float c = kLargestE4m3 / largest;
#pragma unroll
      for (int n = 0; n < kPerLane; ++n) {
        const int word = n * 32 + lane;
        if (word >= kWords) continue;
        const uint32_t bytes = ptx::e4m3x4_of_f32(x[i][n][0].x * c, x[i][n][0].y * c,
                                                  x[i][n][1].x * c, x[i][n][1].y * c);
        asm volatile("st.shared.u32 [%0],%1;" ::"r"(queries + (row / 8) * (8 * kQueryDim) +
                                                    word / 4 * 128 + (row % 8) * 16 + word % 4 * 4),
                     "r"(bytes)
                     : "memory");
      }
      if (lane == 0) {
        asm volatile("st.shared.f32 [%0],%1;" ::"r"(scales + row * 4), "f"(largest / kLargestE4m3)
                     : "memory");
      }
    }
  }
}

// The largest of a thread's two rows in kKeys scores.
template <int kKeys>
__device__ __forceinline__ void largest_scores(const float (&s)[kKeys / 2], float (&largest)[2]) {
  float x[8];  // independent chains
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float m = fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]);
      x[4 * r + j % 4] = j < 4 ? m : fmaxf(x[4 * r + j % 4], m);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    largest[r] = fmaxf(fmaxf(x[4 * r], x[4 * r + 1]), fmaxf(x[4 * r + 2], x[4 * r + 3]));
  }
}

// The same as bits that are compared as integers, three at a time (Hopper has no such instruction
// for floats): right unless the result is negative.
template <int kKeys>
__device__ __forceinline__ void largest_bits(const float (&s)[kKeys / 2], int (&largest)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int x[2];  // independent chains
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      const int a = __float_as_int(s[4 * j + 2 * r]);
      const int b = __float_as_int(s[4 * j + 2 * r + 1]);
      x[j % 2] = j < 2 ? max(a, b) : __vimax3_s32(x[j % 2], a, b);
    }
    largest[r] = max(x[0], x[1]);
  }
}

// Takes a tile's scores, to be multiplied by `unit`, into what exponents are taken from, which is
// 2^kWeightBits below the largest weight. `factor` is what earlier sums shrink by.
__device__ __forceinline__ void move_base(const float (&largest)[2], const float (&unit)[2],
                                          float (&base)[2], float (&factor)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float m = fmaxf(largest[r], __shfl_xor_sync(~0u, largest[r], 1));
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
    m = fmaxf(fmaf(m, unit[r], -kWeightBits), base[r]);
    factor[r] = ptx::exp2_approx(base[r] - m);
    base[r] = m;
  }
}

// Scores become weights.
template <int kKeys>
__device__ __forceinline__ void weigh_scores(float (&s)[kKeys / 2], const float (&unit)[2],
                                             const float (&base)[2]) {
#pragma unroll
  for (int i = 0; i < kKeys / 2; ++i) {
    s[i] = ptx::exp2_approx(fmaf(s[i], unit[(i / 2) % 2], -base[(i / 2) % 2]));
  }
}

// Weights as the A operand.
template <int kKeys>
__device__ __forceinline__ void pack_weights(const float (&s)[kKeys / 2],
                                             uint32_t (&p)[kKeys / 8]) {
#pragma unroll
  for (int i = 0; i < kKeys / 16; ++i) {
    const float* x = s + 8 * i;
    p[2 * i] = ptx::e4m3x4_of_f32(x[0], x[1], x[4], x[5]);
    p[2 * i + 1] = ptx::e4m3x4_of_f32(x[2], x[3], x[6], x[7]);
  }
}

template <int kHeadDim, int kKeys>
__device__ __forceinline__ void issue_scores_e4m3(float (&s)[kKeys / 2], uint64_t queries,
                                                  uint64_t keys) {
#pragma unroll
  for (int step = 0; step < PrefillShapeE4m3<kHeadDim>::kQueryDim / 32; ++step) {
    WgmmaSharedE4m3<kKeys>::run(s, queries + step * (2 * 128 >> 4), keys + step * (2 * 128 >> 4),
                                step > 0);
  }
}

// kChannels of the product with kKeys weights; the first from nought.
template <int kHeadDim, int kChannels, int kKeys>
__device__ __forceinline__ void issue_product_e4m3(float (&product)[kChannels / 2],
                                                   const uint32_t (&p)[kKeys / 8], uint64_t values,
                                                   bool first) {
#pragma unroll
  for (int step = 0; step < kKeys / 32; ++step) {
    WgmmaRegistersE4m3<kChannels>::run(product, p + 4 * step, values + step * (32 * kHeadDim >> 4),
                                       !first || step > 0);
  }
}

// Sums of kKeys weights, as a product with ones: in d[0] of a row and d[2] of the row 8 further.
template <int kKeys>
__device__ __forceinline__ void issue_sums_e4m3(float (&sums)[4], const uint32_t (&p)[kKeys / 8],
                                                uint64_t ones, bool first) {
#pragma unroll
  for (int step = 0; step < kKeys / 32; ++step) {
    WgmmaRegistersE4m3<8>::run(sums, p + 4 * step, ones, !first || step > 0);
  }
}
__device__ __forceinline__ void add_sums(float (&row_sum)[2], const float (&factor)[2],
                                         const float (&sums)[4]) {
  row_sum[0] = fmaf(row_sum[0], factor[0], sums[0]);
  row_sum[1] = fmaf(row_sum[1], factor[1], sums[2]);
}

// out = out * factor + product, of channels from `first` / 2 on.
template <int kHeadDim, int kChannels>
__device__ __forceinline__ void add_product(float (&out)[kHeadDim / 2], int first,
                                            const float (&factor)[2],
                                            const float (&product)[kChannels / 2]) {
#pragma unroll
  for (int j = 0; j < kChannels / 2; ++j) {
    out[first / 2 + j] = fmaf(out[first / 2 + j], factor[(j / 2) % 2], product[j]);
  }
}

// What a consumer warpgroup needs to know of an item.
template <int kHeadDim, bool kSoftcap>
struct ItemE4m3 {
  using Shape = PrefillShapeE4m3<kHeadDim>;
  const PrefillKernelArgs& args;
  const QueryTile& tile;
  const RowPlace& place;
  uint32_t bars;
  uint64_t queries, keys, values, ones;  // descriptors, of stage 0
  uint32_t phases;                       // bit s: how often stage s was used before, modulo 2
  int warpgroup;
  float unit[2];   // of scores; 1 once they are capped
  float shift[2];  // q . b, for the cap

  // Tile i uses stage i % 2 for the (i / 2)-th time in this item.
  __device__ __forceinline__ void wait_full(PrefillBarrier first, int i, int stage) const {
    ptx::mbarrier_wait(bars + 8 * (first + stage), ((i >> 1) ^ (phases >> stage)) & 1);
  }
  __device__ __forceinline__ void release(PrefillBarrier first, int stage) const {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(bars + 8 * (first + stage));
  }
  __device__ __forceinline__ uint64_t key_tile(int stage, int key) const {
    return keys + stage * (Shape::kTileBytes >> 4) + (key * kHeadDim >> 4);
  }
  __device__ __forceinline__ uint64_t value_tile(int stage, int key, int channel) const {
    return values + stage * (Shape::kTileBytes >> 4) + (key * kHeadDim >> 4) + (channel * 16 >> 4);
  }
  // Scores of tile i from `key` on, capped and masked.
  template <int kKeys>
  __device__ __forceinline__ void finish_scores(float (&s)[kKeys / 2], int i, int key,
                                                bool masked) const {
    if constexpr (kSoftcap) {
#pragma unroll
      for (int j = 0; j < kKeys / 2; ++j) {
        s[j] = capped(s[j] * unit[(j / 2) % 2], shift[(j / 2) % 2], args.cap);
      }
    }
    if (masked) {
      const int slices = Shape::kKeys >> args.slice_shift;
      mask_scores<kKeys>(s, args, tile, tile.num_slices - (i + 1) * slices, key, place.position);
    }
  }
  __device__ __forceinline__ float unit_left(int r) const {
    return kSoftcap ? 1.0f : unit[r];
  }
};

// The key tiles of an item where registers hold scores and a product at the same time (head_dim up
// to 128). A tile's keys are two halves: while the weights of one are worked out, the tensor cores
// multiply those of the other and score the next tile. Warpgroups take turns with exponentials.
template <int kHeadDim, bool kSoftcap>
__device__ __forceinline__ void read_tiles_in_halves(const ItemE4m3<kHeadDim, kSoftcap>& item,
                                                     RowState<kHeadDim>& state) {
  constexpr int kHalf = PrefillShapeE4m3<kHeadDim>::kKeys / 2;
  const int key_tiles = item.tile.num_key_tiles;
  const float unit[2] = {item.unit_left(0), item.unit_left(1)};
  float low[kHalf / 2], high[kHalf / 2];  // scores, then weights
  uint32_t low_p[kHalf / 8], high_p[kHalf / 8];
  float product[kHeadDim / 2];
  float sums[4];
  int bits[2];  // of the largest scores
  float factor[2];

  item.wait_full(kKeysFull, 0, 0);
  wgmma_fence();
  issue_scores_e4m3<kHeadDim, kHalf>(low, item.queries, item.key_tile(0, 0));
  issue_scores_e4m3<kHeadDim, kHalf>(high, item.queries, item.key_tile(0, kHalf));
  wgmma_commit();
  wgmma_wait<0>();
  hold(low);
  hold(high);
  item.release(kKeysEmpty, 0);
  const auto take_low = [&](int i, bool masked) {
    item.template finish_scores<kHalf>(low, i, 0, masked);
    largest_bits<kHalf>(low, bits);
  };
  const auto take_high = [&](int i, bool masked) {
    item.template finish_scores<kHalf>(high, i, kHalf, masked);
    int more[2];
    largest_bits<kHalf>(high, more);
    float largest[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      bits[r] = max(bits[r], more[r]);
      largest[r] = __int_as_float(bits[r]);
    }
    if (__any_sync(~0u, (bits[0] | bits[1]) < 0)) {
      float other[2];
      largest_scores<kHalf>(low, largest);
      largest_scores<kHalf>(high, other);
#pragma unroll
      for (int r = 0; r < 2; ++r) largest[r] = fmaxf(largest[r], other[r]);
    }
    move_base(largest, unit, state.max, factor);
  };
  take_low(0, true);
  take_high(0, true);

  // Of tile i the weights and the product, of tile i + 1 the scores.
  const auto step = [&](int i, int stage, auto masked) {
    constexpr bool kMasked = decltype(masked)::value;
    const int next = stage ^ 1;
    ptx::named_barrier(kTurn + item.warpgroup, 256);
    weigh_scores<kHalf>(low, unit, state.max);
    pack_weights<kHalf>(low, low_p);
    item.wait_full(kValuesFull, i, stage);
    item.wait_full(kKeysFull, i + 1, next);
    wgmma_fence();
    issue_product_e4m3<kHeadDim, kHeadDim, kHalf>(product, low_p, item.value_tile(stage, 0, 0),
                                                  true);
    issue_sums_e4m3<kHalf>(sums, low_p, item.ones, true);
    issue_scores_e4m3<kHeadDim, kHalf>(low, item.queries, item.key_tile(next, 0));
    wgmma_commit();
    weigh_scores<kHalf>(high, unit, state.max);
    pack_weights<kHalf>(high, high_p);
    ptx::named_arrive(kTurn + (item.warpgroup ^ 1), 256);
    wgmma_fence();
    issue_product_e4m3<kHeadDim, kHeadDim, kHalf>(product, high_p, item.value_tile(stage, kHalf, 0),
                                                  false);
    issue_sums_e4m3<kHalf>(sums, high_p, item.ones, false);
    wgmma_commit();
    issue_scores_e4m3<kHeadDim, kHalf>(high, item.queries, item.key_tile(next, kHalf));
    wgmma_commit();
    wgmma_wait<2>();
    hold(low);
    take_low(i + 1, kMasked);
    wgmma_wait<1>();
    hold(product);
    hold(sums);
    item.release(kValuesEmpty, stage);
    add_sums(state.sum, factor, sums);
    add_product<kHeadDim, kHeadDim>(state.out, 0, factor, product);
    wgmma_wait<0>();
    hold(high);
    item.release(kKeysEmpty, next);
    take_high(i + 1, kMasked);
  };
  // Masked tiles, whole tiles, masked tiles. The main loop goes by two, from an odd tile on: its
  // stages are constants.
  int i = 1;
  int masked_end = min(max(1, item.tile.whole_begin) | 1, key_tiles);
  const int whole_end = item.tile.whole_end;
#pragma unroll 1
  while (true) {
#pragma unroll 1
    for (; i < masked_end; ++i) step(i - 1, (i - 1) & 1, std::true_type{});
    if (i == key_tiles) break;
#pragma unroll 1
    while (i < whole_end) {
      step(i - 1, 0, std::false_type{});
      ++i;
      if (i >= whole_end) break;  // also keeps ptxas from mixing the two steps
      step(i - 1, 1, std::false_type{});
      ++i;
    }
    masked_end = key_tiles;
  }
  const int stage = (key_tiles - 1) & 1;
  weigh_scores<kHalf>(low, unit, state.max);
  weigh_scores<kHalf>(high, unit, state.max);
  pack_weights<kHalf>(low, low_p);
  pack_weights<kHalf>(high, high_p);
  item.wait_full(kValuesFull, key_tiles - 1, stage);
  wgmma_fence();
  issue_product_e4m3<kHeadDim, kHeadDim, kHalf>(product, low_p, item.value_tile(stage, 0, 0), true);
  issue_product_e4m3<kHeadDim, kHeadDim, kHalf>(product, high_p, item.value_tile(stage, kHalf, 0),
                                                false);
  issue_sums_e4m3<kHalf>(sums, low_p, item.ones, true);
  issue_sums_e4m3<kHalf>(sums, high_p, item.ones, false);
  wgmma_commit();
  wgmma_wait<0>();
  hold(product);
  hold(sums);
  add_sums(state.sum, factor, sums);
  add_product<kHeadDim, kHeadDim>(state.out, 0, factor, product);
  item.release(kValuesEmpty, stage);
}

// The same for larger heads: registers hold either scores or a part of a product, and warpgroups
// take turns with the tensor cores.
template <int kHeadDim, bool kSoftcap>
__device__ __forceinline__ void read_tiles_in_turn(const ItemE4m3<kHeadDim, kSoftcap>& item,
                                                   RowState<kHeadDim>& state) {
  constexpr int kKeys = PrefillShapeE4m3<kHeadDim>::kKeys;
  constexpr int kChannels = 64;  // of a product at a time
  const int key_tiles = item.tile.num_key_tiles;
  const float unit[2] = {item.unit_left(0), item.unit_left(1)};
  float s[kKeys / 2];
  uint32_t p[kKeys / 8];
  float factor[2];
  const auto score = [&](int stage) {
    wgmma_fence();
    issue_scores_e4m3<kHeadDim, kKeys>(s, item.queries, item.key_tile(stage, 0));
    wgmma_commit();
  };
  const auto weigh = [&](int i, int stage, bool masked) {
    wgmma_wait<0>();
    hold(s);
    item.release(kKeysEmpty, stage);
    item.template finish_scores<kKeys>(s, i, 0, masked);
    float largest[2];
    int bits[2];
    largest_bits<kKeys>(s, bits);
#pragma unroll
    for (int r = 0; r < 2; ++r) largest[r] = __int_as_float(bits[r]);
    if (__any_sync(~0u, (bits[0] | bits[1]) < 0)) largest_scores<kKeys>(s, largest);
    move_base(largest, unit, state.max, factor);
    weigh_scores<kKeys>(s, unit, state.max);
    pack_weights<kKeys>(s, p);
  };
  const auto multiply = [&](int stage) {
    float sums[4];
#pragma unroll
    for (int channel = 0; channel < kHeadDim; channel += kChannels) {
      float product[kChannels / 2];
      wgmma_fence();
      issue_product_e4m3<kHeadDim, kChannels, kKeys>(product, p, item.value_tile(stage, 0, channel),
                                                     true);
      if (channel == 0) issue_sums_e4m3<kKeys>(sums, p, item.ones, true);
      wgmma_commit();
      wgmma_wait<0>();
      hold(product);
      if (channel == 0) {
        hold(sums);
        add_sums(state.sum, factor, sums);
      }
      add_product<kHeadDim, kChannels>(state.out, channel, factor, product);
    }
    item.release(kValuesEmpty, stage);
  };
  item.wait_full(kKeysFull, 0, 0);
  score(0);
  weigh(0, 0, true);
  const auto step = [&](int i, int stage, auto masked) {
    item.wait_full(kKeysFull, i, stage);
    item.wait_full(kValuesFull, i - 1, stage ^ 1);
    ptx::named_barrier(kTurn + item.warpgroup, 256);
    multiply(stage ^ 1);
    score(stage);
    ptx::named_arrive(kTurn + (item.warpgroup ^ 1), 256);
    weigh(i, stage, decltype(masked)::value);
  };
  int i = 1;
  int masked_end = min(max(1, item.tile.whole_begin) | 1, key_tiles);
  const int whole_end = item.tile.whole_end;
#pragma unroll 1
  while (true) {
#pragma unroll 1
    for (; i < masked_end; ++i) step(i, i & 1, std::true_type{});
    if (i == key_tiles) break;
#pragma unroll 1
    while (i < whole_end) {
      step(i++, 1, std::false_type{});
      if (i >= whole_end) break;
      step(i++, 0, std::false_type{});
    }
    masked_end = key_tiles;
  }
  const int stage = (key_tiles - 1) & 1;
  item.wait_full(kValuesFull, key_tiles - 1, stage);
  multiply(stage);
}

template <int kHeadDim, bool kSoftcap>
__device__ __forceinline__ void consume_e4m3(const PrefillKernelArgs& args, uint32_t base,
                                             int warpgroup) {
  using Shape = PrefillShapeE4m3<kHeadDim>;
  constexpr bool kHalves = kHeadDim <= 128;
  const uint32_t bars = base + Shape::kBarriers;
  uint32_t phases = 0;
  if (warpgroup == 1) ptx::named_arrive(kTurn, 256);
  for (int n = 0;; ++n) {
    const TakenItem& taken = wait_for_item(bars, base + Shape::kItems, n);
    const int kv_head = taken.kv_head;
    if (kv_head < 0) break;
    const QueryTile& tile = taken.tile;
    const float* image_scales =
        args.references +
        (static_cast<int64_t>(tile.sequence) * args.num_kv_heads + kv_head) *
            reference_floats(kHeadDim) +
        kHeadDim;

    const bool shifted = kSoftcap || args.sink_logits != nullptr || args.lse != nullptr;
    load_queries_e4m3<kHeadDim>(args, tile, kv_head, warpgroup, base + Shape::kQueries,
                                base + Shape::kScales);
    if (shifted) load_shifts<kHeadDim>(args, tile, kv_head, warpgroup, base + Shape::kShifts);
    fence_async_shared();
    ptx::named_barrier(kOwn + warpgroup, 128);

    const RowPlace place = place_rows(args, tile, kv_head, warpgroup);
    RowState<kHeadDim> state;
    state.max[0] = state.max[1] = kNoBase;
    state.sum[0] = state.sum[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) state.out[i] = 0.0f;
    if (tile.resumes != 0) {
      resume_rows<kHeadDim>(args, place, image_scales[0], kResumedBits, state);
      // Here each thread of a row has the whole sum.
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        state.sum[h] = __shfl_sync(~0u, state.sum[h], threadIdx.x % 32 & ~3);
      }
    }
    ItemE4m3<kHeadDim, kSoftcap> item{
        args,
        tile,
        place,
        bars,
        core_descriptor(base + Shape::kQueries + warpgroup * 64 * Shape::kQueryDim, 128,
                        8 * Shape::kQueryDim),
        core_descriptor(base + Shape::kKeyTiles, 128, 8 * kHeadDim),
        core_descriptor(base + Shape::kValueTiles, 16 * kHeadDim, 128),
        core_descriptor(base + Shape::kOnes, 128, 256),
        phases,
        warpgroup,
        {},
        {}};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      asm volatile("ld.shared.f32 %0,[%1];"
                   : "=f"(item.unit[h])
                   : "r"(base + Shape::kScales + place.row[h] * 4));
      item.unit[h] *= args.q_scale * image_scales[3];
      if (kSoftcap) item.shift[h] = shift_of(base + Shape::kShifts, place.row[h]);
    }
    if constexpr (kHalves) {
      read_tiles_in_halves(item, state);
    } else {
      read_tiles_in_turn(item, state);
    }
    phases ^= (((tile.num_key_tiles + 1) >> 1) & 1) | (tile.num_key_tiles & 2);
    float shift[2] = {0.0f, 0.0f};  // what scores lack
    if (!kSoftcap && shifted) {
      shift[0] = shift_of(base + Shape::kShifts, place.row[0]);
      shift[1] = shift_of(base + Shape::kShifts, place.row[1]);
    }
    if (threadIdx.x % 4 != 0) state.sum[0] = state.sum[1] = 0.0f;
    store_rows<kHeadDim>(args, tile, place, shift, taken.value_scale[1], state);
    release_item(bars, n);
    // Shifts are read before the next item's are written.
    ptx::named_barrier(kOwn + warpgroup, 128);
  }
}

template <int kHeadDim, bool kSoftcap>
__global__ __launch_bounds__(kPrefillThreads, 1) void prefill_attention_e4m3(
    const __grid_constant__ PrefillKernelArgs args) {
  using Shape = PrefillShapeE4m3<kHeadDim>;
  extern __shared__ uint8_t shared[];
  const uint32_t base = (ptx::shared_address(shared) + 1023u) & ~1023u;
  if (threadIdx.x == 0) init_barriers(base + Shape::kBarriers);
  if (threadIdx.x < 256 / 16) {
    constexpr uint32_t kOnes = 0x38383838;  // 1 in E4M3
    store_shared(base + Shape::kOnes + threadIdx.x * 16, make_uint4(kOnes, kOnes, kOnes, kOnes));
    fence_async_shared();
  }
  if constexpr (Shape::kQueryDim > kHeadDim) {  // nought times what lies behind keys is nought
    for (int at = threadIdx.x * 16; at < 2 * Shape::kStages * Shape::kTileBytes;
         at += kPrefillThreads * 16)
      store_shared(base + Shape::kKeyTiles + at, make_uint4(0, 0, 0, 0));
    fence_async_shared();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128), 0);
  if (warpgroup == 0) {
    ptx::decrease_registers<24>();
    const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
    if (warp == 0) {
      produce<Shape, NoImages>(args, {}, base);
      finish<NoImages>(args.counters);
    }
  } else {
    ptx::increase_registers<240>();
    consume_e4m3<kHeadDim, kSoftcap>(args, base, warpgroup - 1);
  }
}

template <int kHeadDim, bool kSoftcap>
Status launch_prefill_kernel_e4m3(const PrefillKernelArgs& args, int num_processors,
                                  cudaStream_t stream) {
  constexpr int kBytes = PrefillShapeE4m3<kHeadDim>::kBytes;
  static_assert(kBytes <= 227 * 1024, "a block has 227 KiB of shared memory");
  const auto kernel = prefill_attention_e4m3<kHeadDim, kSoftcap>;
  KVANT_TRY(
      cuda_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
                  "asking for shared memory of prefill attention in FP8"));
  kernel<<<std::min(args.num_items, num_processors), kPrefillThreads, kBytes, stream>>>(args);
  return launch_status("prefill attention in FP8, head_dim " + std::to_string(kHeadDim));
}

template <int kHeadDim>
Status launch_prefill_attention_e4m3_of(const PrefillKernelArgs& args, int num_processors,
                                        cudaStream_t stream) {
  return args.cap > 0.0f
             ? launch_prefill_kernel_e4m3<kHeadDim, true>(args, num_processors, stream)
             : launch_prefill_kernel_e4m3<kHeadDim, false>(args, num_processors, stream);
}

}  // namespace kvant::backend::cuda
