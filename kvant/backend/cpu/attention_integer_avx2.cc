// Integer products of attention with AVX2 (attention_integer.h): words of queries or weights times
// codes that are widened to words, two at a time (vpmaddwd). That takes about as many instructions
// as fp32 products; what is saved is decoding, ten times as many for each code.
#define KVANT_LEVEL avx2
#include "kvant/backend/cpu/attention_integer.h"

#include "kvant/backend/cpu/attention_fetch-inl.h"
#include "kvant/backend/cpu/attention_scales-inl.h"
#include "kvant/backend/cpu/attention_words_avx2-inl.h"

namespace kvant::backend::cpu::avx2 {
namespace {

constexpr int kMaxRows = 4;  // of a register tile
constexpr int kChunkTokens = 64;
constexpr float kLargestWord = 32767.0f;

// ---- queries ----

// Calls f(Int<code>) for codes that keys have.
template <typename Fn>
KVANT_INLINE void with_key_code(Code code, Fn&& f) {
  switch (code) {
    case Code::kE2m1: return f(Int<static_cast<int>(Code::kE2m1)>{});
    case Code::kS8: return f(Int<static_cast<int>(Code::kS8)>{});
    case Code::kU3: return f(Int<static_cast<int>(Code::kU3)>{});
    case Code::kU2: return f(Int<static_cast<int>(Code::kU2)>{});
    default: f(Int<static_cast<int>(Code::kU4)>{});
  }
}

// The row's products with the channels' scales to `products`; returns q . zero.
float multiply_channels(const RoundQueriesArgs& a, const float* q, float* products) {
  F sum = zero();
  for (int c = 0; c < a.head_dim; c += kLanes) {
    const F value = load(q + c);
    store(products + c, mul(value, load_f16(a.channel + 2 * c)));
    sum = fma(value, load_f16(a.channel + 2 * (a.head_dim + c)), sum);
  }
  return sum_lanes(sum);
}

// Sums over blocks of a row's integers, and what they take back of the codes' offset.
void sum_blocks(const RoundQueriesArgs& a, int row) {
  const int64_t at = static_cast<int64_t>(row) * (a.head_dim / kLanes);
  const int16_t* words = a.out.words + static_cast<int64_t>(row) * a.head_dim;
  for (int b = 0; b * a.block < a.head_dim; ++b) {
    int32_t total = 0;
    for (int c = b * a.block; c < a.head_dim && c < (b + 1) * a.block; ++c) total += words[c];
    a.out.start[at + b] = a.code == Code::kE2m1 ? -kE2m1Offset * total : 0;
    a.out.sum[at + b] = static_cast<float>(total);
  }
}

template <Code C>
void round_rows(const RoundQueriesArgs& a) {
  float products[kMaxHeadDim];
  for (int row = 0; row < a.rows; ++row) {
    const float* x = a.q + static_cast<int64_t>(row) * a.head_dim;
    if (a.channel != nullptr) {
      a.out.sum[row] = multiply_channels(a, x, products);
      x = products;
    }
    F most = zero();
    for (int c = 0; c < a.head_dim; c += kLanes) most = max(most, magnitude(load(x + c)));
    const float largest = max_lanes(most);
    const F inverse = bcast(largest > 0.0f ? kLargestWord / largest : 0.0f);
    a.out.scale[row] = largest * (code_factor<C>() / kLargestWord);
    int16_t* words = a.out.words + static_cast<int64_t>(row) * a.head_dim;
    for (int c = 0; c < a.head_dim; c += kLanes)
      store_words<C>(round_to_int(mul(load(x + c), inverse)), words + c);
    if (a.channel == nullptr) sum_blocks(a, row);
  }
}

void round_queries(const RoundQueriesArgs& a) {
  with_key_code(a.code,
                [&](auto code) { round_rows<static_cast<Code>(decltype(code)::value)>(a); });
}

// ---- scores ----

template <int kHalf>
KVANT_INLINE __m256 half_of(F x) {
  return kHalf == 0 ? x.lo : x.hi;
}

// M query rows with eight keys: half kHalf of tile `tile`.
template <Code C, PageScale S, int M, int kHalf>
void score_half(const IntegerScoreArgs& a, int row, int tile, Fetcher& fetcher) {
  constexpr bool kByChannel = S == PageScale::kChannelPair;
  constexpr int kCodes = codes_of_word<C>(), kSideBytes = kLanes * scale_stride(S);
  const int64_t d = a.head_dim, block_stride = d / kLanes;
  const int block = kByChannel ? a.head_dim : a.block;
  const int num_blocks = (a.head_dim + block - 1) / block;
  const uint8_t* codes = a.codes + tile * (d / kCodes * key_step_bytes<C>()) + 32 * kHalf;
  const uint8_t* side = a.scales + int64_t{tile} * num_blocks * kSideBytes;
  const int16_t* q = a.q.words + row * d;
  const int64_t first = row * block_stride;
  __m256 total[M];
  unroll<M>([&](auto m) { total[m.value] = _mm256_setzero_ps(); });
  for (int b = 0; b < num_blocks; ++b, side += kSideBytes) {
    __m256i sum[M];
    unroll<M>([&](auto m) {
      sum[m.value] = C == Code::kE2m1 ? bcast_dword(a.q.start + first + m.value * block_stride + b)
                                      : _mm256_setzero_si256();
    });
    const int end = (b + 1) * block < a.head_dim ? (b + 1) * block : a.head_dim;
    for (int c = b * block; c < end; c += kCodes, codes += key_step_bytes<C>()) {
      const Unpacked keys = unpack_keys<C>(codes, codes + 64 - 16 * kHalf);
      unroll<kCodes / 2>([&](auto pair) {
        const __m256i words = key_pair<C, pair.value>(keys);
        unroll<M>([&](auto m) {
          add_products(sum[m.value], words, bcast_dword(q + m.value * d + c + 2 * pair.value));
        });
      });
    }
    const ScalePair scales = load_scales(S, side, 0, kSideBytes / 2);
    unroll<M>([&](auto m) {
      const __m256 x = _mm256_cvtepi32_ps(sum[m.value]);
      total[m.value] =
          kByChannel ? x : _mm256_fmadd_ps(x, half_of<kHalf>(scales.scale), total[m.value]);
      if constexpr (S == PageScale::kF16Pair) {
        const __m256 of_block = _mm256_set1_ps(a.q.sum[first + m.value * block_stride + b]);
        total[m.value] = _mm256_fmadd_ps(of_block, half_of<kHalf>(scales.zero), total[m.value]);
      }
    });
    fetcher.step();
  }
  unroll<M>([&](auto m) {
    float* s =
        a.s + static_cast<int64_t>(row + m.value) * a.page_tokens + tile * kLanes + 8 * kHalf;
    _mm256_storeu_ps(s, _mm256_mul_ps(total[m.value], _mm256_set1_ps(a.q.scale[row + m.value])));
  });
}

template <Code C, PageScale S>
void scores_of(const IntegerScoreArgs& a) {
  const int row_steps = (a.rows + kMaxRows - 1) / kMaxRows;
  const int num_blocks = S == PageScale::kChannelPair ? 1 : (a.head_dim + a.block - 1) / a.block;
  Fetcher fetcher(a.fetch, 2 * a.num_tiles * row_steps * num_blocks);
  for (int tile = 0; tile < a.num_tiles; ++tile) {
    for (int r = 0; r < a.rows; r += kMaxRows) {
      with_count<kMaxRows>(a.rows - r, [&](auto m) {
        score_half<C, S, decltype(m)::value, 0>(a, r, tile, fetcher);
        score_half<C, S, decltype(m)::value, 1>(a, r, tile, fetcher);
      });
    }
  }
}

void scores(const IntegerScoreArgs& a) {
  switch (a.scale) {
    case PageScale::kE4m3: return scores_of<Code::kE2m1, PageScale::kE4m3>(a);
    case PageScale::kE8m0: return scores_of<Code::kE2m1, PageScale::kE8m0>(a);
    case PageScale::kF16: return scores_of<Code::kS8, PageScale::kF16>(a);
    case PageScale::kF16Pair: return scores_of<Code::kU4, PageScale::kF16Pair>(a);
    default: break;
  }
  constexpr PageScale kChannel = PageScale::kChannelPair;
  if (a.code == Code::kU4) return scores_of<Code::kU4, kChannel>(a);
  if (a.code == Code::kU3) return scores_of<Code::kU3, kChannel>(a);
  scores_of<Code::kU2, kChannel>(a);
}

// ---- values ----

// Up to 64 tokens of a page.
struct ValueChunk {
  int first_tile = 0;
  int num_tiles = 0;               // that have weights
  F power[kChunkTokens / kLanes];  // of each token: what its scales have to be multiplied by
  int16_t* scales = nullptr;       // [blocks][64]
  int16_t* weights = nullptr;      // [blocks][rows of a tile][64]
  float weight_scale[kMaxRows];
  // Where codes have zeros, of rows and blocks: the sums of weights times zeros.
  float terms[kMaxRows][kMaxHeadDim / 32];
};

template <PageScale S>
constexpr int block_of() {  // channels of a scale
  return S == PageScale::kE4m3 ? 16 : 32;
}
template <PageScale S>
constexpr int blocks_of(int head_dim) {
  return (head_dim + block_of<S>() - 1) / block_of<S>();
}

// Products of weights and scales are halved fifteen times, rounding halves up, and scales that are
// powers of two often leave a half: a bias that long contexts do not average out. So half of the
// weights are negative meanwhile.
KVANT_INLINE __m256i change_signs(__m256i words) {
  const __m256i signs = _mm256_setr_epi16(1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1);
  return _mm256_sign_epi16(words, signs);
}

// Scales rounded to 2^-14 of the power of two of the token's largest, which `power` has 2^-14
// times.
template <Code C, PageScale S>
void prepare_scales(const IntegerValueArgs& a, ValueChunk& chunk) {
  const int num_blocks = blocks_of<S>(a.head_dim);
  const int64_t block_bytes = static_cast<int64_t>(a.page_tokens) * scale_stride(S);
  const int left = a.page_tokens / kLanes - chunk.first_tile;
  const int page_tiles = left < kChunkTokens / kLanes ? left : kChunkTokens / kLanes;
  for (int tile = 0; tile < page_tiles; ++tile) {
    const auto scale_of = [&](int b) {
      return load_scales(S, a.scales + b * block_bytes, (chunk.first_tile + tile) * kLanes, 0)
          .scale;
    };
    F largest = bcast(0x1p-100f);
    for (int b = 0; b < num_blocks; ++b) largest = max(largest, scale_of(b));
    const I exponent = and_(as_int(largest), bcast_i(0x7f800000));
    chunk.power[tile] = mul(as_float(exponent), bcast(0x1p-14f));
    const __m256i one = _mm256_set1_epi32(0x7f000000);  // 2^-e has exponent 254 - that of 2^e
    const F inverse =
        mul(as_float({_mm256_sub_epi32(one, exponent.lo), _mm256_sub_epi32(one, exponent.hi)}),
            bcast(0x1p14f));
    for (int b = 0; b < num_blocks; ++b) {
      store_words<C>(round_to_int(mul(scale_of(b), inverse)),
                     chunk.scales + b * kChunkTokens + tile * kLanes);
    }
  }
}

// The sums over tokens of a row's weights times zeros, which all channels of a block get.
void sum_zeros(const IntegerValueArgs& a, const ValueChunk& chunk, const float* p, float* terms) {
  constexpr PageScale S = PageScale::kF16Pair;
  const int64_t block_bytes = static_cast<int64_t>(a.page_tokens) * scale_stride(S);
  for (int b = 0; b < blocks_of<S>(a.head_dim); ++b) {
    F sum = zero();
    for (int tile = 0; tile < chunk.num_tiles; ++tile) {
      const ScalePair side = load_scales(S, a.scales + b * block_bytes,
                                         (chunk.first_tile + tile) * kLanes, 2 * a.page_tokens);
      sum = fma(load(p + tile * kLanes), side.zero, sum);
    }
    terms[b] = sum_lanes(sum);
  }
}

// Weights of M rows times the tokens' powers, as integers of which the largest is 2^15 - 1, times
// the scales of each block.
template <Code C, PageScale S, int M>
void prepare_weights(const IntegerValueArgs& a, ValueChunk& chunk, int row, Fetcher& fetcher) {
  const int num_blocks = blocks_of<S>(a.head_dim);
  for (int m = 0; m < M; ++m) {
    const float* p =
        a.p + static_cast<int64_t>(row + m) * a.page_tokens + chunk.first_tile * kLanes;
    if constexpr (S == PageScale::kF16Pair) sum_zeros(a, chunk, p, chunk.terms[m]);
    F most = zero();
    for (int tile = 0; tile < chunk.num_tiles; ++tile)
      most = max(most, mul(load(p + tile * kLanes), chunk.power[tile]));
    const float unit = max_lanes(most) / kLargestWord;
    const F inverse = bcast(unit > 0x1p-100f ? 1.0f / unit : 0.0f);
    chunk.weight_scale[m] = unit * (code_factor<C>() * 0x1p15f);
    alignas(32) int16_t words[kChunkTokens] = {};
    for (int tile = 0; tile < chunk.num_tiles; ++tile) {
      const F weight = mul(mul(load(p + tile * kLanes), chunk.power[tile]), inverse);
      store_words<C>(round_to_int(weight), words + tile * kLanes);
    }
    for (int tile = 0; tile < chunk.num_tiles; ++tile) {
      const __m256i of_tile = change_signs(load_32(words + tile * kLanes));
      for (int b = 0; b < num_blocks; ++b) {
        const __m256i scale = load_32(chunk.scales + b * kChunkTokens + tile * kLanes);
        int16_t* to = chunk.weights + (b * M + m) * kChunkTokens + tile * kLanes;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                            change_signs(_mm256_mulhrs_epi16(of_tile, scale)));
      }
    }
    fetcher.step();
  }
}

// M query rows with sixteen channels.
template <Code C, PageScale S, int M>
void value_tile(const IntegerValueArgs& a, const ValueChunk& chunk, int row, int group,
                Fetcher& fetcher) {
  constexpr int kTokens = codes_of_word<C>();
  const int64_t group_bytes = static_cast<int64_t>(a.page_tokens) / kTokens * 64;
  const uint8_t* codes = a.codes + group * group_bytes + chunk.first_tile * (kLanes / kTokens * 64);
  const int16_t* weights = chunk.weights + group * kLanes / block_of<S>() * M * kChunkTokens;
  const __m256i table = e2m1_table(0);
  __m256i sum[M][2];
  unroll<M>([&](auto m) { sum[m.value][0] = sum[m.value][1] = _mm256_setzero_si256(); });
  const int end = chunk.num_tiles * kLanes;
  for (int t = 0; t < end; t += kTokens, codes += 64) {
    Unpacked half[2];
    unroll<2>([&](auto h) {
      const __m256i w = load_32(codes + 32 * h.value);
      half[h.value] = C == Code::kE2m1 ? e2m1_bytes(w, table) : Unpacked{w, w};
    });
    unroll<kTokens / 2>([&](auto pair) {
      const __m256i low = value_pair<C, pair.value>(half[0]);
      const __m256i high = value_pair<C, pair.value>(half[1]);
      unroll<M>([&](auto m) {
        const __m256i weight = bcast_dword(weights + m.value * kChunkTokens + t + 2 * pair.value);
        add_products(sum[m.value][0], low, weight);
        add_products(sum[m.value][1], high, weight);
      });
    });
    if (t % kLanes == 0) fetcher.step();
  }
  unroll<M>([&](auto m) {
    const F factor = bcast(chunk.first_tile == 0 ? a.factor[row + m.value] : 1.0f);
    float* out = a.acc + (row + m.value) * a.acc_stride + group * kLanes;
    const F x = to_float({sum[m.value][0], sum[m.value][1]});
    F all = fma(x, bcast(chunk.weight_scale[m.value]), mul(load(out), factor));
    if constexpr (S == PageScale::kF16Pair) {
      all = add(all, bcast(chunk.terms[m.value][group * kLanes / block_of<S>()]));
    }
    store(out, all);
  });
}

template <Code C, PageScale S>
void values_of(const IntegerValueArgs& a) {
  const int num_blocks = blocks_of<S>(a.head_dim);
  const int num_groups = a.head_dim / kLanes;
  ValueChunk chunk;
  chunk.weights = reinterpret_cast<int16_t*>(a.scratch);
  chunk.scales = chunk.weights + num_blocks * kMaxRows * kChunkTokens;
  const int row_steps = (a.rows + kMaxRows - 1) / kMaxRows;
  const int chunks = (a.num_tiles * kLanes + kChunkTokens - 1) / kChunkTokens;
  Fetcher fetcher(a.fetch, chunks * a.rows + row_steps * num_groups * a.num_tiles);
  for (; chunk.first_tile < a.num_tiles; chunk.first_tile += kChunkTokens / kLanes) {
    const int left = a.num_tiles - chunk.first_tile;
    chunk.num_tiles = left < kChunkTokens / kLanes ? left : kChunkTokens / kLanes;
    prepare_scales<C, S>(a, chunk);
    for (int r = 0; r < a.rows; r += kMaxRows) {
      with_count<kMaxRows>(a.rows - r, [&](auto m) {
        constexpr int M = decltype(m)::value;
        prepare_weights<C, S, M>(a, chunk, r, fetcher);
        for (int group = 0; group < num_groups; ++group)
          value_tile<C, S, M>(a, chunk, r, group, fetcher);
      });
    }
  }
}

void values(const IntegerValueArgs& a) {
  switch (a.scale) {
    case PageScale::kE4m3: return values_of<Code::kE2m1, PageScale::kE4m3>(a);
    case PageScale::kE8m0: return values_of<Code::kE2m1, PageScale::kE8m0>(a);
    case PageScale::kF16Pair: return values_of<Code::kU4, PageScale::kF16Pair>(a);
    default: values_of<Code::kS8, PageScale::kF16>(a);
  }
}

}  // namespace

extern const IntegerKernels kIntegerKernels;
const IntegerKernels kIntegerKernels = {round_queries, scores, values};

}  // namespace kvant::backend::cpu::avx2
