// Closing of formats whose blocks lie along head_dim, a thread per block or two.
//
// In `sm90` order a lane's words hold the same elements in every format (ADR 0004). A thread has
// the BF16 words of 16 channels of a few tokens: of K two tokens (four neighbouring lanes), of V
// four (eight lanes, four apart). So it has whole blocks of 16 for itself, and makes whole words of
// codes and of V's scales; blocks of 32 need one exchange with the neighbouring k-step.
//
// It goes through its words in shared memory two or three times: for the blocks' ranges, for the
// errors of both scales of +46, for the codes. The loops stay loops: unrolled, they are tens of
// kilobytes of code that warps wait for.
#pragma once

#include "kvant/backend/cuda/quant/close_args.cuh"
#include "kvant/backend/cuda/quant/row_codecs.cuh"

namespace kvant::backend::cuda::quant {

// Which words a thread has.
template <bool kValues>
struct RowThread {
  static constexpr int kGroup = kValues ? 4 : 8;   // threads of a k-step
  static constexpr int kWords = kValues ? 8 : 4;   // of four registers: one of each lane
  static constexpr int kStride = kValues ? 4 : 1;  // lanes between them
  static constexpr int kTokens = kValues ? 4 : 2;
  static constexpr int kPartner = kGroup;  // lane of the next k-step, exclusive or

  static __device__ int first_lane(int index) { return kValues ? index : 4 * index; }
  // Which of its tokens an element belongs to.
  static __device__ constexpr int token_of(int reg, int parity) {
    return kValues ? reg / 2 * 2 + parity : reg % 2;
  }
};

__device__ __forceinline__ uint32_t component(const uint4& word, int reg) {
  return reg == 0 ? word.x : reg == 1 ? word.y : reg == 2 ? word.z : word.w;
}

// The two numbers of a register.
struct Pair {
  float low;
  float high;
  uint32_t signs;  // in bits 15 and 31, other bits anything
};

// A thread's words of one k-step.
template <bool kValues, bool kMean>
struct RowSource {
  uint4* source;
  int fragment;
  int first_lane;
  const float* mean;  // of the step's channels

  __device__ __forceinline__ uint4& word(int i) const {
    return source[source_chunk(fragment, first_lane + i * RowThread<kValues>::kStride)];
  }
  __device__ __forceinline__ Pair pair(const uint4& word, int i, int reg) const {
    const uint32_t bits = component(word, reg);
    Pair x = {low_float(bits), high_float(bits), bits};
    if constexpr (kMean) {  // K: channels 2i and 2i + 1, and eight on
      const float2 b = *reinterpret_cast<const float2*>(mean + 2 * i + reg / 2 * 8);
      x.low = __fadd_rn(x.low, -b.x);
      x.high = __fadd_rn(x.high, -b.y);
      x.signs = __byte_perm(as_bits(x.low), as_bits(x.high), 0x7632);
    }
    return x;
  }
};

// ---- ranges ----

// Largest magnitude, or range, of each of the thread's tokens. With a mean NaN shows as NaN.
template <typename Codec>
__device__ __forceinline__ void find_ranges(const RowSource<false, true>& from,
                                            BlockRange* ranges) {
  float nan[2] = {};
#pragma unroll 1
  for (int i = 0; i < RowThread<false>::kWords; ++i) {
    const uint4 word = from.word(i);
#pragma unroll
    for (int reg = 0; reg < 4; ++reg) {
      const Pair x = from.pair(word, i, reg);
      BlockRange& range = ranges[reg % 2];
      range.amax = fmaxf(range.amax, fmaxf(fabsf(x.low), fabsf(x.high)));
      nan[reg % 2] = __fadd_rn(nan[reg % 2], __fadd_rn(x.low, x.high));
      if constexpr (Codec::kAffine) {
        const int32_t a = order_key(x.low), b = order_key(x.high);
        range.min_key = min(range.min_key, min(a, b));
        range.max_key = max(range.max_key, max(a, b));
      }
    }
  }
#pragma unroll
  for (int token = 0; token < 2; ++token) {
    if (nan[token] != nan[token]) ranges[token].amax = as_float(0x7fc00000u);
  }
}

// On BF16, two at a time: halves are two tokens of V, or two channels of a token of K.
template <typename Codec, bool kValues>
__device__ __forceinline__ void find_ranges(const RowSource<kValues, false>& from,
                                            BlockRange* ranges) {
  uint32_t amax[2] = {};
  uint32_t low[2] = {kInfinities, kInfinities};
  uint32_t high[2] = {kInfinities | kSigns, kInfinities | kSigns};
#pragma unroll 2
  for (int i = 0; i < RowThread<kValues>::kWords; ++i) {
    const uint4 word = from.word(i);
#pragma unroll
    for (int reg = 0; reg < 4; ++reg) {
      const int at = kValues ? reg / 2 : reg % 2;
      const uint32_t bits = component(word, reg);
      amax[at] = __vmaxu2(amax[at], bits & 0x7fff7fffu);
      if constexpr (Codec::kAffine) {
        low[at] = min_bf16x2(low[at], bits);
        high[at] = max_bf16x2(high[at], bits);
      }
    }
  }
#pragma unroll
  for (int at = 0; at < 2; ++at) {
    BlockRange halves[2];
    halves[0].amax = low_float(amax[at]);
    halves[1].amax = high_float(amax[at]);
    if constexpr (Codec::kAffine) {
      halves[0].min_key = order_key(low_float(low[at]));
      halves[0].max_key = order_key(low_float(high[at]));
      halves[1].min_key = order_key(high_float(low[at]));
      halves[1].max_key = order_key(high_float(high[at]));
    }
    if constexpr (kValues) {
      ranges[2 * at] = halves[0];
      ranges[2 * at + 1] = halves[1];
    } else {
      ranges[at].amax = as_float(max(as_bits(halves[0].amax), as_bits(halves[1].amax)));
      ranges[at].min_key = min(halves[0].min_key, halves[1].min_key);
      ranges[at].max_key = max(halves[0].max_key, halves[1].max_key);
    }
  }
}

// Joins the ranges of two k-steps; `present` says whether the thread's own step exists.
template <typename Codec, int kPartner>
__device__ __forceinline__ void join_steps(bool present, BlockRange& range) {
  constexpr uint32_t kAll = 0xffffffffu;
  if (!present) range = BlockRange{};
  // Bits order magnitudes, Inf and NaN last.
  range.amax =
      as_float(max(as_bits(range.amax), __shfl_xor_sync(kAll, as_bits(range.amax), kPartner)));
  if constexpr (Codec::kAffine) {
    range.min_key = min(range.min_key, __shfl_xor_sync(kAll, range.min_key, kPartner));
    range.max_key = max(range.max_key, __shfl_xor_sync(kAll, range.max_key, kPartner));
  }
}

// ---- +46 ----

// Sums of squared errors of the thread's tokens, of K of the even and odd channels apart.
struct ErrorSums {
  float e[4];
};

// Encodes a word's magnitudes and sums its errors: channels i and i + 8 together (of K also i + 1
// and i + 9), as the tree begins.
template <typename Codec, bool kValues, bool kMean>
__device__ __forceinline__ ErrorSums try_scales(const Codec& codec,
                                                const RowSource<kValues, kMean>& from,
                                                const uint4& word, int i,
                                                const typename Codec::Scale* scales,
                                                uint32_t& codes) {
  using Thread = RowThread<kValues>;
  ErrorSums sums;
  codes = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int first = kValues ? 2 * half : half;
    const typename Codec::Scale& low = scales[Thread::token_of(first, 0)];
    const typename Codec::Scale& high = scales[Thread::token_of(first, 1)];
    float errors[2][2];
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      const int reg = first + second * (kValues ? 1 : 2);
      const Pair x = from.pair(word, i, reg);
      const uint32_t values = codec.values(x.low, x.high, low, high);
      codes |= values >> (3 * reg);
      errors[second][0] = codec.error(x.low, f16_value(values & 0xffffu), low);
      errors[second][1] = codec.error(x.high, f16_value(values >> 16), high);
    }
    sums.e[2 * half] = Codec::sum_of_squares(errors[0][0], errors[1][0]);
    sums.e[2 * half + 1] = Codec::sum_of_squares(errors[0][1], errors[1][1]);
  }
  return sums;
}

// The word's signs where E2M1 codes have them.
template <bool kValues, bool kMean>
__device__ __forceinline__ uint32_t signs_of(const RowSource<kValues, kMean>& from,
                                             const uint4& word, int i) {
  uint32_t signs = 0;
#pragma unroll
  for (int reg = 0; reg < 4; ++reg) {
    const int shift = 15 - e2m1_sign_bit(reg);
    signs |= from.pair(word, i, reg).signs >> shift & kSigns >> shift;
  }
  return signs;
}

__device__ __forceinline__ ErrorSums add_sums(const ErrorSums& a, const ErrorSums& b) {
  return {__fadd_rn(a.e[0], b.e[0]), __fadd_rn(a.e[1], b.e[1]), __fadd_rn(a.e[2], b.e[2]),
          __fadd_rn(a.e[3], b.e[3])};
}

// Bits of a word of E2M1 codes that belong to a token of the thread.
struct TokenBits {
  uint32_t magnitudes = 0;
  uint32_t signs = 0;
};
template <bool kValues>
__device__ __forceinline__ constexpr TokenBits token_bits(int token) {
  TokenBits bits;
  for (int reg = 0; reg < 4; ++reg) {
    for (int parity = 0; parity < 2; ++parity) {
      if (RowThread<kValues>::token_of(reg, parity) != token) continue;
      bits.magnitudes |= 7u << e2m1_field_bit(reg) << (16 * parity);
      bits.signs |= 1u << e2m1_sign_bit(reg) << (16 * parity);
    }
  }
  return bits;
}

// Which bits of a word come from the magnitudes of the second scale, and which signs count.
struct Choice {
  uint32_t second = 0;
  uint32_t signs = 0;

  __device__ __forceinline__ uint32_t pick(const uint4& codes) const {
    return (codes.x & ~second) | (codes.y & second) | (codes.z & signs);
  }
};

// Keeps the better scale of each token, and in the place of each word of the source its magnitudes
// with both and its signs. Errors are added as codecs.md section 3 says: i and i + 8, + 4, + 2,
// + 1. Words come in the order of reversed bits, so that what is added next is always the newest
// sum of as many.
template <typename Codec, bool kValues, bool kMean>
__device__ __forceinline__ Choice choose_scales(const Codec& codec,
                                                const RowSource<kValues, kMean>& from,
                                                const BlockRange* ranges,
                                                typename Codec::Scale* scales) {
  using Thread = RowThread<kValues>;
  typename Codec::Scale four[Thread::kTokens];
  bool allowed[Thread::kTokens];
#pragma unroll
  for (int token = 0; token < Thread::kTokens; ++token) {
    const float ratio = codec.four_ratio(ranges[token]);
    allowed[token] = ratio <= 448.0f;
    four[token] = codec.scale_of(ratio);
  }
  ErrorSums six_sums = {}, four_sums = {};
  ErrorSums six_held[2] = {}, four_held[2] = {};
#pragma unroll 1
  for (int n = 0; n < Thread::kWords; ++n) {
    const int i = kValues ? (n & 1) * 4 + (n & 2) + (n >> 2) : (n & 1) * 2 + (n >> 1);
    const uint4 word = from.word(i);
    uint32_t six_codes, four_codes;
    ErrorSums six = try_scales(codec, from, word, i, scales, six_codes);
    ErrorSums other = try_scales(codec, from, word, i, four, four_codes);
    from.word(i) = make_uint4(six_codes, four_codes, signs_of(from, word, i), 0);
    if (n % 2 == 0) {
      six_held[0] = six;
      four_held[0] = other;
      continue;
    }
    six = add_sums(six_held[0], six);
    other = add_sums(four_held[0], other);
    if (kValues && n % 4 == 1) {
      six_held[1] = six;
      four_held[1] = other;
      continue;
    }
    if constexpr (kValues) {
      six = add_sums(six_held[1], six);
      other = add_sums(four_held[1], other);
    }
    if (n < Thread::kWords / 2) {
      six_sums = six;
      four_sums = other;
    } else {
      six_sums = add_sums(six_sums, six);
      four_sums = add_sums(four_sums, other);
    }
  }
  Choice choice;
#pragma unroll
  for (int token = 0; token < Thread::kTokens; ++token) {
    const float six =
        kValues ? six_sums.e[token] : __fadd_rn(six_sums.e[2 * token], six_sums.e[2 * token + 1]);
    const float other = kValues ? four_sums.e[token]
                                : __fadd_rn(four_sums.e[2 * token], four_sums.e[2 * token + 1]);
    if (allowed[token] && other < six) {
      scales[token] = four[token];
      choice.second |= token_bits<kValues>(token).magnitudes;
    }
    if (scales[token].by.d != 0.0f) choice.signs |= token_bits<kValues>(token).signs;
  }
  return choice;
}

// ---- codes and scales ----

template <bool kValues, int kScaleBytes>
__device__ __forceinline__ void store_scales(const SideMap& map, uint8_t* scales, int tile,
                                             int index, int block, const uint32_t* s) {
  if constexpr (kValues) {  // s: tokens 2t, 2t + 1, 2t + 8, 2t + 9
    uint8_t* at = scales + (tile * kTile + index * 4) * map.num_blocks * kScaleBytes +
                  block * 4 * kScaleBytes;
    if constexpr (kScaleBytes == 1) {
      *reinterpret_cast<uint32_t*>(at) = s[0] | s[1] << 8 | s[2] << 16 | s[3] << 24;
    } else if constexpr (kScaleBytes == 2) {
      *reinterpret_cast<uint2*>(at) = make_uint2(s[0] | s[1] << 16, s[2] | s[3] << 16);
    } else {
      *reinterpret_cast<uint4*>(at) =
          make_uint4(__byte_perm(s[0], s[1], 0x5410), __byte_perm(s[2], s[3], 0x5410),
                     __byte_perm(s[0], s[1], 0x7632), __byte_perm(s[2], s[3], 0x7632));
    }
  } else {  // s: tokens r, r + 8
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint8_t* at =
          scales + ((tile * kTile + index * 2 + half) * map.num_blocks + block) * kScaleBytes;
      if constexpr (kScaleBytes == 1) *at = static_cast<uint8_t>(s[half]);
      if constexpr (kScaleBytes == 2)
        *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(s[half]);
      if constexpr (kScaleBytes == 4) *reinterpret_cast<uint32_t*>(at) = s[half];
    }
  }
}

// Words of codes of one lane and k-step.
template <int kWords>
__device__ __forceinline__ void store_codes(uint8_t* codes, int num_steps, int tile, int step,
                                            int lane, const uint32_t* words) {
  auto* out = reinterpret_cast<uint32_t*>(codes) + tile * num_steps * kLanes * kWords;
  uint32_t* at = out + chunked_word(num_steps * kWords, lane, step * kWords);
  if constexpr (kWords == 2) {
    *reinterpret_cast<uint2*>(at) = make_uint2(words[0], words[1]);
  } else {
    *at = words[0];
  }
}

// A tile of one side of one unit; a warp. `mean` is in shared memory, fp32 [head_dim] (kMean only).
// Returns whether a block was not one for these instructions: then what was written is to be
// written again.
template <typename Codec, bool kValues, bool kMean>
__device__ __forceinline__ bool close_tile(const CloseUnit& unit, const float* mean, int tile,
                                           int lane) {
  using Thread = RowThread<kValues>;
  const SideMap& map = unit.side.map;
  const Codec codec(unit.params.global_scale);
  const int num_steps = map.head_dim / kTile;
  const int padded_steps = Codec::kBlockSteps == 2 ? (num_steps + 1) / 2 * 2 : num_steps;
  bool bad = false;
#pragma unroll 1
  for (int begin = 0; begin < padded_steps; begin += kLanes / Thread::kGroup) {
    const int step = begin + lane / Thread::kGroup;
    const int index = lane % Thread::kGroup;
    const bool present = step < num_steps;
    if constexpr (Codec::kBlockSteps != 2) {
      if (!present) continue;
    }
    const RowSource<kValues, kMean> from = {unit.source, tile * num_steps + step,
                                            Thread::first_lane(index), mean + step * kTile};
    BlockRange ranges[Thread::kTokens];
    if (present) find_ranges<Codec>(from, ranges);
    typename Codec::Scale scales[Thread::kTokens];
#pragma unroll
    for (int token = 0; token < Thread::kTokens; ++token) {
      if constexpr (Codec::kBlockSteps == 2)
        join_steps<Codec, Thread::kPartner>(present, ranges[token]);
      scales[token] = codec.make_scale(ranges[token]);
      bad |= !codec.fits(ranges[token], scales[token]);
    }
    if (!present) continue;
    [[maybe_unused]] Choice choice;
    if constexpr (Codec::kFourOverSix) choice = choose_scales(codec, from, ranges, scales);
#pragma unroll 2
    for (int i = 0; i < Thread::kWords; ++i) {
      const uint4 word = from.word(i);
      uint32_t words[Codec::kWords] = {};
      if constexpr (Codec::kFourOverSix) words[0] = choice.pick(word);
#pragma unroll
      for (int reg = 0; reg < 4 && !Codec::kFourOverSix; ++reg) {
        const Pair x = from.pair(word, i, reg);
        codec.emit(words, reg, x.signs, x.low, x.high, scales[Thread::token_of(reg, 0)],
                   scales[Thread::token_of(reg, 1)]);
      }
      store_codes<Codec::kWords>(unit.codes, num_steps, tile, step,
                                 from.first_lane + i * Thread::kStride, words);
    }
    if constexpr (Codec::kScaleBytes > 0) {
      if (Codec::kBlockSteps == 1 || step % 2 == 0) {
        uint32_t stored[Thread::kTokens];
#pragma unroll
        for (int token = 0; token < Thread::kTokens; ++token) stored[token] = scales[token].stored;
        store_scales<kValues, Codec::kScaleBytes>(map, unit.scales, tile, index,
                                                  step / Codec::kBlockSteps, stored);
      }
    }
  }
  return bad;
}

// fp32 mean of every channel over the page's tokens in order, rounded to BF16, into `mean` and the
// unit. K only.
__device__ inline void page_mean(const CloseUnit& unit, float* mean) {
  const SideMap& map = unit.side.map;
  const int num_steps = map.head_dim / kTile;
  const int num_tiles = map.page_tokens / kTile;
  for (int pair = threadIdx.x; pair < map.head_dim / 2; pair += kCloseThreads) {
    const int step = pair / 8;
    const int t = pair % 8 / 2;
    const int half = pair % 2;  // registers 0, 1 or 2, 3
    const auto* source = reinterpret_cast<const uint2*>(unit.source);
    float low = 0.0f;
    float high = 0.0f;
    for (int tile = 0; tile < num_tiles; ++tile) {
      uint2 rows[8];
#pragma unroll
      for (int g = 0; g < 8; ++g)
        rows[g] = source[source_chunk(tile * num_steps + step, 4 * g + t) * 2 + half];
#pragma unroll
      for (int r = 0; r < kTile; ++r) {
        const uint32_t word = r < 8 ? rows[r % 8].x : rows[r % 8].y;
        low = __fadd_rn(low, low_float(word));
        high = __fadd_rn(high, high_float(word));
      }
    }
    const float tokens = static_cast<float>(map.page_tokens);
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float value = (i == 0 ? low : high) / tokens;
      const uint32_t bits = formats::is_nan(value) ? 0u : to_bf16_saturated(value);
      mean[step * kTile + 2 * t + 8 * half + i] = from_bf16(static_cast<uint16_t>(bits));
      word |= bits << (16 * i);
    }
    *reinterpret_cast<uint32_t*>(unit.mean + step * kTile + 2 * t + 8 * half) = word;
  }
}

}  // namespace kvant::backend::cuda::quant
