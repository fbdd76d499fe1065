// Products of queries or weights and floating-point codes in AMX tiles of BF16, any number of rows.
//
// Pages as they are stored are rows of B: two channels of each of sixteen tokens (K) or two tokens
// of each of sixteen channels (V), as 32-bit words. E4M3 codes become BF16 on the way. Queries and
// weights are fp32 and become the sum of two BF16 (16 bits): eight rows of upper parts and eight of
// lower ones are a tile of A. A row's sums run over channels or tokens in tiles of 32, whatever the
// number of rows (ADR 0003).
#define KVANT_LEVEL avx512
#include "kvant/backend/cpu/amx_tiles-inl.h"
#include "kvant/backend/cpu/attention_fetch-inl.h"
#include "kvant/backend/cpu/attention_kernels.h"
#include "kvant/backend/cpu/attention_simd.h"

namespace kvant::backend::cpu::amx {
namespace {

using namespace avx512;  // NOLINT(google-build-using-namespace): the level's vector language

constexpr int kTileRows = 8;      // query rows of a tile: upper parts, then lower parts
constexpr int kDepth = 32;        // channels or tokens of a tile
constexpr int kMaxTiles = 4;      // of sixteen tokens, at once
constexpr int kProductSteps = 4;  // of a Fetcher: a product takes as long as so many words unpacked
constexpr int kMaxPageTokens = 128;

alignas(64) constexpr int8_t kZeros[kTileBytes] = {};

// E4M3 as BF16 is 2^-105 times the code's value (to_bf16()), rows of A are 2^64 times theirs: sums
// keep clear of what fp32 flushes to zero.
template <Code C>
constexpr float kRowFactor = C == Code::kE4m3 ? 0x1p64f : 1.0f;
// What sums are multiplied by for code values divided by kE4m3Factor, and for code values.
constexpr float kUnscaledE4m3 = 0x1p41f / kE4m3Factor;
constexpr float kScaledE4m3 = 0x1p41f;

// E4M3 codes of four channels or tokens a word as two rows of B: the even two and the odd two.
// Moved into f16 they are 2^-8 of their values, subnormals included; times 2^15 none is subnormal,
// and f16's exponent and upper mantissa are those of a BF16 with another bias.
KVANT_INLINE __m512i to_bf16(__m512i upper_bytes) {
  const __m512i half =
      _mm512_and_si512(_mm512_srai_epi16(upper_bytes, 1), _mm512_set1_epi16(-0x4080));
  const __m512i normal = _mm512_castph_si512(
      _mm512_mul_ph(_mm512_castsi512_ph(half), _mm512_castsi512_ph(_mm512_set1_epi16(0x7800))));
  return _mm512_and_si512(_mm512_srai_epi16(normal, 3), _mm512_set1_epi16(-0x7001));
}
KVANT_INLINE void unpack_e4m3(__m512i words, uint8_t* rows) {
  _mm512_store_si512(rows, to_bf16(_mm512_slli_epi16(words, 8)));
  _mm512_store_si512(rows + 64, to_bf16(words));
}

// Fp32 values of 32 channels or tokens as two rows of A, in the order of B's rows.
template <Code C>
KVANT_INLINE void store_parts(F first, F second, uint8_t* upper, uint8_t* lower) {
  const F x[2] = {mul(first, bcast(kRowFactor<C>)), mul(second, bcast(kRowFactor<C>))};
  const auto join = [](const F(&v)[2]) __attribute__((always_inline)) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v[1].v, v[0].v));
  };
  const __m512i top = join(x);
  const F rest[2] = {
      sub(x[0],
          as_float({_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(top)), 16)})),
      sub(x[1], as_float({_mm512_slli_epi32(
                    _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(top, 1)), 16)}))};
  const auto order = [](__m512i v) __attribute__((always_inline)) {
    if constexpr (C != Code::kE4m3) return v;
    // Of each four: 0, 2, 1, 3.
    return _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(v, 0xd8), 0xd8);
  };
  _mm512_store_si512(upper, order(top));
  _mm512_store_si512(lower, order(join(rest)));
}

// `x` [rows][stride] as A: [row / 8][32 values][16 rows][64 bytes], zeros for rows that are not
// there; of values from `count` on, too.
template <Code C>
void pack_rows(const float* x, int64_t stride, int rows, int count, uint8_t* tiles) {
  for (int row = 0; row < rows; row += kTileRows) {
    for (int c = 0; c < count; c += kDepth, tiles += kTileBytes) {
      for (int r = 0; r < kTileRows; ++r) {
        F first = zero(), second = zero();
        if (row + r < rows) {
          first = load(x + (row + r) * stride + c);
          second = load(x + (row + r) * stride + c + kLanes);
        }
        store_parts<C>(first, second, tiles + r * 64, tiles + (kTileRows + r) * 64);
      }
    }
  }
}

void pack_queries(const float* q, int rows, int head_dim, Code code, uint8_t* tiles) {
  code == Code::kE4m3 ? pack_rows<Code::kE4m3>(q, head_dim, rows, head_dim, tiles)
                      : pack_rows<Code::kBf16>(q, head_dim, rows, head_dim, tiles);
}

// ---- scores ----

// Sums of A's sixteen rows with N tiles of sixteen tokens: [n][16 rows][16 tokens].
template <int N>
KVANT_INLINE void multiply_keys(const uint8_t* queries, const uint8_t* keys, int head_dim,
                                float* sums, Fetcher& fetcher) {
  unroll<N>([&](auto n) { load_tile<4 + decltype(n)::value>(kZeros, 64); });
  for (int c = 0; c < head_dim; c += kDepth) {
    load_tile<0>(queries + c / kDepth * kTileBytes, 64);
    unroll<N>([&](auto n) {
      constexpr int kC = 4 + decltype(n)::value;
      load_tile<1 + kC % 2>(keys + (int64_t{n.value} * head_dim + c) * (kLanes * 2), 64);
      multiply_bf16<kC>();
      fetcher.step(kProductSteps);
    });
  }
  unroll<N>([&](auto n) { store_tile<4 + decltype(n)::value>(sums + n.value * 256, 64); });
}

// `factor` [tokens] from the first of the tiles on, or null: 1.
template <int N>
void score_rows(const ScoreArgs& a, int row, int tile, const uint8_t* keys, const float* factor,
                Fetcher& fetcher) {
  alignas(64) float sums[N * 256];
  multiply_keys<N>(a.q_tiles + static_cast<int64_t>(row) * a.head_dim * 4,
                   keys + int64_t{tile} * a.head_dim * (kLanes * 2), a.head_dim, sums, fetcher);
  const int rows = a.rows - row < kTileRows ? a.rows - row : kTileRows;
  for (int r = 0; r < rows; ++r) {
    float* s = a.s + static_cast<int64_t>(row + r) * a.page_tokens + tile * kLanes;
    unroll<N>([&](auto n) {
      const float* sum = sums + n.value * 256 + r * kLanes;
      F score = add(load(sum), load(sum + kTileRows * kLanes));
      if (factor != nullptr) score = mul(score, load(factor + (tile + n.value) * kLanes));
      store(s + n.value * kLanes, score);
    });
  }
}

// What each token's sums have to be multiplied by, [tokens], from its scale if it has one.
void load_factors(const DecodeArgs& side, int num_tiles, float* factor) {
  for (int t = 0; t < num_tiles * kLanes; t += kLanes) {
    store(factor + t, side.scale == PageScale::kF32
                          ? mul(as_float(load_i(side.scales + 4 * t)), bcast(kScaledE4m3))
                          : bcast(kUnscaledE4m3));
  }
}

void scores(const DecodeArgs& side, const ScoreArgs& a) {
  const bool is_e4m3 = side.code == Code::kE4m3;
  const int words = a.num_tiles * (a.head_dim / 4);
  const int row_steps = (a.rows + kTileRows - 1) / kTileRows;
  Fetcher fetcher(a.fetch, (is_e4m3 ? words : 0) +
                               kProductSteps * row_steps * a.num_tiles * (a.head_dim / kDepth));
  alignas(64) float factors[kMaxPageTokens];
  const float* factor = nullptr;
  const uint8_t* keys = side.codes;
  if (is_e4m3) {
    auto* rows = reinterpret_cast<uint8_t*>(side.out);
    for (int i = 0; i < words; ++i) {
      unpack_e4m3(_mm512_loadu_si512(side.codes + i * 64), rows + i * 128);
      fetcher.step();
    }
    load_factors(side, a.num_tiles, factors);
    factor = factors;
    keys = rows;
  }
  static constexpr TileConfig kConfig = whole_tiles();
  _tile_loadconfig(&kConfig);
  for (int tile = 0; tile < a.num_tiles; tile += kMaxTiles) {
    for (int row = 0; row < a.rows; row += kTileRows) {
      with_count<kMaxTiles>(a.num_tiles - tile, [&](auto n) {
        score_rows<decltype(n)::value>(a, row, tile, keys, factor, fetcher);
      });
    }
  }
  _tile_release();
}

// ---- values ----

// V as rows of B, [head_dim / 16][tokens / 2][64 bytes], in whole tiles of 32 tokens: tokens from
// token_end on, which may be anything, are zeros.
struct Values {
  const uint8_t* rows;
  int64_t group_bytes;
};

Values unpack_values(const DecodeArgs& side, const ValueArgs& a, int tokens, Fetcher& fetcher) {
  const bool is_e4m3 = side.code == Code::kE4m3;
  const int in_word = is_e4m3 ? 4 : 2;
  const int64_t stored_bytes = static_cast<int64_t>(a.page_tokens) / in_word * 64;
  if (!is_e4m3 && tokens == a.token_end) return {side.codes, stored_bytes};
  auto* rows = reinterpret_cast<uint8_t*>(side.out);
  const int64_t group_bytes = int64_t{tokens} / 2 * 64;
  for (int group = 0; group < a.head_dim / kLanes; ++group) {
    const uint8_t* codes = side.codes + group * stored_bytes;
    uint8_t* to = rows + group * group_bytes;
    for (int t = 0; t < tokens; t += in_word, codes += 64, to += 64 * in_word / 2) {
      const int left = a.token_end - t;
      __m512i words = _mm512_setzero_si512();
      if (left > 0) words = _mm512_loadu_si512(codes);
      if (left > 0 && left < in_word) {
        words = _mm512_and_si512(words, _mm512_set1_epi32((1 << (32 / in_word * left)) - 1));
      }
      if (is_e4m3) {
        unpack_e4m3(words, to);
      } else {
        _mm512_store_si512(to, words);
      }
      fetcher.step();
    }
  }
  return {rows, group_bytes};
}

// Weights of up to eight rows as A, [tokens / 32][16 rows][64 bytes]; times the tokens' scales.
template <Code C>
void pack_weights(const ValueArgs& a, int row, int rows, int tokens, const float* scale,
                  uint8_t* tiles) {
  for (int t = 0; t < tokens; t += kDepth, tiles += kTileBytes) {
    for (int r = 0; r < kTileRows; ++r) {
      F x[2] = {zero(), zero()};
      if (r < rows) {
        unroll<2>([&](auto i) {
          const int first = t + i.value * kLanes;
          const int left = a.token_end - first;
          const auto valid = static_cast<__mmask16>(left >= kLanes ? 0xffff
                                                    : left > 0     ? (1 << left) - 1
                                                                   : 0);
          const float* p = a.p + static_cast<int64_t>(row + r) * a.page_tokens + first;
          x[i.value].v = _mm512_maskz_loadu_ps(valid, p);
          if (scale != nullptr) {
            x[i.value] = mul(x[i.value], {_mm512_maskz_loadu_ps(valid, scale + first)});
          }
        });
      }
      store_parts<C>(x[0], x[1], tiles + r * 64, tiles + (kTileRows + r) * 64);
    }
  }
}

// N groups of sixteen channels of up to eight rows.
template <int N>
void value_rows(const ValueArgs& a, int row, int rows, int group, int tokens, const Values& values,
                const uint8_t* weights, float factor, Fetcher& fetcher) {
  alignas(64) float sums[N * 256];
  const uint8_t* b = values.rows + group * values.group_bytes;
  unroll<N>([&](auto n) { load_tile<4 + decltype(n)::value>(kZeros, 64); });
  for (int t = 0; t < tokens; t += kDepth) {
    load_tile<0>(weights + t / kDepth * kTileBytes, 64);
    unroll<N>([&](auto n) {
      constexpr int kC = 4 + decltype(n)::value;
      load_tile<1 + kC % 2>(b + n.value * values.group_bytes + int64_t{t} * kLanes * 2, 64);
      multiply_bf16<kC>();
      fetcher.step(kProductSteps);
    });
  }
  unroll<N>([&](auto n) { store_tile<4 + decltype(n)::value>(sums + n.value * 256, 64); });
  for (int r = 0; r < rows; ++r) {
    float* out = a.acc + (row + r) * a.acc_stride + group * kLanes;
    const F before = bcast(a.factor[row + r]);
    unroll<N>([&](auto n) {
      const float* sum = sums + n.value * 256 + r * kLanes;
      const F all = add(load(sum), load(sum + kTileRows * kLanes));
      float* to = out + n.value * kLanes;
      store(to, fma(all, bcast(factor), mul(load(to), before)));
    });
  }
}

void values(const DecodeArgs& side, const ValueArgs& a) {
  const bool is_e4m3 = side.code == Code::kE4m3;
  const int groups = a.head_dim / kLanes;
  const int tokens = (a.token_end + kDepth - 1) / kDepth * kDepth;
  const int row_steps = (a.rows + kTileRows - 1) / kTileRows;
  const bool unpacks = is_e4m3 || tokens != a.token_end;
  Fetcher fetcher(a.fetch, (unpacks ? groups * tokens / (is_e4m3 ? 4 : 2) : 0) +
                               kProductSteps * row_steps * groups * (tokens / kDepth));
  const Values rows_of_b = unpack_values(side, a, tokens, fetcher);
  const auto* scale =
      side.scale == PageScale::kF32 ? reinterpret_cast<const float*>(side.scales) : nullptr;
  const float factor = !is_e4m3 ? 1.0f : scale != nullptr ? kScaledE4m3 : kUnscaledE4m3;
  alignas(64) uint8_t weights[kMaxPageTokens / kDepth * kTileBytes];
  static constexpr TileConfig kConfig = whole_tiles();
  _tile_loadconfig(&kConfig);
  for (int row = 0; row < a.rows; row += kTileRows) {
    const int rows = a.rows - row < kTileRows ? a.rows - row : kTileRows;
    is_e4m3 ? pack_weights<Code::kE4m3>(a, row, rows, tokens, scale, weights)
            : pack_weights<Code::kBf16>(a, row, rows, tokens, scale, weights);
    for (int group = 0; group < groups;) {
      group += with_power<kMaxTiles>(groups - group, [&](auto n) {
        value_rows<decltype(n)::value>(a, row, rows, group, tokens, rows_of_b, weights, factor,
                                       fetcher);
      });
    }
  }
  _tile_release();
}

}  // namespace

extern const TileKernels kTileKernels;
const TileKernels kTileKernels = {channel_scores, pack_queries, scores, values};

}  // namespace kvant::backend::cpu::amx
