// Products of weights and values in words, two tokens a lane, where taking words apart costs
// nothing beside the products and bytes need more other instructions; included by
// attention_integer_halves_avx512.cc only.
#pragma once

#include "kvant/backend/cpu/attention_integer_weights-inl.h"

namespace kvant::backend::cpu::avx512 {
namespace {

static_assert(kHalfRate);

// Entry for entry of a 4-bit code: E2M1 twice its value, U4 less 8; vpermw looks at five bits, of
// which the upper one is the neighbour's. Weights of odd tokens are negative, and so are values.
template <Code C>
constexpr Order<int16_t, 32> value_table(int sign) {
  constexpr int kE2m1[8] = {0, 1, 2, 3, 4, 6, 8, 12};
  Order<int16_t, 32> table{};
  for (int i = 0; i < 32; ++i) {
    const int code = i % 16;
    const int e2m1 = code < 8 ? kE2m1[code] : -kE2m1[code - 8];
    table.at[i] = static_cast<int16_t>(sign * (C == Code::kE2m1 ? e2m1 : code - 8));
  }
  return table;
}
template <Code C>
constexpr Order<int16_t, 32> kValuesOfEven = value_table<C>(1);
template <Code C>
constexpr Order<int16_t, 32> kValuesOfOdd = value_table<C>(-1);

// Pair J of the tokens in V's words: J and J + kTokens / 2 of each of sixteen channels.
template <Code C, int J>
KVANT_INLINE __m512i value_words(__m512i w) {
  if constexpr (C == Code::kS8) {
    return _mm512_srai_epi16(J == 0 ? _mm512_slli_epi16(w, 8) : w, 8);
  } else {
    const __m512i table = _mm512_load_si512(J % 2 == 0 ? kValuesOfEven<C>.at : kValuesOfOdd<C>.at);
    return _mm512_permutexvar_epi16(J == 0 ? w : _mm512_srli_epi16(w, 4 * J), table);
  }
}

// M query rows with N groups of sixteen channels at a time, from `group` to `end`.
template <typename Side, int M, int N, typename Page>
KVANT_OWN_FRAME void value_tiles(const IntegerValueArgs& a, const Page& page,
                                 const ValueChunk& chunk, int row, int group, int end,
                                 Fetcher& fetcher) {
  constexpr int kTokens = Side::kTokens, kTileWords = kLanes / kTokens;
  constexpr int kOfBlock = Side::kBlock / kLanes;            // groups of a block
  constexpr int kBlockGroups = kOfBlock > N ? N : kOfBlock;  // of a tile
  constexpr int kBlockBytes = M * kWeightBytes;
  const int64_t group_bytes = static_cast<int64_t>(page.page_tokens) / kTokens * 64;
  const uint8_t* codes =
      a.codes + group * group_bytes + first_of_chunk(page, chunk) * (kTileWords * 64);
  const uint8_t* weights = chunk.weights + group / kOfBlock * kBlockBytes;
  const int words = tiles_of_chunk(page, chunk) * kTileWords;
  for (; group < end; group += N, codes += N * group_bytes) {
    __m512i sum[M][N];
    unroll<M>([&](auto m) KVANT_ALWAYS {
      unroll<N>([&](auto n) KVANT_ALWAYS { sum[m.value][n.value] = _mm512_setzero_si512(); });
    });
    for (int w = 0; w < words; ++w) {
      __m512i word[N];
      unroll<N>([&](auto n) KVANT_ALWAYS {
        word[n.value] = load_once(codes + n.value * group_bytes + w * 64);
      });
      unroll<kTokens / 2>([&](auto j) KVANT_ALWAYS {
        const uint8_t* at = weights + w * (2 * kTokens) + 4 * j.value;
        __m512i value[N];
        unroll<N>([&](auto n) KVANT_ALWAYS {
          value[n.value] = value_words<Side::C, j.value>(word[n.value]);
        });
        unroll<M>([&](auto m) KVANT_ALWAYS {
          unroll<N>([&](auto n) KVANT_ALWAYS {
            const uint8_t* weight =
                at + n.value / kBlockGroups * kBlockBytes + m.value * kWeightBytes;
            sum[m.value][n.value] =
                _mm512_dpwssd_epi32(sum[m.value][n.value], value[n.value], bcast_dword(weight));
          });
        });
      });
      if (w % kTileWords == kTileWords - 1) fetcher.step();
    }
    unroll<M>([&](auto m) KVANT_ALWAYS {
      const F scale = bcast(chunk.weight_scale[m.value]);
      const F factor = bcast(first_of_chunk(page, chunk) == 0 ? a.factor[row + m.value] : 1.0f);
      float* out = a.acc + (row + m.value) * a.acc_stride + group * kLanes;
      unroll<N>([&](auto n) KVANT_ALWAYS {
        add_sum<Side::C>(out + n.value * kLanes, sum[m.value][n.value], factor, scale,
                         chunk.terms[m.value][(group + n.value) / kOfBlock]);
      });
    });
    weights += N / kBlockGroups * kBlockBytes;
  }
}

}  // namespace
}  // namespace kvant::backend::cpu::avx512
