// Products of queries or weights and floating-point codes as dots of BF16 pairs (vdpbf16ps), any
// number of rows: where the processor has as many of these as FMAs, decoding to fp32 is what is
// saved, and a product of a pair with both parts of a query or weight costs as much as two FMAs.
//
// Pages as they are stored are words of two BF16. E4M3 codes become BF16 by lookups of both their
// bytes: in registers for few rows, once for all rows otherwise. A row's sums run over channels or
// tokens in the same order either way (ADR 0003).
#define KVANT_LEVEL avx512
#define KVANT_HALF_RATE_512
#include "kvant/backend/cpu/attention_bf16-inl.h"
#include "kvant/backend/cpu/attention_fetch-inl.h"
#include "kvant/backend/cpu/attention_kernels.h"
#include "kvant/backend/cpu/attention_scales-inl.h"
#include "kvant/backend/cpu/attention_simd.h"

namespace kvant::backend::cpu::avx512 {
namespace {

constexpr int kFewRows = 8;  // codes are unpacked for each four of them

// ---- codes ----

constexpr int kCodesBelow = 8;  // E4M3 become 2^-8 of their values: what PageScale::kNone leaves

// A byte of the BF16 that a magnitude of E4M3 becomes.
constexpr Order<uint8_t, 128> bytes_of_e4m3(int shift) {
  Order<uint8_t, 128> bytes{};
  for (int code = 1; code < 128; ++code) {
    int exponent = code >> 3, mantissa = code & 7;
    if (exponent == 0) {  // a subnormal: the first bit becomes the implied one
      for (exponent = 1; mantissa < 8; --exponent) mantissa *= 2;
      mantissa -= 8;
    }
    bytes.at[code] =
        static_cast<uint8_t>(((exponent + 120 - kCodesBelow) << 7 | mantissa << 4) >> shift);
  }
  return bytes;
}
constexpr Order<uint8_t, 128> kUpperBytes = bytes_of_e4m3(8);
constexpr Order<uint8_t, 128> kLowerBytes = bytes_of_e4m3(0);

// Words of codes as they are stored: unpack() gives kPairs words of two BF16.
struct Bf16Words {
  static constexpr int kPairs = 1;
  KVANT_INLINE static void unpack(__m512i words, __m512i* pairs) { pairs[0] = words; }
};
struct E4m3Words {
  static constexpr int kPairs = 2;  // codes 0 and 2, 1 and 3
  KVANT_INLINE static void unpack(__m512i words, __m512i* pairs) {
    const auto look_up = [&](const Order<uint8_t, 128>& table) KVANT_ALWAYS {
      return _mm512_permutex2var_epi8(_mm512_load_si512(table.at), words,
                                      _mm512_load_si512(table.at + 64));
    };
    // Blends and separate operations: those of three operands slow products down, too.
    constexpr __mmask64 kOdd = 0xaaaaaaaaaaaaaaaa;
    const __m512i sign = _mm512_and_si512(words, _mm512_set1_epi8(-128));
    const __m512i upper = _mm512_or_si512(look_up(kUpperBytes), sign);
    const __m512i lower = look_up(kLowerBytes);
    pairs[0] = _mm512_mask_blend_epi8(kOdd, lower, _mm512_slli_epi16(upper, 8));
    pairs[1] = _mm512_mask_blend_epi8(kOdd, _mm512_srli_epi16(lower, 8), upper);
  }
};

// How codes are multiplied: `Words` of them, with E8M0 scales of 32 channels or without, and the
// order of what they become.
template <typename Words_, Code kOrder_, bool kScaled_>
struct Codes {
  using Words = Words_;
  static constexpr Code kOrder = kOrder_;
  static constexpr bool kScaled = kScaled_;
  static constexpr int kPairs = Words::kPairs;
  static constexpr int kInWord = 2 * kPairs;  // channels (K) or tokens (V)
  static constexpr bool kUnpacked = kPairs == 1 && kOrder == Code::kE4m3;

  // `exponents_of(j)`: what the scale adds to those of pair j.
  template <typename Fn>
  KVANT_INLINE static void unpack(__m512i words, __m512i* pairs, const Fn& exponents_of) {
    Words::unpack(words, pairs);
    if constexpr (kScaled) {
      unroll<kPairs>([&](auto j) KVANT_ALWAYS {
        pairs[j.value] = add_exponents(pairs[j.value], exponents_of(j.value));
      });
    }
  }
};
using Bf16Codes = Codes<Bf16Words, Code::kBf16, false>;
using Unpacked = Codes<Bf16Words, Code::kE4m3, false>;  // E4M3, by unpack_keys() or unpack_values()

// Calls f(Codes) for a side.
template <typename Fn>
KVANT_INLINE void with_codes(const DecodeArgs& side, Fn&& f) {
  if (side.code != Code::kE4m3) return f(Bf16Codes{});
  if (side.scale == PageScale::kE8m0) return f(Codes<E4m3Words, Code::kE4m3, true>{});
  f(Codes<E4m3Words, Code::kE4m3, false>{});
}

// What sums of a side's codes have to be multiplied by, but for scales of tokens.
float sum_factor(const DecodeArgs& side) {
  if (side.code != Code::kE4m3 || side.scale == PageScale::kNone) return 1.0f;
  return side.scale == PageScale::kE8m0 ? 1.0f / kScaledUnit : kE4m3Factor;
}

KVANT_INLINE void add_dots(__m512& sum, __m512i a, __m512i b) {
  sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// Sixteen-lane vectors of sums of M rows. Sums of few rows are few chains of latencies; those of
// many, with what is unpacked, need all registers.
template <typename C>
constexpr int vectors_of(int rows) {
  return rows <= 2 || C::kPairs == 1 ? 4 : 2;
}

// Register tiles of all rows and `vectors`.
template <typename C>
int tiles_of(int rows, int vectors) {
  const auto tiles = [&](int of_rows) {
    return (vectors + vectors_of<C>(of_rows) - 1) / vectors_of<C>(of_rows);
  };
  const int rest = rows % kMaxRows;
  return rows / kMaxRows * tiles(kMaxRows) + (rest > 0 ? tiles(rest) : 0);
}

// Both parts of a row: [upper or lower][width] BF16.
void pack_queries(const float* q, int rows, int head_dim, Code code, int, uint8_t* tiles) {
  const auto pack = [&](auto c) {
    for (int r = 0; r < rows; ++r, q += head_dim, tiles += int64_t{4} * head_dim) {
      for (int i = 0; i < head_dim; i += 2 * kLanes) {
        uint8_t* to = tiles + 2 * i;
        store_parts<static_cast<Code>(decltype(c)::value)>(load(q + i), load(q + i + kLanes), to,
                                                           to + 2 * head_dim);
      }
    }
  };
  if (code == Code::kE4m3) return pack(Int<static_cast<int>(Code::kE4m3)>{});
  pack(Int<static_cast<int>(Code::kBf16)>{});
}

// ---- scores ----

// Exponents of block `b` of the tile's sixteen tokens.
KVANT_INLINE __m512i key_exponents(const DecodeArgs& side, int tile, int b) {
  const int64_t at = (int64_t{tile} * (side.head_dim / 32) + b) * kLanes;
  const __m512i token = load_u8(side.scales + at).v;
  return e8m0_as_addends<kCodesBelow>(_mm512_or_si512(token, _mm512_slli_epi32(token, 16)));
}

// M rows with N tiles of sixteen tokens.
template <typename C, int M, int N>
KVANT_OWN_FRAME void score_tile(const DecodeArgs& side, const ScoreArgs& a, int row, int tile,
                                const float* factor, Fetcher& fetcher) {
  const int64_t d = a.head_dim, tile_bytes = d / C::kInWord * 64;
  const int block = C::kScaled ? 32 : a.head_dim;
  const uint8_t* codes = side.codes + tile * tile_bytes;
  const uint8_t* q = a.q_tiles + row * d * 4;
  __m512 sum[M][N];
  unroll<M>([&](auto m) KVANT_ALWAYS {
    unroll<N>([&](auto n) KVANT_ALWAYS { sum[m.value][n.value] = _mm512_setzero_ps(); });
  });
  for (int b = 0; b * block < a.head_dim; ++b) {
    __m512i exponents[N];
    unroll<N>([&](auto n) KVANT_ALWAYS {
      if constexpr (C::kScaled) exponents[n.value] = key_exponents(side, tile + n.value, b);
    });
    for (int c = 0; c < block; c += C::kInWord, codes += 64, q += 2 * C::kInWord) {
      __m512i keys[N][C::kPairs];
      unroll<N>([&](auto n) KVANT_ALWAYS {
        C::unpack(_mm512_loadu_si512(codes + n.value * tile_bytes), keys[n.value],
                  [&](int) KVANT_ALWAYS { return exponents[n.value]; });
      });
      unroll<C::kPairs>([&](auto j) KVANT_ALWAYS {
        unroll<M>([&](auto m) KVANT_ALWAYS {
          const uint8_t* at = q + m.value * d * 4 + 4 * j.value;
          const __m512i upper = bcast_dword(at), lower = bcast_dword(at + 2 * d);
          unroll<N>([&](auto n) KVANT_ALWAYS {
            add_dots(sum[m.value][n.value], keys[n.value][j.value], upper);
          });
          unroll<N>([&](auto n) KVANT_ALWAYS {
            add_dots(sum[m.value][n.value], keys[n.value][j.value], lower);
          });
        });
      });
      fetcher.step();
    }
  }
  float* s = a.s + static_cast<int64_t>(row) * a.page_tokens + tile * kLanes;
  unroll<N>([&](auto n) KVANT_ALWAYS {
    const F scale = load(factor + (tile + n.value) * kLanes);
    unroll<M>([&](auto m) KVANT_ALWAYS {
      store(s + m.value * a.page_tokens + n.value * kLanes, mul({sum[m.value][n.value]}, scale));
    });
  });
}

template <typename C>
void scores_of(const DecodeArgs& side, const ScoreArgs& a, const float* factor) {
  Fetcher fetcher(a.fetch, tiles_of<C>(a.rows, a.num_tiles) * (a.head_dim / C::kInWord));
  constexpr int kStep = 4;  // tiles that stay in the caches for all rows
  for (int first = 0; first < a.num_tiles; first += kStep) {
    const int end = first + kStep < a.num_tiles ? first + kStep : a.num_tiles;
    for (int r = 0; r < a.rows; r += kMaxRows) {
      with_count<kMaxRows>(a.rows - r, [&](auto m) {
        for (int tile = first; tile < end;) {
          tile += with_power<vectors_of<C>(m.value)>(end - tile, [&](auto n) {
            score_tile<C, m.value, n.value>(side, a, r, tile, factor, fetcher);
          });
        }
      });
    }
  }
}

// Keys of a page as BF16, in the layout of BF16 pages.
template <typename C>
void unpack_keys(const DecodeArgs& side, int num_tiles, uint8_t* out) {
  const uint8_t* codes = side.codes;
  const int block = C::kScaled ? 32 : side.head_dim;
  for (int tile = 0; tile < num_tiles; ++tile) {
    for (int b = 0; b * block < side.head_dim; ++b) {
      __m512i exponents = _mm512_setzero_si512();
      if constexpr (C::kScaled) exponents = key_exponents(side, tile, b);
      for (int c = 0; c < block; c += C::kInWord, codes += 64) {
        __m512i pairs[C::kPairs];
        C::unpack(_mm512_loadu_si512(codes), pairs, [&](int) KVANT_ALWAYS { return exponents; });
        for (const __m512i pair : pairs) {
          _mm512_store_si512(out, pair);
          out += 64;
        }
      }
    }
  }
}

void load_factors(const DecodeArgs& side, int num_tiles, float* factor) {
  const F plain = bcast(sum_factor(side));
  for (int t = 0; t < num_tiles * kLanes; t += kLanes) {
    const bool of_tokens = side.scale == PageScale::kF32;
    store(factor + t, of_tokens ? mul(as_float(load_i(side.scales + 4 * t)), plain) : plain);
  }
}

void scores(const DecodeArgs& side, const ScoreArgs& a) {
  alignas(64) float factor[kMaxPageTokens];
  load_factors(side, a.num_tiles, factor);
  with_codes(side, [&](auto c) {
    using C = decltype(c);
    if (C::kPairs == 1 || a.rows <= kFewRows) return scores_of<C>(side, a, factor);
    DecodeArgs unpacked = side;
    unpacked.codes = reinterpret_cast<const uint8_t*>(side.out);
    unpack_keys<C>(side, a.num_tiles, reinterpret_cast<uint8_t*>(side.out));
    scores_of<Unpacked>(unpacked, a, factor);
  });
}

// ---- values ----

constexpr int kWeightParts = 4 * kMaxPageTokens;  // bytes of a row: [upper or lower][tokens] BF16

// Word `word` of a group. Tokens from `token_end` on, which may be anything, are zeros, and were so
// when they were unpacked.
template <typename C>
KVANT_INLINE __m512i load_values(const uint8_t* codes, int word, int token_end) {
  const __m512i words = _mm512_loadu_si512(codes + int64_t{64} * word);
  const int left = token_end - word * C::kInWord;
  if (C::kUnpacked || left >= C::kInWord) return words;
  return _mm512_and_si512(words, _mm512_set1_epi32((1 << (32 / C::kInWord * left)) - 1));
}
template <typename C>
constexpr int value_words(int token_end) {
  constexpr int kTogether = C::kOrder == Code::kE4m3 ? 4 : 2;
  return (token_end + kTogether - 1) / kTogether * kTogether / C::kInWord;
}

// What is added to exponents of word `word` of a group.
template <typename C>
KVANT_INLINE __m512i value_exponents(const uint16_t* exponents, int word, int pair) {
  return bcast_dword(exponents + 2 * (word * C::kPairs + pair));
}

// M rows, whose `weights` those are, with N groups of sixteen channels.
template <typename C, int M, int N>
KVANT_OWN_FRAME void value_tile(const DecodeArgs& side, const ValueArgs& a, const uint8_t* weights,
                                const uint16_t* exponents, int row, int group, Fetcher& fetcher) {
  const int64_t group_bytes = int64_t{a.page_tokens} / C::kInWord * 64;
  const uint8_t* codes = side.codes + group * group_bytes;
  const int words = value_words<C>(a.token_end);
  __m512 sum[M][N];
  unroll<M>([&](auto m) KVANT_ALWAYS {
    unroll<N>([&](auto n) KVANT_ALWAYS { sum[m.value][n.value] = _mm512_setzero_ps(); });
  });
  for (int word = 0; word < words; ++word) {
    __m512i values[N][C::kPairs];
    unroll<N>([&](auto n) KVANT_ALWAYS {
      C::unpack(load_values<C>(codes + n.value * group_bytes, word, a.token_end), values[n.value],
                [&](int pair) KVANT_ALWAYS {
                  const uint16_t* of = exponents + (group + n.value) / 2 * a.page_tokens;
                  return value_exponents<C>(of, word, pair);
                });
    });
    unroll<C::kPairs>([&](auto j) KVANT_ALWAYS {
      unroll<M>([&](auto m) KVANT_ALWAYS {
        const uint8_t* at = weights + m.value * kWeightParts + 4 * (word * C::kPairs + j.value);
        const __m512i upper = bcast_dword(at), lower = bcast_dword(at + kWeightParts / 2);
        unroll<N>([&](auto n) KVANT_ALWAYS {
          add_dots(sum[m.value][n.value], values[n.value][j.value], upper);
        });
        unroll<N>([&](auto n) KVANT_ALWAYS {
          add_dots(sum[m.value][n.value], values[n.value][j.value], lower);
        });
      });
    });
    fetcher.step();
  }
  const F factor = bcast(sum_factor(side));
  unroll<M>([&](auto m) KVANT_ALWAYS {
    float* out = a.acc + (row + m.value) * a.acc_stride + group * kLanes;
    const F before = bcast(a.factor[row + m.value]);
    unroll<N>([&](auto n) KVANT_ALWAYS {
      float* to = out + n.value * kLanes;
      store(to, fma({sum[m.value][n.value]}, factor, mul(load(to), before)));
    });
  });
}

// Weights of M rows, times the tokens' scales, as both their parts; 0 from token_end on.
template <typename C, int M>
KVANT_INLINE void pack_weights(const DecodeArgs& side, const ValueArgs& a, int row,
                               uint8_t* weights) {
  const auto* scale = reinterpret_cast<const float*>(side.scales);
  for (int t = 0; t < a.token_end; t += 2 * kLanes) {
    unroll<M>([&](auto m) KVANT_ALWAYS {
      F x[2];
      unroll<2>([&](auto i) KVANT_ALWAYS {
        const int first = t + i.value * kLanes;
        const __mmask16 valid = lane_range(0, a.token_end - first);
        x[i.value].v =
            _mm512_maskz_loadu_ps(valid, a.p + int64_t{row + m.value} * a.page_tokens + first);
        if (side.scale == PageScale::kF32) {
          x[i.value] = mul(x[i.value], {_mm512_maskz_loadu_ps(valid, scale + first)});
        }
      });
      uint8_t* to = weights + m.value * kWeightParts + 2 * t;
      store_parts<C::kOrder>(x[0], x[1], to, to + kWeightParts / 2);
    });
  }
}

template <typename C>
void values_of(const DecodeArgs& side, const ValueArgs& a, const uint16_t* exponents) {
  const int groups = a.head_dim / kLanes;
  Fetcher fetcher(a.fetch, tiles_of<C>(a.rows, groups) * value_words<C>(a.token_end));
  alignas(64) uint8_t weights[kMaxRows * kWeightParts];
  for (int r = 0; r < a.rows; r += kMaxRows) {
    with_count<kMaxRows>(a.rows - r, [&](auto m) {
      pack_weights<C, m.value>(side, a, r, weights);
      for (int group = 0; group < groups;) {
        group += with_power<vectors_of<C>(m.value)>(groups - group, [&](auto n) {
          value_tile<C, m.value, n.value>(side, a, weights, exponents, r, group, fetcher);
        });
      }
    });
  }
}

// Values of a page as BF16, in the layout of BF16 pages but for the order of tokens.
template <typename C>
void unpack_values(const DecodeArgs& side, int token_end, const uint16_t* exponents, uint8_t* out) {
  const int64_t group_bytes = int64_t{side.page_tokens} / C::kInWord * 64;
  for (int group = 0; group < side.head_dim / kLanes; ++group) {
    const uint16_t* of = exponents + group / 2 * side.page_tokens;
    for (int word = 0; word < value_words<C>(token_end); ++word) {
      __m512i pairs[C::kPairs];
      C::unpack(load_values<C>(side.codes + group * group_bytes, word, token_end), pairs,
                [&](int pair) KVANT_ALWAYS { return value_exponents<C>(of, word, pair); });
      uint8_t* const to = out + (group * group_bytes + int64_t{word} * 64) * C::kPairs;
      for (int j = 0; j < C::kPairs; ++j) _mm512_store_si512(to + j * 64, pairs[j]);
    }
  }
}

void values(const DecodeArgs& side, const ValueArgs& a) {
  with_codes(side, [&](auto c) {
    using C = decltype(c);
    alignas(64) uint16_t exponents[C::kScaled ? kMaxHeadDim / 32 * kMaxPageTokens : 1];
    if constexpr (C::kScaled) load_exponents<kCodesBelow>(side, exponents);
    if (C::kPairs == 1 || a.rows <= kFewRows) return values_of<C>(side, a, exponents);
    DecodeArgs unpacked = side;
    unpacked.codes = reinterpret_cast<const uint8_t*>(side.out);
    unpack_values<C>(side, a.token_end, exponents, reinterpret_cast<uint8_t*>(side.out));
    values_of<Unpacked>(unpacked, a, exponents);
  });
}

}  // namespace

extern const Bf16Kernels kBf16Kernels;
const Bf16Kernels kBf16Kernels = {pack_queries, scores, values};

}  // namespace kvant::backend::cpu::avx512
