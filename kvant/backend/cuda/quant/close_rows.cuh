// Closing of formats whose blocks lie along head_dim, a thread per block or two, in registers.
//
// In `sm90` order a lane's words hold the same elements in every format (ADR 0004). A thread reads
// all BF16 words of 16 channels of a few tokens: of K two tokens (four neighbouring lanes), of V
// four (eight lanes, four apart). So it has whole blocks of 16 for itself, and writes whole words
// of codes and of V's scales; blocks of 32 need one exchange with the neighbouring k-step. All
// accesses of a warp together cover whole sectors.
#pragma once

#include "kvant/backend/cuda/quant/close_args.cuh"
#include "kvant/backend/cuda/quant/row_codecs.cuh"

namespace kvant::backend::cuda::quant {

// Which words and which pairs of them a thread has. A batch is what is encoded together: of K one
// token, whose 16 channels are 8 pairs; of V two tokens, the halves of 16 pairs.
template <bool kValues>
struct RowThread {
  static constexpr int kGroup = kValues ? 4 : 8;   // threads of a k-step
  static constexpr int kLoads = kValues ? 8 : 4;   // words of four registers
  static constexpr int kStride = kValues ? 4 : 1;  // lanes between them
  static constexpr int kPairs = kValues ? 16 : 8;  // of a batch
  static constexpr int kPartner = kGroup;          // lane of the next k-step, exclusive or

  static __device__ constexpr int load_of(int pair) { return pair % kLoads; }
  static __device__ constexpr int reg_of(int batch, int pair) {
    return kValues ? 2 * batch + pair / kLoads : batch + 2 * (pair / kLoads);
  }
  // First channel of a K pair in its k-step.
  static __device__ constexpr int channel_of(int pair) { return 2 * (pair % 4) + 8 * (pair / 4); }
  static __device__ int first_lane(int index) { return kValues ? index : 4 * index; }
};

__device__ __forceinline__ uint32_t component(const uint4& word, int reg) {
  return reg == 0 ? word.x : reg == 1 ? word.y : reg == 2 ? word.z : word.w;
}

template <typename Thread>
struct Batch {
  float low[Thread::kPairs];
  float high[Thread::kPairs];
  uint32_t signs[Thread::kPairs];  // of low and high in bits 15 and 31, other bits anything
};

struct ErrorSums {
  float low6 = 0.0f, high6 = 0.0f, low4 = 0.0f, high4 = 0.0f;

  __device__ __forceinline__ void add(bool first, const ErrorSums& more) {
    if (first) {
      *this = more;
      return;
    }
    low6 = __fadd_rn(low6, more.low6);
    high6 = __fadd_rn(high6, more.high6);
    low4 = __fadd_rn(low4, more.low4);
    high4 = __fadd_rn(high4, more.high4);
  }
};

// +46: encodes a batch with both candidate scales and keeps the better one, block by block.
template <typename Codec, bool kValues>
__device__ __forceinline__ void emit_four_over_six(
    const Codec& codec, int batch, const Batch<RowThread<kValues>>& x, const BlockRange& low_range,
    const BlockRange& high_range, typename Codec::Scale* scales, uint32_t (*words)[1]) {
  using Thread = RowThread<kValues>;
  using Scale = typename Codec::Scale;
  const Scale low6 = scales[0];
  const Scale high6 = scales[1];
  const float low_ratio = codec.four_ratio(low_range);
  const float high_ratio = kValues ? codec.four_ratio(high_range) : low_ratio;
  const Scale low4 = codec.scale_of(low_ratio);
  const Scale high4 = kValues ? codec.scale_of(high_ratio) : low4;
  uint32_t six[Thread::kPairs];
  uint32_t four[Thread::kPairs];
  // Errors are added as codecs.md section 3 says, and in an order that keeps few sums alive: i and
  // i + 8, + 4, + 2, + 1. Of K a pair holds channels i and i + 1: halves are added last.
  constexpr int kTop = Thread::kPairs / 2;
  ErrorSums total;
#pragma unroll
  for (int first = 0; first < kTop / 4; ++first) {
    ErrorSums quarter;
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      ErrorSums eighth;
#pragma unroll
      for (int third = 0; third < 2; ++third) {
        ErrorSums pair;
#pragma unroll
        for (int fourth = 0; fourth < 2; ++fourth) {
          const int p = first + second * (kTop / 4) + third * (kTop / 2) + fourth * kTop;
          const float a6 = codec.value(x.low[p], low6), b6 = codec.value(x.high[p], high6);
          const float a4 = codec.value(x.low[p], low4), b4 = codec.value(x.high[p], high4);
          six[p] = ptx::f16x2_of_f32(a6, b6);
          four[p] = ptx::f16x2_of_f32(a4, b4);
          pair.add(
              fourth == 0,
              {codec.squared_error(x.low[p], a6, low6), codec.squared_error(x.high[p], b6, high6),
               codec.squared_error(x.low[p], a4, low4), codec.squared_error(x.high[p], b4, high4)});
        }
        eighth.add(third == 0, pair);
      }
      quarter.add(second == 0, eighth);
    }
    total.add(first == 0, quarter);
  }
  if constexpr (!kValues) {
    total.low6 = total.high6 = __fadd_rn(total.low6, total.high6);
    total.low4 = total.high4 = __fadd_rn(total.low4, total.high4);
  }
  const bool low_four = low_ratio <= 448.0f && total.low4 < total.low6;
  const bool high_four = high_ratio <= 448.0f && total.high4 < total.high6;
  scales[0] = low_four ? low4 : low6;
  scales[1] = high_four ? high4 : high6;
  const uint32_t choice = (low_four ? 0xffffu : 0u) | (high_four ? 0xffff0000u : 0u);
  const uint32_t mask = Codec::sign_mask(scales[0], scales[1]);
#pragma unroll
  for (int p = 0; p < Thread::kPairs; ++p) {
    put_e2m1(words[Thread::load_of(p)], Thread::reg_of(batch, p),
             (six[p] & ~choice) | (four[p] & choice), x.signs[p], mask);
  }
}

// Largest magnitudes, or ranges, of the two halves of a batch (of K: of both together, twice).
template <typename Codec, bool kValues, bool kMean>
__device__ __forceinline__ void find_ranges(const Batch<RowThread<kValues>>& x,
                                            BlockRange* ranges) {
  using Thread = RowThread<kValues>;
  if constexpr (kMean) {
    float amax = 0.0f;  // K only. fmaxf drops NaN: added numbers show it
    float nan = 0.0f;
#pragma unroll
    for (int p = 0; p < Thread::kPairs; ++p) {
      amax = fmaxf(amax, fmaxf(fabsf(x.low[p]), fabsf(x.high[p])));
      nan = __fadd_rn(nan, __fadd_rn(x.low[p], x.high[p]));
      if constexpr (Codec::kAffine) {
        const int32_t a = order_key(x.low[p]), b = order_key(x.high[p]);
        ranges[0].min_key = min(ranges[0].min_key, min(a, b));
        ranges[0].max_key = max(ranges[0].max_key, max(a, b));
      }
    }
    ranges[0].amax = nan != nan ? as_float(0x7fc00000u) : amax;
  } else {
    uint32_t amax = 0;
    uint32_t low_key = 0x7fff7fffu, high_key = 0x80008000u;
#pragma unroll
    for (int p = 0; p < Thread::kPairs; ++p) {
      amax = __vmaxu2(amax, x.signs[p] & 0x7fff7fffu);
      if constexpr (Codec::kAffine) {
        low_key = __vmins2(low_key, order_keys(x.signs[p]));
        high_key = __vmaxs2(high_key, order_keys(x.signs[p]));
      }
    }
    ranges[0].amax = low_float(amax);
    ranges[1].amax = high_float(amax);
    if constexpr (Codec::kAffine) {
      ranges[0].min_key = order_key(low_float(order_keys(low_key)));
      ranges[0].max_key = order_key(low_float(order_keys(high_key)));
      ranges[1].min_key = order_key(high_float(order_keys(low_key)));
      ranges[1].max_key = order_key(high_float(order_keys(high_key)));
    }
    if constexpr (!kValues) {
      ranges[0].amax = as_float(max(as_bits(ranges[0].amax), as_bits(ranges[1].amax)));
      ranges[0].min_key = min(ranges[0].min_key, ranges[1].min_key);
      ranges[0].max_key = max(ranges[0].max_key, ranges[1].max_key);
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

template <bool kValues, bool kMean>
__device__ __forceinline__ void unpack(const uint4* words, int batch, const float* mean,
                                       Batch<RowThread<kValues>>& x) {
  using Thread = RowThread<kValues>;
#pragma unroll
  for (int p = 0; p < Thread::kPairs; ++p) {
    const uint32_t word = component(words[Thread::load_of(p)], Thread::reg_of(batch, p));
    x.low[p] = low_float(word);
    x.high[p] = high_float(word);
    x.signs[p] = word;
    if constexpr (kMean) {
      const float2 b = *reinterpret_cast<const float2*>(mean + Thread::channel_of(p));
      x.low[p] = __fadd_rn(x.low[p], -b.x);
      x.high[p] = __fadd_rn(x.high[p], -b.y);
      x.signs[p] = __byte_perm(as_bits(x.low[p]), as_bits(x.high[p]), 0x7632);
    }
  }
}

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
  } else {  // s[0], s[2]: tokens r, r + 8
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint8_t* at =
          scales + ((tile * kTile + index * 2 + half) * map.num_blocks + block) * kScaleBytes;
      if constexpr (kScaleBytes == 1) *at = static_cast<uint8_t>(s[2 * half]);
      if constexpr (kScaleBytes == 2)
        *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(s[2 * half]);
      if constexpr (kScaleBytes == 4) *reinterpret_cast<uint32_t*>(at) = s[2 * half];
    }
  }
}

// A thread's words of codes of one k-step: kLoads lanes, kWords words of each.
template <bool kValues, int kWords>
__device__ __forceinline__ void store_codes(uint8_t* codes, int num_steps, int tile, int step,
                                            int first_lane, const uint32_t (*words)[kWords]) {
  using Thread = RowThread<kValues>;
  auto* out = reinterpret_cast<uint32_t*>(codes) + tile * num_steps * kLanes * kWords;
  const int first_word = step * kWords;
#pragma unroll
  for (int i = 0; i < Thread::kLoads; ++i) {
    uint32_t* at =
        out + chunked_word(num_steps * kWords, first_lane + i * Thread::kStride, first_word);
    if constexpr (kWords == 2) {
      *reinterpret_cast<uint2*>(at) = make_uint2(words[i][0], words[i][1]);
    } else {
      *at = words[i][0];
    }
  }
}

// One side of one unit. `mean` is in shared memory, fp32 [head_dim] (kMean only). Returns whether
// a block was not one for these instructions: then what was written is to be written again.
template <typename Codec, bool kValues, bool kMean>
__device__ bool close_rows(const CloseUnit& unit, const float* mean) {
  using Thread = RowThread<kValues>;
  const SideMap& map = unit.side.map;
  const Codec codec(unit.params.global_scale);
  const int num_steps = map.head_dim / kTile;
  const int padded_steps = Codec::kBlockSteps == 2 ? (num_steps + 1) / 2 * 2 : num_steps;
  const int num_tasks = map.page_tokens / kTile * padded_steps * Thread::kGroup;
  bool bad = false;
  for (int first = 0; first < num_tasks; first += kCloseThreads) {
    const int task = first + static_cast<int>(threadIdx.x);
    const int index = task % Thread::kGroup;
    const int step = task / Thread::kGroup % padded_steps;
    const int tile = task / Thread::kGroup / padded_steps;
    const bool present = task < num_tasks && step < num_steps;
    if constexpr (Codec::kBlockSteps != 2) {
      if (!present) continue;
    }
    uint4 in[Thread::kLoads] = {};
    if (present) {
#pragma unroll
      for (int i = 0; i < Thread::kLoads; ++i) {
        in[i] = unit.source[source_chunk(tile * num_steps + step, step,
                                         Thread::first_lane(index) + i * Thread::kStride)];
      }
    }
    uint32_t words[Thread::kLoads][Codec::kWords] = {};
    uint32_t stored[4];
#pragma unroll
    for (int batch = 0; batch < 2; ++batch) {
      Batch<Thread> x;
      unpack<kValues, kMean>(in, batch, mean + (present ? step : 0) * kTile, x);
      BlockRange ranges[2];
      find_ranges<Codec, kValues, kMean>(x, ranges);
      if constexpr (Codec::kBlockSteps == 2) {
        join_steps<Codec, Thread::kPartner>(present, ranges[0]);
        if constexpr (kValues) join_steps<Codec, Thread::kPartner>(present, ranges[1]);
      }
      typename Codec::Scale scales[2];
      scales[0] = codec.make_scale(ranges[0]);
      scales[1] = kValues ? codec.make_scale(ranges[1]) : scales[0];
      bad |= !codec.fits(ranges[0], scales[0]);
      if constexpr (kValues) bad |= !codec.fits(ranges[1], scales[1]);
      if constexpr (Codec::kFourOverSix) {
        emit_four_over_six<Codec, kValues>(codec, batch, x, ranges[0], ranges[1], scales, words);
      } else {
#pragma unroll
        for (int p = 0; p < Thread::kPairs; ++p) {
          codec.emit(words[Thread::load_of(p)], Thread::reg_of(batch, p), x.signs[p], x.low[p],
                     x.high[p], scales[0], scales[1]);
        }
      }
      stored[2 * batch] = scales[0].stored;
      stored[2 * batch + 1] = scales[1].stored;
    }
    if (!present) continue;
    store_codes<kValues>(unit.codes, num_steps, tile, step, Thread::first_lane(index), words);
    if constexpr (Codec::kScaleBytes > 0) {
      if (Codec::kBlockSteps == 1 || step % 2 == 0) {
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
        rows[g] = source[source_chunk(tile * num_steps + step, step, 4 * g + t) * 2 + half];
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
