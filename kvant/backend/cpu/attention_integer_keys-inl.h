// Integer products of queries and keys; included by attention_integer_avx512.cc only.
#pragma once

#include "kvant/backend/cpu/attention_integer-inl.h"
#include "kvant/backend/cpu/attention_shape-inl.h"

namespace kvant::backend::cpu::avx512 {
namespace {

constexpr int kKeyTiles = 2;
constexpr float kLargestQuery = 32512.0f;  // 127 * 256: the low byte may round it up

// What products with K's codes as bytes have to be multiplied by, and what was added to the bytes
// to make them unsigned.
float code_factor(Code code) {
  return code == Code::kE2m1 ? 0.5f : 1.0f;
}
int code_offset(Code code) {
  return code == Code::kE2m1 ? 12 : code == Code::kS8 ? 128 : 0;
}

// The channel of sixteen that is byte `place` % 4 of vector `place` / 4 of those that key_bytes()
// takes out of K's words in turn: words hold four, eight or sixteen channels.
template <int kBits>
constexpr int channel_of(int place) {
  return kBits == 8   ? place
         : kBits == 4 ? place / 8 * 8 + place % 4 * 2 + place / 4 % 2
                      : place % 4 * 4 + place / 4;
}

// Where the bytes of K's channels in turn are: of 64, as packing (store_bytes()) leaves them, or
// (kHalfRate) of 32 integers in two vectors, their low bytes and then the next ones.
template <int kBits>
constexpr Order<int8_t, 64> order_of_channels() {
  Order<int8_t, 64> order{};
  for (int i = 0; i < 64; ++i) {
    const int channel = channel_of<kBits>(i % 16);
    const int packed = channel / 4 * 16 + i / 16 * 4 + channel % 4;
    const int in_integers = i / 16 % 2 * 64 + 4 * channel + i / 32;
    order.at[i] = static_cast<int8_t>(kHalfRate ? in_integers : packed);
  }
  return order;
}
alignas(64) constexpr Order<int8_t, 64> kOrderOf8Bits = order_of_channels<8>();
alignas(64) constexpr Order<int8_t, 64> kOrderOf4Bits = order_of_channels<4>();
alignas(64) constexpr Order<int8_t, 64> kOrderOf2Bits = order_of_channels<2>();

__m512i order_of(Code code) {
  const bool two = code == Code::kU3 || code == Code::kU2;
  return _mm512_load_si512((code == Code::kS8 ? kOrderOf8Bits
                            : two             ? kOrderOf2Bits
                                              : kOrderOf4Bits)
                               .at);
}

// Where the bytes of rounded queries go: rows of head_dim bytes, or of tiles of A.
struct QueryBytes {
  int64_t row;    // from a row to the next
  int64_t chunk;  // from 64 channels to the next
  int64_t low;    // from upper bytes to lower ones
  bool whole;     // chunks are written whole, with zeros behind the last channels
};
template <typename Page>
KVANT_INLINE QueryBytes query_bytes(const RoundQueriesArgs& a, const Page& page) {
  if ((kHalfRate || !kIsWhole<Page>)&&a.tile_rows == 0) {
    return {page.head_dim, 64, a.out.lo - a.out.hi, false};
  }
  return {64, kQueryTileBytes, a.tile_rows * 64, true};
}

// 64 values times `scale`, at most 16 bits when rounded, as the integers' low bytes, signed, and
// what remains, divided by 256. Only channels of the mask are stored; `from` has them all.
KVANT_INLINE void store_bytes(const F* from, F scale, __m512i order, __mmask64 mask, int8_t* hi,
                              int8_t* lo) {
  if constexpr (kHalfRate) {
    // The sum's low bits are the integer plus 128, which rounds what remains and flips the low
    // byte's sign: no conversions, and a permute for all packing.
    const F magic = bcast(0x1.8p23f + 128.0f);
    const __m512i flip = _mm512_zextsi256_si512(_mm256_set1_epi8(-128));
    unroll<2>([&](auto h) KVANT_ALWAYS {
      const __m512i a = as_int(fma(from[2 * h.value], scale, magic)).v;
      const __m512i b = as_int(fma(from[2 * h.value + 1], scale, magic)).v;
      const __m512i bytes = _mm512_xor_si512(_mm512_permutex2var_epi8(a, order, b), flip);
      const auto part = static_cast<__mmask32>(mask >> (32 * h.value));
      _mm256_mask_storeu_epi8(lo + 32 * h.value, part, _mm512_castsi512_si256(bytes));
      _mm256_mask_storeu_epi8(hi + 32 * h.value, part, _mm512_extracti64x4_epi64(bytes, 1));
    });
    return;
  }
  __m512i x[4];
  unroll<4>([&](auto i)
                KVANT_ALWAYS { x[i.value] = _mm512_cvtps_epi32(mul(from[i.value], scale).v); });
  const __m512i a = _mm512_packs_epi32(x[0], x[1]);
  const __m512i b = _mm512_packs_epi32(x[2], x[3]);
  const __m512i low = _mm512_set1_epi16(255), half = _mm512_set1_epi16(128);
  const __m512i lows = _mm512_packus_epi16(_mm512_and_si512(a, low), _mm512_and_si512(b, low));
  const __m512i highs = _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(a, half), 8),
                                           _mm512_srai_epi16(_mm512_add_epi16(b, half), 8));
  _mm512_mask_storeu_epi8(lo, mask, _mm512_permutexvar_epi8(order, lows));
  _mm512_mask_storeu_epi8(hi, mask, _mm512_permutexvar_epi8(order, highs));
}

// Rows that are rounded together: finding the largest of one is a chain of latencies.
constexpr int kRoundedRows = 8;

// The larger magnitude, its sign cleared.
KVANT_INLINE F larger_magnitude(F a, F b) {
  return {_mm512_range_ps(a.v, b.v, 0b1011)};
}

// Rounds M rows of `x` [M][head_dim], `largest` magnitudes of each in its lanes.
template <int M, typename Page>
KVANT_INLINE void round_rows(const RoundQueriesArgs& a, const Page& page, const float* x,
                             const F (&largest)[M], int row, __m512i order) {
  const int64_t d = page.head_dim;
  const __m256 amax = lower_half(max_rows(largest)), most = _mm256_set1_ps(kLargestQuery);
  const __mmask8 positive = _mm256_cmp_ps_mask(amax, _mm256_setzero_ps(), _CMP_GT_OQ);
  alignas(32) float inverse[kRoundedRows];
  _mm256_store_ps(inverse, _mm256_maskz_div_ps(positive, most, amax));
  _mm256_mask_storeu_ps(
      a.out.scale + row, (1 << M) - 1,
      _mm256_mul_ps(_mm256_div_ps(amax, most), _mm256_set1_ps(code_factor(a.code))));
  const QueryBytes bytes = query_bytes(a, page);
  const int64_t chunks = (d + 63) / 64;
  int8_t* hi = a.out.hi + (a.tile_rows == 0 ? row * d : row / kRoundedRows * chunks * bytes.chunk);
  for (int64_t c = 0; c < d; c += 64, hi += bytes.chunk) {
    const __mmask64 mask =
        bytes.whole || d - c >= 64 ? ~__mmask64{0} : (__mmask64{1} << (d - c)) - 1;
    unroll<M>([&](auto m) KVANT_ALWAYS {
      const float* from = x + m.value * d + c;
      F values[4];
      unroll<4>([&](auto i) KVANT_ALWAYS {
        values[i.value] = zero();
        if (c + i.value * kLanes < d) values[i.value] = load(from + i.value * kLanes);
      });
      int8_t* to = hi + m.value * bytes.row;
      store_bytes(values, bcast(inverse[m.value]), order, mask, to, to + bytes.low);
    });
  }
}

template <int M>
KVANT_INLINE void find_largest(const float* x, int head_dim, F (&largest)[M]) {
  unroll<M>([&](auto m) KVANT_ALWAYS { largest[m.value] = zero(); });
  for (int c = 0; c < head_dim; c += kLanes) {
    unroll<M>([&](auto m) KVANT_ALWAYS {
      largest[m.value] = larger_magnitude(largest[m.value], load(x + m.value * head_dim + c));
    });
  }
}

// Sums over blocks of a row's integers, and what they take back of the codes' offset.
void sum_blocks(const RoundQueriesArgs& a, int row) {
  const int d = a.head_dim;
  const int64_t at = static_cast<int64_t>(row) * d;
  int32_t* start = a.out.start + row * (d / kLanes);
  int32_t* rest = a.out.rest + row * (d / kLanes);
  float* sum = a.out.sum + row * (d / kLanes);
  for (int b = 0; b * a.block < d; ++b) {
    int total = 0;
    for (int c = b * a.block; c < d && c < (b + 1) * a.block; ++c) {
      total += 256 * a.out.hi[at + c] + a.out.lo[at + c];
    }
    const int correction = -code_offset(a.code) * total;
    start[b] = correction >> 8;
    rest[b] =
        kHalfRate ? correction : static_cast<int32_t>(static_cast<uint32_t>(correction) << 24);
    sum[b] = static_cast<float>(total);
  }
}

// x = q times the channels' scales, and q . zero into a.out.sum.
template <int M, typename Page>
KVANT_INLINE void multiply_channels(const RoundQueriesArgs& a, const Page& page, int row, float* x,
                                    F (&largest)[M], Fetcher& fetcher) {
  const int64_t d = page.head_dim;
  const float* q = a.q + row * d;
  F sum[M];
  unroll<M>([&](auto m) KVANT_ALWAYS { sum[m.value] = largest[m.value] = zero(); });
  for (int c = 0; c < d; c += kLanes) {
    const F scale = load_f16(a.channel + 2 * c);
    const F zero_point = load_f16(a.channel + 2 * (d + c));
    unroll<M>([&](auto m) KVANT_ALWAYS {
      const F value = load(q + m.value * d + c);
      const F product = mul(value, scale);
      store(x + m.value * d + c, product);
      largest[m.value] = larger_magnitude(largest[m.value], product);
      sum[m.value] = fma(value, zero_point, sum[m.value]);
    });
    fetcher.step();
  }
  store_first<M>(a.out.sum + row, sum_rows(sum));
}

template <bool kChannels, typename Page>
KVANT_INLINE void round_page(const RoundQueriesArgs& a, const Page& page) {
  const __m512i order = order_of(a.code);
  const int row_steps = (a.rows + kRoundedRows - 1) / kRoundedRows;
  Fetcher fetcher(a.fetch, row_steps * (page.head_dim / kLanes));
  for (int r = 0; r < a.rows; r += kRoundedRows) {
    with_count<kRoundedRows>(a.rows - r, [&](auto m) {
      constexpr int M = decltype(m)::value;
      alignas(64) float products[M * kMaxHeadDim];
      const float* x = a.q + static_cast<int64_t>(r) * page.head_dim;
      F largest[M];
      if constexpr (kChannels) {
        multiply_channels<M>(a, page, r, products, largest, fetcher);
        x = products;
      } else {
        find_largest<M>(x, page.head_dim, largest);
      }
      round_rows<M>(a, page, x, largest, r, order);
    });
  }
}

void round_queries(const RoundQueriesArgs& a) {
  const AnyPage any{a.head_dim, 0, 0};
  if (a.channel == nullptr) {
    round_page<false>(a, any);
    for (int r = 0; r < a.rows; ++r) sum_blocks(a, r);
    return;
  }
  if (!kHalfRate && a.tile_rows == 0) {  // nothing is taken back
    const int64_t stride = a.head_dim / kLanes;
    for (int64_t r = 0; r < a.rows; ++r) a.out.start[r * stride] = a.out.rest[r * stride] = 0;
  }
  if (a.head_dim == 256 && kHalfRate) {
    round_page<true>(a, WholePage<256>{});
  } else if (a.head_dim == 128 && (kHalfRate || a.tile_rows != 0)) {
    round_page<true>(a, WholePage<128>{});
  } else if (a.head_dim == 64 && (kHalfRate || a.tile_rows != 0)) {
    round_page<true>(a, WholePage<64>{});
  } else {
    round_page<true>(a, any);
  }
}

// ---- scores ----

// A block's scale of sixteen keys; kE4m3 lacks kE4m3Factor.
template <PageScale S>
KVANT_INLINE F key_scale(const uint8_t* p) {
  if constexpr (S == PageScale::kE4m3) return load_e4m3(p);
  return load_scales(S, p, 0, 0).scale;
}

// What the kernels below are made for: each combination that formats have is one instantiation.
template <Code C_, PageScale S_, bool Short_>
struct KeyFormat {
  static constexpr Code C = C_;
  static constexpr PageScale S = S_;
  static constexpr bool kShort = Short_;  // blocks of sixteen channels
};

// Channels of a block, a number where the format or the page says it.
template <typename Format, typename Page>
KVANT_INLINE int key_block(const IntegerScoreArgs& a, const Page& page) {
  if constexpr (Format::kShort) return kLanes;
  if constexpr (Format::S == PageScale::kChannelPair) return page.head_dim;
  return a.block;
}

// M query rows with N tiles of sixteen keys, which start at `tile`.
template <typename Format, int M, int N, typename Page>
struct ScoreTile {
  static constexpr Code C = Format::C;
  // Whether the low bytes' sums start with what the block takes back: elsewhere shift() adds it.
  static constexpr bool kTakesBack = kHalfRate && Format::S != PageScale::kChannelPair;
  const IntegerScoreArgs& a;
  const Page& page;
  const int block;
  const uint8_t* codes[N];
  const uint8_t* scales[N];
  const int8_t* hi;
  const int8_t* lo;
  const int32_t* start;
  const int32_t* rest;
  const float* sum;
  F total[M][N];

  KVANT_INLINE ScoreTile(const IntegerScoreArgs& args, const Page& p, int row, int tile)
      : a(args), page(p), block(key_block<Format>(args, p)) {
    const int64_t tile_bytes = int64_t{page.head_dim / kLanes} * key_step_bytes<C>();
    const int num_blocks = (page.head_dim + block - 1) / block;
    const int64_t side_bytes = int64_t{num_blocks} * kLanes * scale_stride(Format::S);
    unroll<N>([&](auto n) KVANT_ALWAYS {
      codes[n.value] = args.codes + (tile + n.value) * tile_bytes;
      scales[n.value] = args.scales + (tile + n.value) * side_bytes;
    });
    hi = args.q.hi + static_cast<int64_t>(row) * page.head_dim;
    lo = args.q.lo + static_cast<int64_t>(row) * page.head_dim;
    start = args.q.start + row * block_stride();
    rest = args.q.rest + row * block_stride();
    sum = args.q.sum + row * block_stride();
    unroll<M>([&](auto m) KVANT_ALWAYS {
      unroll<N>([&](auto n) KVANT_ALWAYS { total[m.value][n.value] = zero(); });
    });
  }

  KVANT_INLINE int64_t block_stride() const { return page.head_dim / kLanes; }

  KVANT_INLINE static void multiply(__m512i (&acc)[M][N], const __m512i (&key)[N], const int8_t* q,
                                    int d) {
    unroll<M>([&](auto m) KVANT_ALWAYS {
      const __m512i query = bcast_dword(q + m.value * d);
      unroll<N>([&](auto n)
                    KVANT_ALWAYS { add_products(acc[m.value][n.value], key[n.value], query); });
    });
  }

  KVANT_INLINE void begin_block(__m512i (&acc)[M][N], int b) const {
    unroll<M>([&](auto m) KVANT_ALWAYS {
      const __m512i first =
          kHalfRate ? _mm512_setzero_si512() : bcast_dword(start + m.value * block_stride() + b);
      unroll<N>([&](auto n) KVANT_ALWAYS { acc[m.value][n.value] = first; });
    });
  }

  // The high bytes' sums times 256, and what the block takes back.
  KVANT_INLINE void shift(__m512i (&acc)[M][N], int b) const {
    unroll<M>([&](auto m) KVANT_ALWAYS {
      const __m512i low = bcast_dword(rest + m.value * block_stride() + b);
      unroll<N>([&](auto n) KVANT_ALWAYS {
        __m512i& high = acc[m.value][n.value];
        if constexpr (kHalfRate) {  // vpshldd is one for the pipes that multiply
          high = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
        } else {
          high = _mm512_shldi_epi32(high, low, 8);
        }
      });
    });
  }

  KVANT_INLINE void end_block(const __m512i (&acc)[M][N], int b) {
    constexpr int kSideBytes = kLanes * scale_stride(Format::S);
    unroll<N>([&](auto n) KVANT_ALWAYS {
      const uint8_t* side = scales[n.value] + b * kSideBytes;
      const F scale = key_scale<Format::S>(side);
      unroll<M>([&](auto m) KVANT_ALWAYS {
        const F x = {_mm512_cvtepi32_ps(acc[m.value][n.value])};
        total[m.value][n.value] =
            Format::S == PageScale::kChannelPair ? x : fma(x, scale, total[m.value][n.value]);
      });
      if constexpr (Format::S == PageScale::kF16Pair) {
        const F zero_point = load_f16(side + kSideBytes / 2);
        unroll<M>([&](auto m) KVANT_ALWAYS {
          total[m.value][n.value] =
              fma(bcast(sum[m.value * block_stride() + b]), zero_point, total[m.value][n.value]);
        });
      }
    });
  }

  // Sixteen channels stay in registers for both bytes of the queries.
  KVANT_INLINE void short_block(int b) {
    __m512i key[4][N];
    unroll<4>([&](auto j) KVANT_ALWAYS {
      unroll<N>([&](auto n) KVANT_ALWAYS {
        const uint8_t* at = codes[n.value] + b * key_step_bytes<C>();
        if constexpr (kHalfRate) {  // a vector that waits on the stack costs a product
          key[j.value][n.value] = e2m1_bytes(load_once(at + 64 * (j.value / 2)), j.value % 2 == 1);
        } else {
          key[j.value][n.value] = key_bytes<C, j.value>(at);
        }
      });
    });
    __m512i acc[M][N];
    begin_block(acc, b);
    const int c = b * kLanes;
    unroll<4>([&](auto j) KVANT_ALWAYS {
      multiply(acc, key[j.value], hi + c + 4 * j.value, page.head_dim);
    });
    shift(acc, b);
    unroll<4>([&](auto j) KVANT_ALWAYS {
      multiply(acc, key[j.value], lo + c + 4 * j.value, page.head_dim);
    });
    end_block(acc, b);
  }

  KVANT_INLINE void long_block(int b, int steps, Fetcher& fetcher) {
    __m512i high[M][N], low[M][N];
    begin_block(high, b);
    unroll<M>([&](auto m) KVANT_ALWAYS {
      const __m512i first =
          kTakesBack ? bcast_dword(rest + m.value * block_stride() + b) : _mm512_setzero_si512();
      unroll<N>([&](auto n) KVANT_ALWAYS { low[m.value][n.value] = first; });
    });
    const int first = b * (block / kLanes);
    for (int i = first; i < first + steps; ++i) {
      unroll<4>([&](auto j) KVANT_ALWAYS {
        __m512i key[N];
        unroll<N>([&](auto n) KVANT_ALWAYS {
          key[n.value] = key_bytes<C, j.value>(codes[n.value] + i * key_step_bytes<C>());
        });
        const int c = i * kLanes + 4 * j.value;
        multiply(high, key, hi + c, page.head_dim);
        multiply(low, key, lo + c, page.head_dim);
      });
      fetcher.step();
    }
    if constexpr (!kHalfRate) shift(high, b);
    unroll<M>([&](auto m) KVANT_ALWAYS {
      unroll<N>([&](auto n) KVANT_ALWAYS {
        __m512i& all = high[m.value][n.value];
        if constexpr (kHalfRate) all = _mm512_slli_epi32(all, 8);
        all = _mm512_add_epi32(all, low[m.value][n.value]);
      });
    });
    end_block(high, b);
  }
};

template <typename Format, int M, int N, typename Page>
KVANT_OWN_FRAME void score_tile(const IntegerScoreArgs& a, const Page& page, int row, int tile,
                                Fetcher& fetcher) {
  ScoreTile<Format, M, N, Page> t(a, page, row, tile);
  for (int c = 0, b = 0; c < page.head_dim; c += t.block, ++b) {
    if constexpr (Format::kShort) {
      t.short_block(b);
      fetcher.step();
    } else {
      const int end = c + t.block < page.head_dim ? c + t.block : page.head_dim;
      t.long_block(b, (end - c) / kLanes, fetcher);
    }
  }
  const float factor = Format::S == PageScale::kE4m3 ? kE4m3Factor : 1.0f;
  unroll<M>([&](auto m) KVANT_ALWAYS {
    float* s = a.s + static_cast<int64_t>(row + m.value) * page.page_tokens + tile * kLanes;
    const F scale = bcast(a.q.scale[row + m.value] * factor);
    unroll<N>([&](auto n) KVANT_ALWAYS {
      store(s + n.value * kLanes, mul(t.total[m.value][n.value], scale));
    });
  });
}

template <typename Format, typename Page>
void scores_of_page(const IntegerScoreArgs& a, const Page& page) {
  const int row_steps = (a.rows + kMaxRows - 1) / kMaxRows;
  const int tile_steps = (page.num_tiles + kKeyTiles - 1) / kKeyTiles;
  Fetcher fetcher(a.fetch, tile_steps * row_steps * (page.head_dim / kLanes));
  for (int tile = 0; tile < page.num_tiles; tile += kKeyTiles) {
    for (int r = 0; r < a.rows; r += kMaxRows) {
      with_count<kMaxRows>(a.rows - r, [&](auto m) {
        with_count<kKeyTiles>(page.num_tiles - tile, [&](auto n) {
          score_tile<Format, decltype(m)::value, decltype(n)::value>(a, page, r, tile, fetcher);
        });
      });
    }
  }
}

template <typename Format>
void scores_of(const IntegerScoreArgs& a) {
  if constexpr (kHalfRate) {
    with_wide_page(a, [&](const auto& page) { scores_of_page<Format>(a, page); });
  } else {
    scores_of_page<Format>(a, AnyPage{a.head_dim, a.page_tokens, a.num_tiles});
  }
}

void scores(const IntegerScoreArgs& a) {
  switch (a.scale) {
    case PageScale::kE4m3: return scores_of<KeyFormat<Code::kE2m1, PageScale::kE4m3, true>>(a);
    case PageScale::kE8m0: return scores_of<KeyFormat<Code::kE2m1, PageScale::kE8m0, false>>(a);
    case PageScale::kF16: return scores_of<KeyFormat<Code::kS8, PageScale::kF16, false>>(a);
    case PageScale::kF16Pair: return scores_of<KeyFormat<Code::kU4, PageScale::kF16Pair, false>>(a);
    default: break;
  }
  constexpr PageScale kChannel = PageScale::kChannelPair;
  if (a.code == Code::kU4) return scores_of<KeyFormat<Code::kU4, kChannel, false>>(a);
  if (a.code == Code::kU3) return scores_of<KeyFormat<Code::kU3, kChannel, false>>(a);
  scores_of<KeyFormat<Code::kU2, kChannel, false>>(a);
}

}  // namespace
}  // namespace kvant::backend::cpu::avx512
