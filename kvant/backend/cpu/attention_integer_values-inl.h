// Integer products of weights and values; included by attention_integer_avx512.cc only.
#pragma once

#include "kvant/backend/cpu/attention_integer-inl.h"

namespace kvant::backend::cpu::avx512 {
namespace {

constexpr int kChunkTokens = 64;
// Values are below 2^14: a chunk's products then sum up within 31 bits.
constexpr float kLargestWeight = 32767.0f;
constexpr float kLargestWeightSum = 131000.0f;
constexpr float kValueOffset = 8.0f;  // of 4-bit unsigned codes, which goes into their zeros

// Up to 64 tokens of a page. 16-bit arrays hold tokens in the order of V's words.
struct ValueChunk {
  int first_tile = 0;
  int num_tiles = 0;              // with weights
  int16_t* weights = nullptr;     // [rows][64]
  float* weight_scale = nullptr;  // [rows]
  int16_t* scales = nullptr;      // [blocks][64], at most 2^14
  float* zeros = nullptr;         // [blocks][64], in token order
};

// Token of place i % 8 of eight when V's words are taken apart two tokens at a time
// (value_words()): words of four tokens or of eight.
constexpr int token_of_place(int tokens_in_word, int i) {
  return tokens_in_word == 8 ? i % 2 * 4 + i / 2 : i / 4 * 4 + i % 2 * 2 + i / 2 % 2;
}

// For store_words: where packs_epi32 leaves each token of 32.
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

__m512i packed_word_order(Code code) {
  return _mm512_load_si512((code == Code::kS8 ? kWordsOfFour : kWordsOfEight).at);
}

// Four vectors of 32-bit integers, in token order, as 64 16-bit ones in the order of V's words.
KVANT_INLINE void store_words(int16_t* to, const __m512i* v, __m512i order) {
  unroll<2>([&](auto half) KVANT_ALWAYS {
    constexpr int h = decltype(half)::value;
    const __m512i packed = _mm512_packs_epi32(v[2 * h], v[2 * h + 1]);
    _mm512_storeu_si512(to + 32 * h, _mm512_permutexvar_epi16(order, packed));
  });
}

// vpmulhrsw rounds halves up, and products of codes and scales often end in one: a bias that long
// contexts do not average out. So scales and weights of odd tokens are negative: half of the
// halves are rounded down.
KVANT_INLINE F alternating(float x) {
  return {_mm512_mask_blend_ps(0xaaaa, _mm512_set1_ps(x), _mm512_set1_ps(-x))};
}

// E4M3 scales, in integers: a scale is m 2^(e - 10) with m < 16, and 2^10 m 2^(e - E) is exact down
// to 2^-10 of the token's largest exponent E. `power` gets 2^(E - 20).
void prepare_e4m3_scales(const IntegerValueArgs& a, const ValueChunk& chunk, F* power,
                         Fetcher& fetcher) {
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
    power[tile.value] = as_float(shl({_mm512_add_epi32(e, _mm512_set1_epi32(127 - 20))}, 23));
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
          _mm512_srlv_epi16(_mm512_slli_epi16(mantissa, 10), _mm512_sub_epi16(top[half.value], e));
      _mm512_storeu_si512(chunk.scales + b * kChunkTokens + 32 * half.value,
                          _mm512_mask_sub_epi16(scale, 0xcccccccc, _mm512_setzero_si512(), scale));
    });
    fetcher.step();
  }
}

// Any other scales: rounded to 2^-13 of the token's power of two, which `power` gets 2^-13 times.
void prepare_float_scales(const IntegerValueArgs& a, const ValueChunk& chunk, __m512i order,
                          F* power) {
  const int num_blocks = (a.head_dim + a.block - 1) / a.block;
  const int page_tiles = (a.page_tokens < kChunkTokens ? a.page_tokens : kChunkTokens) / kLanes;
  const int64_t block_bytes = static_cast<int64_t>(a.page_tokens) * scale_stride(a.scale);
  const auto side_of = [&](int b, int tile) KVANT_ALWAYS {
    return load_scales(a.scale, a.scales + b * block_bytes, (chunk.first_tile + tile) * kLanes,
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
    power[tile].v = _mm512_scalef_ps(_mm512_set1_ps(0x1p-13f), exponent);
    inverse[tile].v =
        _mm512_scalef_ps(alternating(0x1p13f).v, _mm512_sub_ps(_mm512_setzero_ps(), exponent));
  }
  for (int b = 0; b < num_blocks; ++b) {
    __m512i scale[4];
    for (int tile = 0; tile < 4; ++tile) {
      scale[tile] = _mm512_setzero_si512();
      if (tile >= page_tiles) continue;
      const ScalePair side = side_of(b, tile);
      scale[tile] = _mm512_cvtps_epi32(_mm512_mul_ps(side.scale.v, inverse[tile].v));
      if (a.scale == PageScale::kF16Pair) {
        store(chunk.zeros + b * kChunkTokens + tile * kLanes,
              fma(side.scale, bcast(kValueOffset), side.zero));
      }
    }
    store_words(chunk.scales + b * kChunkTokens, scale, order);
  }
}

// Products of words and scales, halved fifteen times, are values divided by this and the power.
constexpr float value_factor(Code code) {
  return code == Code::kS8 ? 128.0f : 8.0f;
}

// Weights times the tokens' powers, as integers that use the bits there are: 15 for the largest,
// and as many as the sum of all may have.
template <int M>
void prepare_weights(const IntegerValueArgs& a, const ValueChunk& chunk, int row, __m512i order,
                     const F* power, Fetcher& fetcher) {
  const float* p = a.p + static_cast<int64_t>(row) * a.page_tokens + chunk.first_tile * kLanes;
  F x[M][4];
  F largest[M], sum[M];
  unroll<M>([&](auto m) KVANT_ALWAYS {
    largest[m.value] = sum[m.value] = zero();
    unroll<4>([&](auto tile) KVANT_ALWAYS {
      x[m.value][tile.value] = zero();
      if (tile.value < chunk.num_tiles) {
        x[m.value][tile.value] =
            mul(load(p + m.value * a.page_tokens + tile.value * kLanes), power[tile.value]);
      }
      largest[m.value] = max(largest[m.value], x[m.value][tile.value]);
      sum[m.value] = add(sum[m.value], x[m.value][tile.value]);
    });
    fetcher.step();
  });
  float all_max[M], all_sum[M];
  max_rows(largest, all_max);
  sum_rows(sum, all_sum);
  unroll<M>([&](auto m) KVANT_ALWAYS {
    const float by_largest = all_max[m.value] * (1.0f / kLargestWeight);
    const float by_sum = all_sum[m.value] * (1.0f / kLargestWeightSum);
    const float unit = by_largest > by_sum ? by_largest : by_sum;
    const F inverse = alternating(unit > 0x1p-100f ? 1.0f / unit : 0.0f);
    __m512i weight[4];
    unroll<4>([&](auto tile) KVANT_ALWAYS {
      weight[tile.value] = _mm512_cvtps_epi32(mul(x[m.value][tile.value], inverse).v);
    });
    store_words(chunk.weights + (row + m.value) * kChunkTokens, weight, order);
    chunk.weight_scale[row + m.value] = unit * value_factor(a.code);
    fetcher.step();
  });
}

// Two tokens of each of sixteen channels, as words: pair J of those in V's word.
template <Code C, int J>
KVANT_INLINE __m512i value_words(__m512i w) {
  if constexpr (C == Code::kS8) {
    return J == 0 ? _mm512_slli_epi16(w, 8) : _mm512_and_si512(w, _mm512_set1_epi16(-256));
  } else if constexpr (C == Code::kE2m1) {
    return upper_bytes_of<J>(w, _mm512_load_si512(kE2m1Times8));
  } else {
    const __m512i on_top = J == 3 ? w : _mm512_slli_epi16(w, 12 - 4 * J);
    // (on_top & 0xf000) ^ 0x8000: less kValueOffset
    return _mm512_ternarylogic_epi32(on_top, _mm512_set1_epi16(-0x1000), _mm512_set1_epi16(-0x8000),
                                     0x6a);
  }
}

// M query rows with N groups of sixteen channels.
template <Code C, int M, int N>
KVANT_OWN_FRAME void value_tile(const IntegerValueArgs& a, const ValueChunk& chunk, int row,
                                int group, Fetcher& fetcher) {
  constexpr int kTokens = C == Code::kS8 ? 4 : 8;  // in a word
  const int64_t group_bytes = static_cast<int64_t>(a.page_tokens) / kTokens * 64;
  const uint8_t* codes = a.codes + group * group_bytes + chunk.first_tile * (kLanes / kTokens * 64);
  const int16_t* scales[N];
  unroll<N>([&](auto n) KVANT_ALWAYS {
    scales[n.value] = chunk.scales + (group + n.value) * kLanes / a.block * kChunkTokens;
  });
  const int16_t* weights = chunk.weights + row * kChunkTokens;
  __m512i acc[M][N];
  unroll<M>([&](auto m) KVANT_ALWAYS {
    unroll<N>([&](auto n) KVANT_ALWAYS { acc[m.value][n.value] = _mm512_setzero_si512(); });
  });
  const int tokens = chunk.num_tiles * kLanes;
  for (int t = 0; t < tokens; t += kTokens, codes += 64) {
    __m512i words[N];
    unroll<N>([&](auto n) KVANT_ALWAYS {
      words[n.value] = _mm512_loadu_si512(codes + n.value * group_bytes);
    });
    unroll<kTokens / 2>([&](auto j) KVANT_ALWAYS {
      const int at = t + 2 * j.value;
      __m512i weight[M];
      unroll<M>([&](auto m) KVANT_ALWAYS {
        weight[m.value] = bcast_dword(weights + m.value * kChunkTokens + at);
      });
      unroll<N>([&](auto n) KVANT_ALWAYS {
        const __m512i v = _mm512_mulhrs_epi16(value_words<C, j.value>(words[n.value]),
                                              bcast_dword(scales[n.value] + at));
        unroll<M>([&](auto m) KVANT_ALWAYS {
          acc[m.value][n.value] = _mm512_dpwssd_epi32(acc[m.value][n.value], v, weight[m.value]);
        });
      });
    });
    fetcher.step();
  }
  const bool first_chunk = chunk.first_tile == 0;
  unroll<M>([&](auto m) KVANT_ALWAYS {
    const F scale = bcast(chunk.weight_scale[row + m.value]);
    const F factor = bcast(first_chunk ? a.factor[row + m.value] : 1.0f);
    float* out = a.acc + (row + m.value) * a.acc_stride + group * kLanes;
    unroll<N>([&](auto n) KVANT_ALWAYS {
      const F before = mul(load(out + n.value * kLanes), factor);
      store(out + n.value * kLanes,
            fma({_mm512_cvtepi32_ps(acc[m.value][n.value])}, scale, before));
    });
  });
}

// Adds the sum over tokens of weights times zeros to all channels of a block.
void add_zeros(const IntegerValueArgs& a, const ValueChunk& chunk) {
  for (int r = 0; r < a.rows; ++r) {
    const float* p = a.p + static_cast<int64_t>(r) * a.page_tokens + chunk.first_tile * kLanes;
    for (int c = 0; c < a.head_dim; c += a.block) {
      const float* zeros = chunk.zeros + c / a.block * kChunkTokens;
      F sum = zero();
      for (int tile = 0; tile < chunk.num_tiles; ++tile) {
        sum = fma(load(p + tile * kLanes), load(zeros + tile * kLanes), sum);
      }
      const F term = bcast(sum_lanes(sum));
      float* out = a.acc + r * a.acc_stride;
      for (int i = c; i < c + a.block && i < a.head_dim; i += kLanes) {
        store(out + i, add(load(out + i), term));
      }
    }
  }
}

// Few rows keep few sums going: more channels at a time hide the latency of the products.
constexpr int groups_at_once(int rows) {
  return rows <= 2 ? 8 : 4;
}

template <Code C>
void value_chunk(const IntegerValueArgs& a, const ValueChunk& chunk, __m512i order,
                 Fetcher& fetcher) {
  F power[4];
  if (a.scale == PageScale::kE4m3) {
    prepare_e4m3_scales(a, chunk, power, fetcher);
  } else {
    prepare_float_scales(a, chunk, order, power);
  }
  const int num_groups = a.head_dim / kLanes;
  for (int r = 0; r < a.rows; r += kMaxRows) {
    with_count<kMaxRows>(a.rows - r, [&](auto m) {
      constexpr int M = decltype(m)::value;
      constexpr int kGroups = groups_at_once(M);
      prepare_weights<M>(a, chunk, r, order, power, fetcher);
      for (int group = 0; group < num_groups;) {
        group += with_power<kGroups>(num_groups - group, [&](auto n) {
          value_tile<C, M, decltype(n)::value>(a, chunk, r, group, fetcher);
        });
      }
    });
  }
  if (a.scale == PageScale::kF16Pair) add_zeros(a, chunk);
}

void values(const IntegerValueArgs& a) {
  const int num_blocks = (a.head_dim + a.block - 1) / a.block;
  ValueChunk chunk;
  uint8_t* at = a.scratch;
  const auto take = [&](int64_t bytes) {
    uint8_t* result = at;
    at += (bytes + 63) / 64 * 64;
    return result;
  };
  chunk.weights = reinterpret_cast<int16_t*>(take(int64_t{a.rows} * kChunkTokens * 2));
  chunk.weight_scale = reinterpret_cast<float*>(take(int64_t{a.rows} * 4));
  chunk.scales = reinterpret_cast<int16_t*>(take(int64_t{num_blocks} * kChunkTokens * 2));
  chunk.zeros = reinterpret_cast<float*>(take(int64_t{num_blocks} * kChunkTokens * 4));
  const __m512i order = packed_word_order(a.code);
  const int last_rows = a.rows % kMaxRows == 0 ? kMaxRows : a.rows % kMaxRows;
  const int groups = groups_at_once(a.rows < kMaxRows ? last_rows : kMaxRows);
  const int row_steps = (a.rows + kMaxRows - 1) / kMaxRows;
  const int chunks = (a.num_tiles * kLanes + kChunkTokens - 1) / kChunkTokens;
  const int scale_steps = a.scale == PageScale::kE4m3 ? num_blocks : 0;
  const int weight_steps = a.rows + 4 * row_steps;
  const int word_steps = a.num_tiles * kLanes / (a.code == Code::kS8 ? 4 : 8);
  const int product_steps = word_steps * row_steps * ((a.head_dim / kLanes + groups - 1) / groups);
  Fetcher fetcher(a.fetch, chunks * (scale_steps + weight_steps) + product_steps);
  for (int first = 0; first < a.num_tiles; first += kChunkTokens / kLanes) {
    chunk.first_tile = first;
    const int tiles = a.num_tiles - first;
    chunk.num_tiles = tiles < kChunkTokens / kLanes ? tiles : kChunkTokens / kLanes;
    switch (a.code) {
      case Code::kS8: value_chunk<Code::kS8>(a, chunk, order, fetcher); break;
      case Code::kU4: value_chunk<Code::kU4>(a, chunk, order, fetcher); break;
      default: value_chunk<Code::kE2m1>(a, chunk, order, fetcher); break;
    }
  }
}

}  // namespace
}  // namespace kvant::backend::cpu::avx512
