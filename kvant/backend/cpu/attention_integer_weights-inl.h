// Weights of attention times the scales of V, as the integers that products with V's codes take.
// Included like attention_integer-inl.h.
#pragma once

#include "kvant/backend/cpu/attention_integer-inl.h"

namespace kvant::backend::cpu::avx512 {
namespace {

constexpr int kChunkTokens = 64;
constexpr float kLargestWeight = 32767.0f;
constexpr float kValueOffset = 8.0f;  // of 4-bit unsigned codes, which goes into their zeros
constexpr int kWeightBytes = 2 * kChunkTokens;  // upper bytes, then lower ones

// Up to 64 tokens of a page. Words and bytes have tokens in the order of V's bytes
// (value_bytes()).
struct ValueChunk {
  int first_tile = 0;
  int num_tiles = 0;                 // with weights
  int16_t* scales = nullptr;         // [blocks][64], at most 2^15 - 1
  float* zeros = nullptr;            // [blocks][64], in token order
  F power[kChunkTokens / kLanes];    // of each token: what its scales have to be multiplied by
  __m512i order;                     // for store_words()
  uint8_t* weights = nullptr;        // of a tile of rows: [blocks][rows][2][64]
  float weight_scale[kMaxTileRows];  // of those rows
  float terms[kMaxTileRows]
             [kMaxHeadDim / 16];  // of rows and blocks: the sums of weights times zeros
};

// Token of place i % 8 of eight when V's words are taken apart four tokens at a time.
constexpr int token_of_place(int tokens_in_word, int i) {
  return tokens_in_word == 8 ? i % 4 * 2 + i / 4 : i;
}

// Where packs_epi32 leaves each token of 32.
template <int kTokens>
constexpr Order<int16_t, 32> order_of_words() {
  Order<int16_t, 32> order{};
  for (int i = 0; i < 32; ++i) {
    const int t = i / 8 * 8 + token_of_place(kTokens, i % 8);
    order.at[i] = static_cast<int16_t>(t % 16 / 4 * 8 + t / 16 * 4 + t % 4);
  }
  return order;
}
alignas(64) constexpr Order<int16_t, 32> kWordsOfFour = order_of_words<4>();
alignas(64) constexpr Order<int16_t, 32> kWordsOfEight = order_of_words<8>();

// Bytes of 64 tokens in the order of words of eight.
constexpr Order<int8_t, 64> order_of_bytes() {
  Order<int8_t, 64> order{};
  for (int i = 0; i < 64; ++i) {
    order.at[i] = static_cast<int8_t>(i / 8 * 8 + token_of_place(8, i % 8));
  }
  return order;
}
alignas(64) constexpr Order<int8_t, 64> kBytesOfEight = order_of_bytes();

// The upper bytes of 32 words, then the lower ones.
constexpr Order<int8_t, 64> order_of_halves() {
  Order<int8_t, 64> order{};
  for (int i = 0; i < 64; ++i) {
    order.at[i] = static_cast<int8_t>(i < 32 ? 2 * i + 1 : 2 * (i - 32));
  }
  return order;
}
alignas(64) constexpr Order<int8_t, 64> kUpperThenLower = order_of_halves();

// Four vectors of 32-bit integers, in token order, as 64 words in the order of V's bytes.
KVANT_INLINE void to_words(const __m512i* v, __m512i order, __m512i* words) {
  unroll<2>([&](auto half) KVANT_ALWAYS {
    constexpr int h = decltype(half)::value;
    words[h] = _mm512_permutexvar_epi16(order, _mm512_packs_epi32(v[2 * h], v[2 * h + 1]));
  });
}

// E4M3 scales, in integers: a scale is m 2^(e - 10) with m < 16, and 2^11 m 2^(e - E) is exact down
// to 2^-11 of the token's largest exponent E. The power is 2^(E - 21).
void prepare_e4m3_scales(const IntegerValueArgs& a, ValueChunk& chunk, Fetcher& fetcher) {
  const int num_blocks = (a.head_dim + a.block - 1) / a.block;
  const int tokens = a.page_tokens < kChunkTokens ? a.page_tokens : kChunkTokens;
  const __mmask64 valid = tokens == 64 ? ~__mmask64{0} : (__mmask64{1} << tokens) - 1;
  const uint8_t* codes = a.scales + chunk.first_tile * kLanes;
  const auto load_codes = [&](int b) KVANT_ALWAYS {
    return _mm512_maskz_loadu_epi8(valid, codes + static_cast<int64_t>(b) * a.page_tokens);
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
  const __m512i by_words = _mm512_load_si512(kBytesOfEight.at);
  const auto widen = [&](__m512i x, int half) KVANT_ALWAYS {
    return _mm512_cvtepu8_epi16(half == 0 ? _mm512_castsi512_si256(x)
                                          : _mm512_extracti64x4_epi64(x, 1));
  };
  const auto exponent = [&](__m512i x)
                            KVANT_ALWAYS { return _mm512_max_epi16(_mm512_srli_epi16(x, 3), one); };
  largest = _mm512_permutexvar_epi8(by_words, largest);
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
      _mm512_storeu_si512(chunk.scales + b * kChunkTokens + 32 * half.value, scale);
    });
    if (b % 4 == 3) fetcher.step(4);
  }
}

// Any other scales: rounded to 2^-14 of the token's power of two, which the power has 2^-14 times.
template <PageScale S>
void prepare_float_scales(const IntegerValueArgs& a, ValueChunk& chunk) {
  const int num_blocks = (a.head_dim + a.block - 1) / a.block;
  const int page_tiles = (a.page_tokens < kChunkTokens ? a.page_tokens : kChunkTokens) / kLanes;
  const int64_t block_bytes = static_cast<int64_t>(a.page_tokens) * scale_stride(S);
  const auto side_of = [&](int b, int tile) KVANT_ALWAYS {
    return load_scales(S, a.scales + b * block_bytes, (chunk.first_tile + tile) * kLanes,
                       2 * a.page_tokens);
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
    to_words(scale, chunk.order, words);
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

// Weights of M rows times the tokens' powers, as integers of which the largest is 2^15 - 1; these
// times the scales of each block, as bytes of a tile of `rows`.
template <int M>
void prepare_weights(const IntegerValueArgs& a, ValueChunk& chunk, int row, int rows,
                     Fetcher& fetcher) {
  const int num_blocks = (a.head_dim + a.block - 1) / a.block;
  const float* p = a.p + static_cast<int64_t>(row) * a.page_tokens + chunk.first_tile * kLanes;
  const auto weight_of = [&](auto m, auto tile) KVANT_ALWAYS {
    if (tile.value >= chunk.num_tiles) return zero();
    return mul(load(p + m.value * a.page_tokens + tile.value * kLanes), chunk.power[tile.value]);
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
  float all_max[M];
  max_rows(largest, all_max);
  __m512i words[M][2];
  unroll<M>([&](auto m) KVANT_ALWAYS {
    const float unit = all_max[m.value] * (1.0f / kLargestWeight);
    const F inverse = alternating(unit > 0x1p-100f ? 1.0f / unit : 0.0f);
    __m512i weight[4];
    unroll<4>([&](auto tile) KVANT_ALWAYS {
      F w;
      if constexpr (kKeeps) {
        w = x[m.value][tile.value];
      } else {
        w = weight_of(m, tile);
      }
      weight[tile.value] = _mm512_cvtps_epi32(mul(w, inverse).v);
    });
    to_words(weight, chunk.order, words[m.value]);
    chunk.weight_scale[m.value] = unit * value_factor(a.code) * 0x1p15f;
  });
  const __m512i halves = _mm512_load_si512(kUpperThenLower.at);
  for (int b = 0; b < num_blocks; ++b) {
    uint8_t* to = chunk.weights + static_cast<int64_t>(b) * rows * kWeightBytes;
    unroll<2>([&](auto h) KVANT_ALWAYS {
      const __m512i scale = _mm512_loadu_si512(chunk.scales + b * kChunkTokens + 32 * h.value);
      unroll<M>([&](auto m) KVANT_ALWAYS {
        const __m512i product =
            _mm512_abs_epi16(_mm512_mulhrs_epi16(words[m.value][h.value], scale));
        const __m512i bytes = _mm512_permutexvar_epi8(halves, product);
        uint8_t* upper = to + m.value * kWeightBytes + 32 * h.value;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(upper), _mm512_castsi512_si256(bytes));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(upper + kChunkTokens),
                            _mm512_extracti64x4_epi64(bytes, 1));
      });
    });
    if (b % 2 == 1) fetcher.step(2);
  }
}

void prepare_scales(const IntegerValueArgs& a, ValueChunk& chunk, Fetcher& fetcher) {
  switch (a.scale) {
    case PageScale::kE4m3: return prepare_e4m3_scales(a, chunk, fetcher);
    case PageScale::kE8m0: return prepare_float_scales<PageScale::kE8m0>(a, chunk);
    case PageScale::kF16Pair: return prepare_float_scales<PageScale::kF16Pair>(a, chunk);
    default: prepare_float_scales<PageScale::kF16>(a, chunk);
  }
}

// The sums over tokens of weights times zeros, which all channels of a block get, for M rows.
template <int M>
KVANT_INLINE void sum_zeros(const IntegerValueArgs& a, ValueChunk& chunk, int row) {
  const float* p = a.p + static_cast<int64_t>(row) * a.page_tokens + chunk.first_tile * kLanes;
  for (int c = 0; c < a.head_dim; c += a.block) {
    const float* zeros = chunk.zeros + c / a.block * kChunkTokens;
    F sum[M];
    unroll<M>([&](auto m) KVANT_ALWAYS { sum[m.value] = zero(); });
    for (int tile = 0; tile < chunk.num_tiles; ++tile) {
      const F z = load(zeros + tile * kLanes);
      unroll<M>([&](auto m) KVANT_ALWAYS {
        sum[m.value] = fma(load(p + m.value * a.page_tokens + tile * kLanes), z, sum[m.value]);
      });
    }
    float term[M];
    sum_rows(sum, term);
    unroll<M>([&](auto m) KVANT_ALWAYS { chunk.terms[m.value][c / a.block] = term[m.value]; });
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
KVANT_INLINE void add_sums(float* acc, __m512i high, __m512i low, F factor, F scale,
                           const float& term) {
  const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
  F all = fma({_mm512_cvtepi32_ps(sum)}, scale, mul(load(acc), factor));
  if constexpr (C == Code::kU4) all = add(all, bcast(term));
  store(acc, all);
}

// Divides `scratch` and starts with the first chunk.
ValueChunk first_chunk(const IntegerValueArgs& a) {
  const int num_blocks = (a.head_dim + a.block - 1) / a.block;
  ValueChunk chunk;
  uint8_t* at = a.scratch;
  const auto take = [&](int64_t bytes) {
    uint8_t* result = at;
    at += (bytes + 63) / 64 * 64;
    return result;
  };
  chunk.weights = take(int64_t{num_blocks} * kMaxTileRows * kWeightBytes);
  chunk.scales = reinterpret_cast<int16_t*>(take(int64_t{num_blocks} * kChunkTokens * 2));
  chunk.zeros = reinterpret_cast<float*>(take(int64_t{num_blocks} * kChunkTokens * 4));
  chunk.order = _mm512_load_si512((a.code == Code::kS8 ? kWordsOfFour : kWordsOfEight).at);
  return chunk;
}

}  // namespace
}  // namespace kvant::backend::cpu::avx512
