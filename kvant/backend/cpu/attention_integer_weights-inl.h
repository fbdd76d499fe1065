// Weights of attention times the scales of V, as the integers that products with V's codes take.
// Included like attention_integer-inl.h.
#pragma once

#include "kvant/backend/cpu/attention_integer-inl.h"
#include "kvant/backend/cpu/attention_shape-inl.h"

namespace kvant::backend::cpu::avx512 {
namespace {

constexpr int kChunkTokens = 64;
constexpr float kLargestWeight = 32767.0f;
constexpr float kValueOffset = 8.0f;  // of 4-bit unsigned codes, which goes into their zeros
constexpr int kWeightBytes = 2 * kChunkTokens;  // upper bytes, then lower ones

// What V's codes are, with what scales: each combination that formats have.
template <Code C_, PageScale S_>
struct ValueSide {
  static constexpr Code C = C_;
  static constexpr PageScale S = S_;
  static constexpr int kBlock = S == PageScale::kE4m3 ? 16 : 32;  // channels of a scale
  static constexpr int kTokens = C == Code::kS8 ? 4 : 8;          // in a word
  template <typename Page>
  static constexpr int blocks_of(const Page& page) {
    return (page.head_dim + kBlock - 1) / kBlock;
  }
};

// Up to 64 tokens of a page. Words have tokens in the order in which packing leaves them
// (to_words()), bytes in that of V's bytes (value_bytes()).
struct ValueChunk {
  int first_tile = 0;
  int16_t* scales = nullptr;       // [blocks][64], at most 2^15 - 1
  float* zeros = nullptr;          // [blocks][64], in token order
  F power[kChunkTokens / kLanes];  // of each token: what its scales have to be multiplied by
  __m512i order;                   // of 32 words: their upper bytes, then their lower ones
  uint8_t* weights = nullptr;      // of a tile of rows: [blocks][rows][2][64]
  alignas(32) float weight_scale[kMaxTileRows];  // of those rows
  float terms[kMaxTileRows]
             [kMaxHeadDim / 16];  // of rows and blocks: the sums of weights times zeros
};

// Where the chunk begins in the page, and its tiles that have weights: whole pages are one chunk.
template <typename Page>
constexpr int first_of_chunk(const Page&, const ValueChunk& chunk) {
  return kIsWhole<Page> ? 0 : chunk.first_tile;
}
template <typename Page>
constexpr int tiles_of_chunk(const Page& page, const ValueChunk& chunk) {
  const int tiles = page.num_tiles - first_of_chunk(page, chunk);
  return tiles < kChunkTokens / kLanes ? tiles : kChunkTokens / kLanes;
}

// Token of place i % 8 of eight when V's words are taken apart four tokens at a time.
constexpr int token_of_place(int tokens_in_word, int i) {
  return tokens_in_word == 8 ? i % 4 * 2 + i / 4 : i;
}

// Where packing leaves token `t` of 32.
constexpr int packed_place(int t) {
  return t % 16 / 4 * 8 + t / 16 * 4 + t % 4;
}
// Where words have token `t` of 32: as packing leaves them, or, where products take words, the
// tokens next to each other that are so when V's words are taken apart (value_words()).
template <int kTokens>
constexpr int place_of_token(int t) {
  if (!kHalfRate) return packed_place(t);
  constexpr int kPairs = kTokens / 2;  // of token i and i + kPairs
  return t / kTokens * kTokens + t % kPairs * 2 + t % kTokens / kPairs;
}

// From words of 32 tokens to bytes in the order of V's.
template <int kTokens>
constexpr Order<int8_t, 64> order_of_bytes() {
  Order<int8_t, 64> order{};
  for (int i = 0; i < 32; ++i) {
    const int word = packed_place(i / 8 * 8 + token_of_place(kTokens, i % 8));
    order.at[i] = static_cast<int8_t>(2 * word + 1);
    order.at[32 + i] = static_cast<int8_t>(2 * word);
  }
  return order;
}
alignas(64) constexpr Order<int8_t, 64> kBytesOfFour = order_of_bytes<4>();
alignas(64) constexpr Order<int8_t, 64> kBytesOfEight = order_of_bytes<8>();

// From bytes of 64 tokens in order to the order of words.
template <int kTokens>
constexpr Order<int8_t, 64> order_of_scales() {
  Order<int8_t, 64> order{};
  for (int t = 0; t < 64; ++t)
    order.at[t / 32 * 32 + place_of_token<kTokens>(t % 32)] = static_cast<int8_t>(t);
  return order;
}
alignas(64) constexpr Order<int8_t, 64> kWordsOfScales = order_of_scales<8>();  // of E4M3

// From the order that packing leaves to that of words.
template <int kTokens>
constexpr Order<int16_t, 32> order_of_packed() {
  Order<int16_t, 32> order{};
  for (int t = 0; t < 32; ++t)
    order.at[place_of_token<kTokens>(t)] = static_cast<int16_t>(packed_place(t));
  return order;
}
template <int kTokens>
alignas(64) constexpr Order<int16_t, 32> kWordsOfPacked = order_of_packed<kTokens>();

// Four vectors of 32-bit integers, in token order, as 64 words.
template <int kTokens>
KVANT_INLINE void to_words(const __m512i* v, __m512i* words) {
  unroll<2>([&](auto h) KVANT_ALWAYS {
    words[h.value] = _mm512_packs_epi32(v[2 * h.value], v[2 * h.value + 1]);
    if constexpr (kHalfRate) {
      const __m512i order = _mm512_load_si512(kWordsOfPacked<kTokens>.at);
      words[h.value] = _mm512_permutexvar_epi16(order, words[h.value]);
    }
  });
}

// E4M3 scales, in integers: a scale is m 2^(e - 10) with m < 16, and 2^11 m 2^(e - E) is exact down
// to 2^-11 of the token's largest exponent E. The power is 2^(E - 21).
template <typename Page>
KVANT_INLINE void prepare_e4m3_scales(const IntegerValueArgs& a, const Page& page,
                                      ValueChunk& chunk, Fetcher& fetcher) {
  const int num_blocks = page.head_dim / 16;
  const int tokens = page.page_tokens < kChunkTokens ? page.page_tokens : kChunkTokens;
  const __mmask64 valid = tokens == 64 ? ~__mmask64{0} : (__mmask64{1} << tokens) - 1;
  const uint8_t* codes = a.scales + first_of_chunk(page, chunk) * kLanes;
  const auto load_codes = [&](int b) KVANT_ALWAYS {
    return _mm512_maskz_loadu_epi8(valid, codes + static_cast<int64_t>(b) * page.page_tokens);
  };
  __m512i largest = _mm512_setzero_si512();
  for (int b = 0; b < num_blocks; ++b) largest = _mm512_max_epu8(largest, load_codes(b));
  alignas(64) uint8_t bytes[64];
  _mm512_store_si512(bytes, largest);
  const __m512i one = _mm512_set1_epi16(1);
  unroll<4>([&](auto tile) KVANT_ALWAYS {
    const __m512i e =
        _mm512_max_epi32(shr(load_u8(bytes + tile.value * kLanes), 3).v, _mm512_set1_epi32(1));
    chunk.power[tile.value] = as_float(shl({_mm512_add_epi32(e, _mm512_set1_epi32(127 - 21))}, 23));
  });
  const __m512i by_words = _mm512_load_si512(kWordsOfScales.at);
  const auto widen = [&](__m512i x, int half) KVANT_ALWAYS {
    return _mm512_cvtepu8_epi16(half == 0 ? _mm512_castsi512_si256(x)
                                          : _mm512_extracti64x4_epi64(x, 1));
  };
  const auto exponent = [&](__m512i x)
                            KVANT_ALWAYS { return _mm512_max_epi16(_mm512_srli_epi16(x, 3), one); };
  largest = _mm512_permutexvar_epi8(by_words, largest);
  int16_t* scales = chunk.scales;
  const __m512i top[2] = {exponent(widen(largest, 0)), exponent(widen(largest, 1))};
  for (int b = 0; b < num_blocks; ++b) {
    const __m512i x = _mm512_permutexvar_epi8(by_words, load_codes(b));
    unroll<2>([&](auto half) KVANT_ALWAYS {
      const __m512i w = widen(x, half.value);
      const __m512i e = exponent(w);
      // (8 +) the low three bits: without the exponent, and with one of the place above it.
      const __m512i mantissa = _mm512_sub_epi16(w, _mm512_slli_epi16(_mm512_sub_epi16(e, one), 3));
      const __m512i scale =
          _mm512_srlv_epi16(_mm512_slli_epi16(mantissa, 11), _mm512_sub_epi16(top[half.value], e));
      _mm512_storeu_si512(scales + b * kChunkTokens + 32 * half.value, scale);
    });
    if (b % 4 == 3) fetcher.step(4);
  }
}

// Any other scales: rounded to 2^-14 of the token's power of two, which the power has 2^-14 times.
template <typename Side, typename Page>
KVANT_INLINE void prepare_float_scales(const IntegerValueArgs& a, const Page& page,
                                       ValueChunk& chunk) {
  constexpr PageScale S = Side::S;
  const int num_blocks = Side::blocks_of(page);
  const int page_tiles =
      (page.page_tokens < kChunkTokens ? page.page_tokens : kChunkTokens) / kLanes;
  const int64_t block_bytes = static_cast<int64_t>(page.page_tokens) * scale_stride(S);
  const auto side_of = [&](int b, int tile) KVANT_ALWAYS {
    return load_scales(S, a.scales + b * block_bytes, (first_of_chunk(page, chunk) + tile) * kLanes,
                       2 * page.page_tokens);
  };
  F inverse[4];
  for (int tile = 0; tile < 4; ++tile) {
    __m512 largest = _mm512_set1_ps(0x1p-100f);
    if (tile < page_tiles) {
      for (int b = 0; b < num_blocks; ++b) {
        largest = _mm512_max_ps(largest, side_of(b, tile).scale.v);
      }
    }
    const __m512 exponent = _mm512_getexp_ps(largest);
    chunk.power[tile].v = _mm512_scalef_ps(_mm512_set1_ps(0x1p-14f), exponent);
    inverse[tile].v =
        _mm512_scalef_ps(_mm512_set1_ps(0x1p14f), _mm512_sub_ps(_mm512_setzero_ps(), exponent));
  }
  for (int b = 0; b < num_blocks; ++b) {
    __m512i scale[4], words[2];
    for (int tile = 0; tile < 4; ++tile) {
      scale[tile] = _mm512_setzero_si512();
      if (tile >= page_tiles) continue;
      const ScalePair side = side_of(b, tile);
      scale[tile] = _mm512_cvtps_epi32(_mm512_mul_ps(side.scale.v, inverse[tile].v));
      if (S == PageScale::kF16Pair) {
        store(chunk.zeros + b * kChunkTokens + tile * kLanes,
              fma(side.scale, bcast(kValueOffset), side.zero));
      }
    }
    to_words<Side::kTokens>(scale, words);
    unroll<2>([&](auto h) KVANT_ALWAYS {
      _mm512_storeu_si512(chunk.scales + b * kChunkTokens + 32 * h.value, words[h.value]);
    });
  }
}

// What products with V's codes as bytes have to be multiplied by.
constexpr float value_factor(Code code) {
  return code == Code::kE2m1 ? 0.5f : 1.0f;
}

// Products of weights and scales are halved fifteen times, rounding halves up, and scales that are
// powers of two often leave a half: a bias that long contexts do not average out. So weights of odd
// tokens are negative meanwhile: half of the halves are rounded down.
KVANT_INLINE F alternating(float x) {
  return {_mm512_mask_blend_ps(0xaaaa, _mm512_set1_ps(x), _mm512_set1_ps(-x))};
}

// Words of (0, 2), (1, 3), ... of which those of odd tokens are negative.
KVANT_INLINE __m512i positive_words(__m512i words) {
  return _mm512_mask_sub_epi16(words, 0xcccccccc, _mm512_setzero_si512(), words);
}

// Weights of M rows times the tokens' powers, as integers of which the largest is 2^15 - 1; these
// times the scales of each block, as bytes of a tile of `rows`.
template <typename Side, int M, typename Page>
void prepare_weights(const IntegerValueArgs& a, const Page& page, ValueChunk& chunk, int row,
                     int rows, Fetcher& fetcher) {
  const int num_blocks = Side::blocks_of(page);
  const int num_tiles = tiles_of_chunk(page, chunk);
  const int64_t stride = page.page_tokens;
  const float* p = a.p + row * stride + first_of_chunk(page, chunk) * kLanes;
  // Copies: stores of bytes could change what `chunk` has.
  const F power[4] = {chunk.power[0], chunk.power[1], chunk.power[2], chunk.power[3]};
  const __m512i order = chunk.order;
  const int16_t* scales = chunk.scales;
  uint8_t* to = chunk.weights;
  const auto weight_of = [&](auto m, auto tile) KVANT_ALWAYS {
    if (tile.value >= num_tiles) return zero();
    return mul(load(p + m.value * stride + tile.value * kLanes), power[tile.value]);
  };
  constexpr bool kKeeps = M <= kMaxRows;  // in registers
  F x[kKeeps ? M : 1][4];
  F largest[M];
  unroll<M>([&](auto m) KVANT_ALWAYS {
    largest[m.value] = zero();
    unroll<4>([&](auto tile) KVANT_ALWAYS {
      const F weight = weight_of(m, tile);
      if constexpr (kKeeps) x[m.value][tile.value] = weight;
      largest[m.value] = max(largest[m.value], weight);
    });
  });
  fetcher.step(M);
  const __m256 unit =
      _mm256_mul_ps(lower_half(max_rows(largest)), _mm256_set1_ps(1.0f / kLargestWeight));
  const __mmask8 counts = _mm256_cmp_ps_mask(unit, _mm256_set1_ps(0x1p-100f), _CMP_GT_OQ);
  alignas(32) float inverse[kMaxTileRows];
  _mm256_store_ps(inverse, _mm256_maskz_div_ps(counts, _mm256_set1_ps(1.0f), unit));
  _mm256_store_ps(chunk.weight_scale,
                  _mm256_mul_ps(unit, _mm256_set1_ps(value_factor(Side::C) * 0x1p15f)));
  __m512i words[M][2];
  unroll<M>([&](auto m) KVANT_ALWAYS {
    const F of_row = alternating(inverse[m.value]);
    __m512i weight[4];
    unroll<4>([&](auto tile) KVANT_ALWAYS {
      F w;
      if constexpr (kKeeps) {
        w = x[m.value][tile.value];
      } else {
        w = weight_of(m, tile);
      }
      weight[tile.value] = _mm512_cvtps_epi32(mul(w, of_row).v);
    });
    to_words<Side::kTokens>(weight, words[m.value]);
  });
  for (int b = 0; b < num_blocks; ++b, to += rows * kWeightBytes, scales += kChunkTokens) {
    unroll<2>([&](auto h) KVANT_ALWAYS {
      const __m512i scale = _mm512_loadu_si512(scales + 32 * h.value);
      unroll<M>([&](auto m) KVANT_ALWAYS {
        const __m512i signs = _mm512_mulhrs_epi16(words[m.value][h.value], scale);
        if constexpr (kHalfRate) {  // words stay words, and those of E2M1 and U4 with their signs
          _mm512_storeu_si512(to + m.value * kWeightBytes + 64 * h.value,
                              Side::C == Code::kS8 ? positive_words(signs) : signs);
          return;
        }
        const __m512i product = _mm512_abs_epi16(signs);
        const __m512i bytes = _mm512_permutexvar_epi8(order, product);
        uint8_t* upper = to + m.value * kWeightBytes + 32 * h.value;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(upper), _mm512_castsi512_si256(bytes));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(upper + kChunkTokens),
                            _mm512_extracti64x4_epi64(bytes, 1));
      });
    });
    if (b % 2 == 1) fetcher.step(2);
  }
}

template <typename Side, typename Page>
KVANT_INLINE void prepare_scales(const IntegerValueArgs& a, const Page& page, ValueChunk& chunk,
                                 Fetcher& fetcher) {
  if constexpr (Side::S == PageScale::kE4m3) {
    prepare_e4m3_scales(a, page, chunk, fetcher);
  } else {
    prepare_float_scales<Side>(a, page, chunk);
  }
}

// The sums over tokens of weights times zeros, which all channels of a block get, for M rows.
template <typename Side, int M, typename Page>
KVANT_INLINE void sum_zeros(const IntegerValueArgs& a, const Page& page, ValueChunk& chunk,
                            int row) {
  const int num_tiles = tiles_of_chunk(page, chunk);
  const int64_t stride = page.page_tokens;
  const float* p = a.p + row * stride + first_of_chunk(page, chunk) * kLanes;
  for (int block = 0; block < Side::blocks_of(page); ++block) {
    const float* zeros = chunk.zeros + block * kChunkTokens;
    F sum[M];
    unroll<M>([&](auto m) KVANT_ALWAYS { sum[m.value] = zero(); });
    for (int tile = 0; tile < num_tiles; ++tile) {
      const F z = load(zeros + tile * kLanes);
      unroll<M>([&](auto m) KVANT_ALWAYS {
        sum[m.value] = fma(load(p + m.value * stride + tile * kLanes), z, sum[m.value]);
      });
    }
    alignas(64) float term[kLanes];
    store(term, sum_rows(sum));
    unroll<M>([&](auto m) KVANT_ALWAYS { chunk.terms[m.value][block] = term[m.value]; });
  }
}

// Four tokens of each of sixteen channels as signed bytes, twice the value if E2M1: four J of
// those in V's word.
template <Code C, int J>
KVANT_INLINE __m512i value_bytes(__m512i w) {
  if constexpr (C == Code::kS8) return w;
  const __m512i low = J == 0 ? w : _mm512_srli_epi16(w, 4);
  return _mm512_permutexvar_epi8(low, _mm512_load_si512(C == Code::kU4 ? kSignedU4 : kSignedE2m1));
}

// A chunk's sums of one row and sixteen channels: acc = acc * factor + sums * scale, and the term
// of the block if codes have zeros.
template <Code C>
KVANT_INLINE void add_sum(float* acc, __m512i sum, F factor, F scale, const float& term) {
  F all = fma({_mm512_cvtepi32_ps(sum)}, scale, mul(load(acc), factor));
  if constexpr (C == Code::kU4) all = add(all, bcast(term));
  store(acc, all);
}
template <Code C>
KVANT_INLINE void add_sums(float* acc, __m512i high, __m512i low, F factor, F scale,
                           const float& term) {
  add_sum<C>(acc, _mm512_add_epi32(_mm512_slli_epi32(high, 8), low), factor, scale, term);
}

// Divides `scratch` and starts with the first chunk.
template <typename Side, typename Page>
KVANT_INLINE void begin_chunks(const IntegerValueArgs& a, const Page& page, ValueChunk& chunk) {
  const int64_t num_blocks = Side::blocks_of(page);
  chunk.first_tile = 0;
  chunk.weights = a.scratch;
  chunk.scales =
      reinterpret_cast<int16_t*>(chunk.weights + num_blocks * kMaxTileRows * kWeightBytes);
  chunk.zeros = reinterpret_cast<float*>(chunk.scales + num_blocks * kChunkTokens);
  chunk.order = _mm512_load_si512((Side::C == Code::kS8 ? kBytesOfFour : kBytesOfEight).at);
}

// Calls f(ValueSide) for the codes and scales of `a`.
template <typename Fn>
KVANT_INLINE void with_value_side(const IntegerValueArgs& a, Fn&& f) {
  switch (a.scale) {
    case PageScale::kE4m3: return f(ValueSide<Code::kE2m1, PageScale::kE4m3>{});
    case PageScale::kE8m0: return f(ValueSide<Code::kE2m1, PageScale::kE8m0>{});
    case PageScale::kF16Pair: return f(ValueSide<Code::kU4, PageScale::kF16Pair>{});
    default: f(ValueSide<Code::kS8, PageScale::kF16>{});
  }
}

}  // namespace
}  // namespace kvant::backend::cpu::avx512
