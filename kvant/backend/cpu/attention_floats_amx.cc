// Products of queries or weights and floating-point codes in AMX tiles of BF16, any number of rows;
// keys of E2M1 with E4M3 scales, too.
//
// Pages as they are stored are rows of B: two channels of each of sixteen tokens (K) or two tokens
// of each of sixteen channels (V), as 32-bit words. E4M3 codes, and E2M1 codes times their E4M3
// scales, become BF16 on the way. Queries and weights are fp32 and become the sum of two BF16 (16
// bits): four or eight rows of upper parts and as many of lower ones are a tile of A. A row's sums
// run over channels or tokens in tiles of 32, whatever the number of rows (ADR 0003).
#define KVANT_LEVEL avx512
#include "kvant/backend/cpu/amx_tiles-inl.h"
#include "kvant/backend/cpu/attention_bf16_amx-inl.h"
#include "kvant/backend/cpu/attention_fetch-inl.h"
#include "kvant/backend/cpu/attention_kernels.h"
#include "kvant/backend/cpu/attention_shape-inl.h"
#include "kvant/backend/cpu/attention_simd.h"

namespace kvant::backend::cpu::amx {
namespace {

constexpr int kDepth = 32;        // channels or tokens of a tile
constexpr int kMaxTiles = 4;      // of sixteen tokens, at once
constexpr int kProductSteps = 4;  // of a Fetcher: a product takes as long as so many words unpacked

// Queries as A: [row / tile_rows][32 channels][2 * tile_rows][64 bytes], each tile's share 1024
// bytes, zeros for rows that are not there.
template <Code C>
void pack_rows(const float* q, int rows, int head_dim, int tile_rows, uint8_t* tiles) {
  for (int row = 0; row < rows; row += tile_rows) {
    for (int c = 0; c < head_dim; c += kDepth, tiles += kTileBytes) {
      for (int r = 0; r < tile_rows; ++r) {
        F first = zero(), second = zero();
        if (row + r < rows) {
          const float* x = q + static_cast<int64_t>(row + r) * head_dim + c;
          first = load(x);
          second = load(x + kLanes);
        }
        store_row_parts<C>(first, second, tiles + r * 64, tiles + (tile_rows + r) * 64);
      }
    }
  }
}

void pack_queries(const float* q, int rows, int head_dim, Code code, int tile_rows,
                  uint8_t* tiles) {
  with_tile_code(code, [&](auto c) {
    pack_rows<static_cast<Code>(decltype(c)::value)>(q, rows, head_dim, tile_rows, tiles);
  });
}

// Adds the products of A's rows and N tiles of B, which lie `stride` bytes apart.
template <int N>
KVANT_INLINE void multiply_tiles(const uint8_t* a, const uint8_t* b, int64_t stride,
                                 Fetcher& fetcher) {
  load_tile<0>(a, 64);
  unroll<N>([&](auto n) KVANT_ALWAYS {
    constexpr int kC = 4 + decltype(n)::value;
    load_tile<1 + kC % 2>(b + n.value * stride, 64);
    multiply_bf16<kC>();
    fetcher.step(kProductSteps);
  });
}
template <int N>
KVANT_INLINE void clear_sums() {
  unroll<N>([&](auto n) KVANT_ALWAYS { load_tile<4 + decltype(n)::value>(kZeroTile, 64); });
}
template <int N>
KVANT_INLINE void store_sums(float* sums) {  // [n][16 rows][16 lanes]
  unroll<N>([&](auto n)
                KVANT_ALWAYS { store_tile<4 + decltype(n)::value>(sums + n.value * 256, 64); });
}

// Tiles of B are multiplied at least one step after they are unpacked: a tile is loaded from the
// cache, which its rows reach only then. E2M1 is unpacked further ahead: the unit takes two hundred
// cycles to begin again, which unpacking in turn with products costs each time, but not all at
// once, or it falls asleep. (E4M3 is faster in turn, from memory.)
template <Code C>
constexpr int kDepthsAhead = C == Code::kE2m1 ? 2 : 1;

// ---- scores ----

// Channels [c, c + 32) of sixteen tokens as a tile of B.
template <Code C, typename Page>
KVANT_INLINE void unpack_keys(const DecodeArgs& side, const Page& page, int tile, int c,
                              uint8_t* rows, Fetcher& fetcher) {
  const int64_t at = static_cast<int64_t>(tile) * page.head_dim + c;  // times 16 values
  if constexpr (C == Code::kE4m3) {
    const uint8_t* codes = side.codes + at * kLanes;
    const auto unpack = [&](auto&& scale) KVANT_ALWAYS {
      for (int i = 0; i < kDepth / 4; ++i) {
        unpack_e4m3(_mm512_loadu_si512(codes + 64 * i), rows + 128 * i, scale);
        if (i % 2 == 1) fetcher.step(2);
      }
    };
    if (side.scale != PageScale::kE8m0) {
      unpack([](auto, __m512i bf16) KVANT_ALWAYS { return bf16; });
    } else {  // one for all of these channels
      const __m512i token = load_u8(side.scales + at / 2).v;
      const __m512i addends =
          e8m0_as_addends<kCodesBelow>(_mm512_or_si512(token, _mm512_slli_epi32(token, 16)));
      unpack([&](auto, __m512i bf16) KVANT_ALWAYS { return add_exponents(bf16, addends); });
    }
  } else {
    const uint8_t* codes = side.codes + at * kLanes / 2;
    const uint8_t* scales = side.scales + at;
    for (int block = 0; block < 2; ++block) {
      const __m512i scale = scales_as_half(scales + block * kLanes);
      unroll<2>([&](auto word) KVANT_ALWAYS {
        const int i = 2 * block + word.value;
        unpack_e2m1(_mm512_loadu_si512(codes + 64 * i), rows + 256 * i, scale);
      });
    }
    fetcher.step(8);
  }
}

// Where tiles of K are: as they are stored, or unpacked while the first rows are multiplied.
struct KeyTiles {
  uint8_t* unpacked = nullptr;    // [head_dim / 32][num_tiles][1024]
  const float* factor = nullptr;  // what each token's sums have to be multiplied by; null: 1
};

template <Code C, int N, typename Page>
KVANT_OWN_FRAME void score_rows(const DecodeArgs& side, const ScoreArgs& a, const Page& page,
                                int row, int tile, const KeyTiles& keys, Fetcher& fetcher) {
  constexpr bool kStored = C == Code::kBf16;
  alignas(64) float sums[N * 256];
  const uint8_t* queries =
      a.q_tiles + int64_t{row / a.tile_rows} * (page.head_dim / kDepth) * kTileBytes;
  const int64_t depth_bytes = kStored ? kTileBytes : int64_t{page.num_tiles} * kTileBytes;
  const int64_t tile_bytes = kStored ? int64_t{page.head_dim} * (kLanes * 2) : kTileBytes;
  const uint8_t* first = (kStored ? side.codes : keys.unpacked) + tile * tile_bytes;
  const bool unpacks = !kStored && row == 0;
  const auto unpack = [&](int depth) KVANT_ALWAYS {
    if constexpr (!kStored) {
      uint8_t* to = keys.unpacked + depth * depth_bytes + tile * tile_bytes;
      for (int n = 0; n < N; ++n) {
        unpack_keys<C>(side, page, tile + n, depth * kDepth, to + n * tile_bytes, fetcher);
      }
    }
  };
  const int depths = page.head_dim / kDepth;
  for (int i = 0; unpacks && i < kDepthsAhead<C> && i < depths; ++i) unpack(i);
  clear_sums<N>();
  for (int depth = 0; depth < depths; ++depth) {
    if (unpacks && depth + kDepthsAhead<C> < depths) unpack(depth + kDepthsAhead<C>);
    multiply_tiles<N>(queries + depth * kTileBytes, first + depth * depth_bytes, tile_bytes,
                      fetcher);
  }
  store_sums<N>(sums);
  const int rows = a.rows - row < a.tile_rows ? a.rows - row : a.tile_rows;
  const float *upper = sums, *lower = sums + a.tile_rows * kLanes;
  float* s = a.s + static_cast<int64_t>(row) * page.page_tokens + tile * kLanes;
  for (int r = 0; r < rows; ++r, upper += kLanes, lower += kLanes, s += page.page_tokens) {
    unroll<N>([&](auto n) KVANT_ALWAYS {
      F score = add(load(upper + n.value * 256), load(lower + n.value * 256));
      if constexpr (!kStored) score = mul(score, load(keys.factor + (tile + n.value) * kLanes));
      store(s + n.value * kLanes, score);
    });
  }
}

// What sums of a side have to be multiplied by. E4M3 without scales is left divided by kE4m3Factor.
template <Code C>
float sum_factor(const DecodeArgs& side) {
  if (C != Code::kE4m3) return kSumFactor<C>;
  if (side.scale == PageScale::kE8m0) return 1.0f / (kRowFactor<C> * kScaledUnit);
  return side.scale == PageScale::kNone ? kSumFactor<C> / kE4m3Factor : kSumFactor<C>;
}

template <Code C>
void load_factors(const DecodeArgs& side, int num_tiles, float* factor) {
  const F plain = bcast(sum_factor<C>(side));
  for (int t = 0; t < num_tiles * kLanes; t += kLanes) {
    store(factor + t, side.scale == PageScale::kF32
                          ? mul(as_float(load_i(side.scales + 4 * t)), plain)
                          : plain);
  }
}

template <Code C, typename Page>
void scores_of(const DecodeArgs& side, const ScoreArgs& a, const Page& page) {
  const int row_steps = (a.rows + a.tile_rows - 1) / a.tile_rows;
  const int unpack_steps = C == Code::kBf16 ? 0 : page.num_tiles * (page.head_dim / 4);
  Fetcher fetcher(a.fetch, unpack_steps + kProductSteps * row_steps * page.num_tiles *
                                              (page.head_dim / kDepth));
  alignas(64) float factor[kMaxPageTokens];
  KeyTiles keys;
  if constexpr (C != Code::kBf16) {
    load_factors<C>(side, page.num_tiles, factor);
    keys = {reinterpret_cast<uint8_t*>(side.out), factor};
  }
  for (int tile = 0; tile < page.num_tiles; tile += kMaxTiles) {
    for (int row = 0; row < a.rows; row += a.tile_rows) {
      with_count<kMaxTiles>(page.num_tiles - tile, [&](auto n) {
        score_rows<C, decltype(n)::value>(side, a, page, row, tile, keys, fetcher);
      });
    }
  }
}

void scores(const DecodeArgs& side, const ScoreArgs& a) {
  with_tile_code(side.code, [&](auto c) {
    with_page(a, [&](const auto& page) {
      scores_of<static_cast<Code>(decltype(c)::value)>(side, a, page);
    });
  });
}

// ---- values ----

// The page's tokens up to the last that has a weight.
template <typename Page>
constexpr int tokens_of(const Page& page, const ValueArgs& a) {
  return kIsWhole<Page> ? page.page_tokens : a.token_end;
}

// Tokens [t, t + 32) of a group of sixteen channels as a tile of B; those from token_end on, which
// may be anything, are zeros. `scale(i, row)` has tokens i and i + 1 in the order of B's rows.
template <Code C, typename Page, typename Scale>
KVANT_INLINE void unpack_values(const DecodeArgs& side, const ValueArgs& a, const Page& page,
                                int group, int t, uint8_t* rows, Fetcher& fetcher, Scale&& scale) {
  constexpr int kInWord = C == Code::kE4m3 ? 4 : 2;
  const int64_t at = static_cast<int64_t>(group) * page.page_tokens + t;
  const uint8_t* codes = side.codes + at / kInWord * 64;
  unroll<kDepth / kInWord>([&](auto i) KVANT_ALWAYS {
    constexpr int kFirst = decltype(i)::value * kInWord;
    uint8_t* to = rows + kFirst * 32;
    __m512i words = _mm512_loadu_si512(codes + 64 * i.value);
    const int left = tokens_of(page, a) - t - kFirst;
    if (left < kInWord) {
      const int mask = left > 0 ? (1 << (32 / kInWord * left)) - 1 : 0;
      words = _mm512_and_si512(words, _mm512_set1_epi32(mask));
    }
    if constexpr (C == Code::kE4m3) {
      unpack_e4m3(words, to, [&](auto row, __m512i bf16) KVANT_ALWAYS {
        return scale(kFirst + 2 * decltype(row)::value, bf16);
      });
    } else {
      _mm512_store_si512(to, words);
    }
    if (i.value % 2 == 1) fetcher.step(kInWord);
  });
}

// Weights of up to tile_rows rows as A, [tokens / 32][1024 bytes] like pack_rows(); times the
// tokens' scales. Rows that are not there are zeros from before.
template <Code C, typename Page>
KVANT_INLINE void pack_weights(const ValueArgs& a, const Page& page, int row, int rows,
                               const float* scale, uint8_t* tiles) {
  for (int t = 0; t < tokens_of(page, a); t += kDepth, tiles += kTileBytes) {
    for (int r = 0; r < rows; ++r) {
      F x[2];
      unroll<2>([&](auto i) KVANT_ALWAYS {
        const int first = t + i.value * kLanes;
        const int left = tokens_of(page, a) - first;
        const auto valid = static_cast<__mmask16>(left >= kLanes ? 0xffff
                                                  : left > 0     ? (1 << left) - 1
                                                                 : 0);
        const float* p = a.p + static_cast<int64_t>(row + r) * page.page_tokens + first;
        x[i.value].v = _mm512_maskz_loadu_ps(valid, p);
        if (scale != nullptr) {
          x[i.value] = mul(x[i.value], {_mm512_maskz_loadu_ps(valid, scale + first)});
        }
      });
      store_row_parts<C>(x[0], x[1], tiles + r * 64, tiles + (a.tile_rows + r) * 64);
    }
  }
}

struct ValueTiles {
  uint8_t* unpacked = nullptr;  // [head_dim / 16][tokens / 32][1024], as KeyTiles; null: as stored
  const uint8_t* weights = nullptr;
  const uint16_t* exponents = nullptr;  // of load_exponents()
  float factor = 1.0f;
};

// N groups of sixteen channels of up to tile_rows rows.
template <Code C, int N, typename Page>
KVANT_OWN_FRAME void value_rows(const DecodeArgs& side, const ValueArgs& a, const Page& page,
                                int row, int group, const ValueTiles& values, Fetcher& fetcher) {
  alignas(64) float sums[N * 256];
  const bool stored = values.unpacked == nullptr;
  const int tokens = (tokens_of(page, a) + kDepth - 1) / kDepth * kDepth;
  const int64_t group_bytes = int64_t{stored ? page.page_tokens : tokens} * (kLanes * 2);
  const uint8_t* first = (stored ? side.codes : values.unpacked) + group * group_bytes;
  const bool unpacks = !stored && row == 0;
  const auto unpack = [&](int t) KVANT_ALWAYS {
    uint8_t* to = values.unpacked + group * group_bytes + t / kDepth * kTileBytes;
    for (int n = 0; n < N; ++n, to += group_bytes) {
      if (values.exponents == nullptr) {
        unpack_values<C>(side, a, page, group + n, t, to, fetcher,
                         [](int, __m512i bf16) KVANT_ALWAYS { return bf16; });
      } else {
        const uint16_t* of = values.exponents + (group + n) / 2 * page.page_tokens + t;
        unpack_values<C>(side, a, page, group + n, t, to, fetcher,
                         [&](int i, __m512i bf16) KVANT_ALWAYS {
                           int32_t pair;
                           __builtin_memcpy(&pair, of + i, sizeof(pair));
                           return add_exponents(bf16, _mm512_set1_epi32(pair));
                         });
      }
    }
  };
  clear_sums<N>();
  if (unpacks) unpack(0);
  for (int t = 0; t < tokens; t += kDepth) {
    if (unpacks && t + kDepth < tokens) unpack(t + kDepth);
    const int64_t at = t / kDepth * kTileBytes;
    multiply_tiles<N>(values.weights + at, first + at, group_bytes, fetcher);
  }
  store_sums<N>(sums);
  const int rows = a.rows - row < a.tile_rows ? a.rows - row : a.tile_rows;
  for (int r = 0; r < rows; ++r) {
    float* out = a.acc + (row + r) * a.acc_stride + group * kLanes;
    const F before = bcast(a.factor[row + r]);
    unroll<N>([&](auto n) KVANT_ALWAYS {
      const float* sum = sums + n.value * 256 + r * kLanes;
      const F all = add(load(sum), load(sum + a.tile_rows * kLanes));
      float* to = out + n.value * kLanes;
      store(to, fma(all, bcast(values.factor), mul(load(to), before)));
    });
  }
}

template <Code C, typename Page>
void values_of(const DecodeArgs& side, const ValueArgs& a, const Page& page) {
  const int groups = page.head_dim / kLanes;
  const int row_steps = (a.rows + a.tile_rows - 1) / a.tile_rows;
  const int depths = (tokens_of(page, a) + kDepth - 1) / kDepth;
  ValueTiles values;
  const bool unpacks = C != Code::kBf16 || depths * kDepth != tokens_of(page, a);
  if (unpacks) values.unpacked = reinterpret_cast<uint8_t*>(side.out);
  const auto* scale =
      side.scale == PageScale::kF32 ? reinterpret_cast<const float*>(side.scales) : nullptr;
  values.factor = sum_factor<C>(side);
  alignas(64) uint16_t exponents[kMaxHeadDim / kDepth * kMaxPageTokens];
  if (C == Code::kE4m3 && side.scale == PageScale::kE8m0) {
    load_exponents<kCodesBelow>(side, exponents);
    values.exponents = exponents;
  }
  alignas(64) uint8_t weights[kMaxPageTokens / kDepth * kTileBytes];
  values.weights = weights;
  if (a.rows % a.tile_rows != 0) {
    __builtin_memset(weights, 0, static_cast<size_t>(depths) * kTileBytes);
  }
  Fetcher fetcher(a.fetch, (unpacks ? groups * depths * kDepth / 2 : 0) +
                               kProductSteps * row_steps * groups * depths);
  for (int row = 0; row < a.rows; row += a.tile_rows) {
    const int rows = a.rows - row < a.tile_rows ? a.rows - row : a.tile_rows;
    pack_weights<C>(a, page, row, rows, scale, weights);
    for (int group = 0; group < groups;) {
      group += with_power<kMaxTiles>(groups - group, [&](auto n) {
        value_rows<C, decltype(n)::value>(side, a, page, row, group, values, fetcher);
      });
    }
  }
}

template <Code C>
void values_with_page(const DecodeArgs& side, const ValueArgs& a) {
  if (a.page_tokens == 64 && a.token_end == 64) {
    if (a.head_dim == 128) return values_of<C>(side, a, WholePage<128>{});
    if (a.head_dim == 64) return values_of<C>(side, a, WholePage<64>{});
  }
  values_of<C>(side, a, AnyPage{a.head_dim, a.page_tokens, 0});
}

void values(const DecodeArgs& side, const ValueArgs& a) {
  if (side.code == Code::kE4m3) return values_with_page<Code::kE4m3>(side, a);
  values_with_page<Code::kBf16>(side, a);
}

// ---- state ----

void begin(int tile_rows) {
  static constexpr TileConfig kFour = tiles_of(2 * 4), kEight = tiles_of(2 * kMaxTileRows);
  _tile_loadconfig(tile_rows == kMaxTileRows ? &kEight : &kFour);
}
void end() {
  _tile_release();
}

}  // namespace

extern const TileKernels kTileKernels;
const TileKernels kTileKernels = {begin, end, channel_scores, integer_values};
extern const Bf16Kernels kBf16Kernels;
const Bf16Kernels kBf16Kernels = {pack_queries, scores, values};

}  // namespace kvant::backend::cpu::amx
