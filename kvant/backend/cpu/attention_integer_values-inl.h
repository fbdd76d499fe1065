// Integer products of weights and values; included by attention_integer_avx512.cc only.
#pragma once

#include "kvant/backend/cpu/attention_integer_weights-inl.h"
#if defined(KVANT_HALF_RATE_512)
#include "kvant/backend/cpu/attention_integer_words-inl.h"
#endif

namespace kvant::backend::cpu::avx512 {
namespace {

#if !defined(KVANT_HALF_RATE_512)
// M query rows with N groups of sixteen channels at a time, from `group` to `end`.
template <typename Side, int M, int N>
KVANT_OWN_FRAME void value_tiles(const IntegerValueArgs& a, const AnyPage& page,
                                 const ValueChunk& chunk, int row, int group, int end,
                                 Fetcher& fetcher) {
  const int num_tiles = tiles_of_chunk(page, chunk);
  constexpr Code C = Side::C;
  constexpr int kTokens = Side::kTokens;
  constexpr int kOfBlock = Side::kBlock / kLanes;            // groups of a block
  constexpr int kBlockGroups = kOfBlock > N ? N : kOfBlock;  // of a tile
  constexpr int kBlockBytes = M * kWeightBytes;
  const int64_t group_bytes = static_cast<int64_t>(a.page_tokens) / kTokens * 64;
  const uint8_t* codes = a.codes + group * group_bytes + chunk.first_tile * (kLanes / kTokens * 64);
  const uint8_t* weights = chunk.weights + group / kOfBlock * kBlockBytes;
  for (; group < end; group += N, codes += N * group_bytes) {
    __m512i high[M][N], low[M][N];
    unroll<M>([&](auto m) KVANT_ALWAYS {
      unroll<N>([&](auto n) KVANT_ALWAYS {
        high[m.value][n.value] = low[m.value][n.value] = _mm512_setzero_si512();
      });
    });
    for (int tile = 0; tile < num_tiles; ++tile) {
      unroll<kLanes / kTokens>([&](auto w) KVANT_ALWAYS {
        __m512i words[N];
        unroll<N>([&](auto n) KVANT_ALWAYS {
          const int64_t word = tile * (kLanes / kTokens) + w.value;
          words[n.value] = _mm512_loadu_si512(codes + n.value * group_bytes + word * 64);
        });
        unroll<kTokens / 4>([&](auto j) KVANT_ALWAYS {
          const uint8_t* at = weights + tile * kLanes + w.value * kTokens + 4 * j.value;
          __m512i value[N];
          unroll<N>([&](auto n)
                        KVANT_ALWAYS { value[n.value] = value_bytes<C, j.value>(words[n.value]); });
          unroll<M>([&](auto m) KVANT_ALWAYS {
            unroll<N>([&](auto n) KVANT_ALWAYS {
              const uint8_t* weight =
                  at + n.value / kBlockGroups * kBlockBytes + m.value * kWeightBytes;
              add_products(high[m.value][n.value], bcast_dword(weight), value[n.value]);
              add_products(low[m.value][n.value], bcast_dword(weight + kChunkTokens),
                           value[n.value]);
            });
          });
        });
      });
      fetcher.step();
    }
    unroll<M>([&](auto m) KVANT_ALWAYS {
      const F scale = bcast(chunk.weight_scale[m.value]);
      const F factor = bcast(chunk.first_tile == 0 ? a.factor[row + m.value] : 1.0f);
      float* out = a.acc + (row + m.value) * a.acc_stride + group * kLanes;
      unroll<N>([&](auto n) KVANT_ALWAYS {
        add_sums<C>(out + n.value * kLanes, high[m.value][n.value], low[m.value][n.value], factor,
                    scale, chunk.terms[m.value][(group + n.value) / kOfBlock]);
      });
    });
    weights += N / kBlockGroups * kBlockBytes;
  }
}

#endif

// Few rows keep few sums going: more channels at a time hide the latency of the products.
constexpr int groups_at_once(int rows) {
  return rows == 1 ? 8 : rows == 2 ? 4 : 2;
}

template <typename Side, typename Page>
void value_chunk(const IntegerValueArgs& a, const Page& page, ValueChunk& chunk, Fetcher& fetcher) {
  prepare_scales<Side>(a, page, chunk, fetcher);
  const int num_groups = page.head_dim / kLanes;
  for (int r = 0; r < a.rows; r += kMaxRows) {
    with_count<kMaxRows>(a.rows - r, [&](auto m) {
      constexpr int M = decltype(m)::value;
      prepare_weights<Side, M>(a, page, chunk, r, M, fetcher);
      if constexpr (Side::C == Code::kU4) sum_zeros<Side, M>(a, page, chunk, r);
      for (int group = 0; group < num_groups;) {
        with_power<groups_at_once(M)>(num_groups - group, [&](auto n) {
          constexpr int N = decltype(n)::value;
          const int end = num_groups - (num_groups - group) % N;
          value_tiles<Side, M, N>(a, page, chunk, r, group, end, fetcher);
          group = end;
        });
      }
    });
  }
}

template <typename Side, typename Page>
void values_of(const IntegerValueArgs& a, const Page& page) {
  const int num_blocks = Side::blocks_of(page);
  ValueChunk chunk;
  begin_chunks<Side>(a, page, chunk);
  const int last_rows = a.rows % kMaxRows == 0 ? kMaxRows : a.rows % kMaxRows;
  const int groups = groups_at_once(a.rows < kMaxRows ? last_rows : kMaxRows);
  const int row_steps = (a.rows + kMaxRows - 1) / kMaxRows;
  const int chunks = (a.num_tiles * kLanes + kChunkTokens - 1) / kChunkTokens;
  const int scale_steps = Side::S == PageScale::kE4m3 ? num_blocks : 0;
  const int weight_steps = a.rows + num_blocks * row_steps;
  const int product_steps = a.num_tiles * row_steps * ((a.head_dim / kLanes + groups - 1) / groups);
  Fetcher fetcher(a.fetch, chunks * (scale_steps + weight_steps) + product_steps);
  for (; chunk.first_tile < a.num_tiles; chunk.first_tile += kChunkTokens / kLanes) {
    value_chunk<Side>(a, page, chunk, fetcher);
  }
}

void values(const IntegerValueArgs& a) {
  with_value_side(a, [&](auto side) {
    using Side = decltype(side);
    if constexpr (kHalfRate) {
      with_wide_page(a, [&](const auto& page) { values_of<Side>(a, page); });
    } else {
      values_of<Side>(a, AnyPage{a.head_dim, a.page_tokens, a.num_tiles});
    }
  });
}

}  // namespace
}  // namespace kvant::backend::cpu::avx512
