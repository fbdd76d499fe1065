// Codecs of rows (blocks along head_dim) as kernels use them: on pairs of numbers that share a
// word.
//
// A policy has
//   kWords      words of codes per lane and k-step: 1 (4 bits) or 2 (8 bits)
//   kBlockSteps k-steps that share a scale: 0 (no scale), 1, 2
//   kSum        policies whose scale depends on the values' errors too (+46)
//   Scale       what encodes a block; make_scale(range) from its largest magnitude (or its range)
//   fits        whether the instructions of numbers.cuh give the scalar codec's bits for that block
//   emit        codes of a pair, added to the words of the pair's lane
// and kOfBf16 tells whether the numbers are those of the page itself, not less a mean. Bits equal
// those of formats/*.h.
#pragma once

#include "kvant/backend/cuda/quant/numbers.cuh"
#include "kvant/formats/fp8.h"
#include "kvant/formats/fp8e5m2.h"
#include "kvant/formats/int4.h"
#include "kvant/formats/int8.h"
#include "kvant/formats/mxfp4.h"
#include "kvant/formats/mxfp8.h"
#include "kvant/formats/nvfp4.h"

namespace kvant::backend::cuda::quant {

// A block's statistics: the largest magnitude, and with kAffine the range (as order keys).
struct BlockRange {
  float amax = 0.0f;
  int32_t min_key = 0x7fffffff;
  int32_t max_key = -0x7fffffff - 1;
};

__device__ __forceinline__ bool is_plain(float amax, float limit) {
  return as_bits(amax) <= 0x7f7fffffu && amax <= limit;
}

// ---- placing codes in words (ADR 0004) ----

// `bytes`: the pair's codes in bytes 0 and 1.
__device__ __forceinline__ void put_bytes(uint32_t* words, int reg, uint32_t bytes) {
  words[reg / 2] |= reg % 2 == 0 ? bytes : bytes << 16;
}

// `magnitudes`: two fp16 with the code in bits 11..9; `signs`: bits 15 and 31 under `mask`.
__device__ __forceinline__ void put_e2m1(uint32_t* words, int reg, uint32_t magnitudes,
                                         uint32_t signs, uint32_t mask) {
  const int sign_shift = 15 - e2m1_sign_bit(reg);
  words[0] |= magnitudes >> (3 * reg);
  words[0] |= signs >> sign_shift & mask >> sign_shift;
}

// ---- policies ----

template <typename F, bool kOfBf16>
struct Float8Codec {
  static constexpr int kWords = 2;
  static constexpr int kBlockSteps = 0;
  static constexpr int kScaleBytes = 0;
  static constexpr bool kAffine = false;
  static constexpr bool kFourOverSix = false;
  struct Scale {
    uint32_t stored = 0;
  };
  float limit;
  bool unit;
  Divisor by;

  __device__ explicit Float8Codec(float g)
      : limit(F::max_magnitude(g)), unit(g == 1.0f), by(make_divisor(g)) {}
  __device__ bool fits(const BlockRange& range, const Scale&) const {
    return is_plain(range.amax, limit) && in_range(by.d);
  }
  __device__ Scale make_scale(const BlockRange&) const { return {}; }
  __device__ void emit(uint32_t* words, int reg, uint32_t, float low, float high, const Scale&,
                       const Scale&) const {
    if (!unit) {
      low = copysignf(quotient(low, by), low);  // a correction turns -0 into +0
      high = copysignf(quotient(high, by), high);
    }
    if constexpr (F::kInfo.element == formats::Element::kE4m3) {
      put_bytes(words, reg, ptx::e4m3x2_of_f32(low, high));
    } else {
      put_bytes(words, reg, ptx::e5m2x2_of_f32(low, high));
    }
  }
};

template <typename F, bool kOfBf16>
struct MicroscalingCodec {
  static constexpr bool kE2m1 = F::kInfo.element == formats::Element::kE2m1;
  static constexpr int kWords = kE2m1 ? 1 : 2;
  static constexpr int kBlockSteps = 2;
  static constexpr int kScaleBytes = 1;
  static constexpr bool kAffine = false;
  static constexpr bool kFourOverSix = false;
  struct Scale {
    uint32_t stored;
    float factor;
  };

  __device__ explicit MicroscalingCodec(float) {}
  __device__ bool fits(const BlockRange& range, const Scale&) const {
    return is_plain(range.amax, F::max_magnitude(1.0f));
  }
  __device__ Scale make_scale(const BlockRange& range) const {
    const uint32_t byte = F::block_scale(&range.amax, 1, 1.0f);
    return {byte, F::inverse(byte) * (kE2m1 ? kE2m1Unit : 1.0f)};
  }
  __device__ void emit(uint32_t* words, int reg, uint32_t signs, float low, float high,
                       const Scale& low_scale, const Scale& high_scale) const {
    if constexpr (kE2m1 && kOfBf16) {
      // 8 bits of mantissa: as fp16 the product lies on its side of every boundary.
      put_e2m1(words, reg,
               round_e2m1_pair(ptx::f16x2_of_f32(fabsf(low) * low_scale.factor,
                                                 fabsf(high) * high_scale.factor)),
               signs, 0x80008000u);
    } else if constexpr (kE2m1) {
      const float a = round_e2m1(fabsf(low) * low_scale.factor);
      const float b = round_e2m1(fabsf(high) * high_scale.factor);
      put_e2m1(words, reg, ptx::f16x2_of_f32(a, b), signs, 0x80008000u);
    } else {
      put_bytes(words, reg, ptx::e4m3x2_of_f32(low * low_scale.factor, high * high_scale.factor));
    }
  }
};

template <bool kOfBf16>
struct Int8Codec {
  static constexpr int kWords = 2;
  static constexpr int kBlockSteps = 2;
  static constexpr int kScaleBytes = 2;
  static constexpr bool kAffine = false;
  static constexpr bool kFourOverSix = false;
  struct Scale {
    uint32_t stored;
    Divisor by;
  };

  __device__ explicit Int8Codec(float) {}
  __device__ bool fits(const BlockRange& range, const Scale&) const {
    return is_plain(range.amax, formats::Int8::max_magnitude(1.0f));
  }
  __device__ Scale make_scale(const BlockRange& range) const {
    const uint32_t bits = f16_saturated(range.amax / 127.0f);
    return {bits, make_divisor(f16_value(bits))};
  }
  __device__ void emit(uint32_t* words, int reg, uint32_t, float low, float high,
                       const Scale& low_scale, const Scale& high_scale) const {
    const uint32_t a = round_integer(short_quotient(low, low_scale.by), -127.0f, 127.0f);
    const uint32_t b = round_integer(short_quotient(high, high_scale.by), -127.0f, 127.0f);
    put_bytes(words, reg, __byte_perm(a, b, 0x0040) & 0xffffu);
  }
};

// Also the step of ":channel" formats with 4 bits.
template <bool kOfBf16>
struct Int4Codec {
  static constexpr int kWords = 1;
  static constexpr int kBlockSteps = 2;
  static constexpr int kScaleBytes = 4;
  static constexpr bool kAffine = true;
  static constexpr bool kFourOverSix = false;
  struct Scale {
    uint32_t stored;  // scale in the low half, zero in the high one
    float zero;
    Divisor by;
  };

  __device__ explicit Int4Codec(float) {}
  __device__ bool fits(const BlockRange& range, const Scale&) const {
    return is_plain(range.amax, formats::Int4::max_magnitude(1.0f));
  }
  __device__ static Scale scale_of(uint32_t stored) {
    return {stored, f16_value(stored >> 16), make_divisor(f16_value(stored & 0xffffu))};
  }
  __device__ Scale make_scale(const BlockRange& range) const {
    const float low = from_order_key(range.min_key);
    const float high = from_order_key(range.max_key);
    return scale_of(f16_saturated((high - low) / 15.0f) | f16_saturated(low) << 16);
  }
  // The codes of two numbers, in the halves of a word.
  __device__ static uint32_t codes(float low, float high, const Scale& low_scale,
                                   const Scale& high_scale) {
    const uint32_t a = round_integer(short_quotient(__fadd_rn(low, -low_scale.zero), low_scale.by));
    const uint32_t b =
        round_integer(short_quotient(__fadd_rn(high, -high_scale.zero), high_scale.by));
    return __vmins2(__vmaxs2(__byte_perm(a, b, 0x5410), 0u), 0x000f000fu);
  }
  __device__ void emit(uint32_t* words, int reg, uint32_t, float low, float high,
                       const Scale& low_scale, const Scale& high_scale) const {
    words[0] |= codes(low, high, low_scale, high_scale) << (4 * reg);
  }
};

// kShort: g is a power of two, so that d has as few bits as its E4M3 scale.
template <bool kSearch, bool kShort, bool kOfBf16>
struct Nvfp4Codec {
  static constexpr int kWords = 1;
  static constexpr int kBlockSteps = 1;
  static constexpr int kScaleBytes = 1;
  static constexpr bool kAffine = false;
  static constexpr bool kFourOverSix = kSearch;
  struct Scale {
    uint32_t stored;
    float s;     // times 2^14, like d
    Divisor by;  // d
  };
  float g;
  float limit;
  Divisor six;  // 6 g

  __device__ explicit Nvfp4Codec(float global_scale)
      : g(global_scale),
        limit(formats::Nvfp4::max_magnitude(global_scale)),
        six(make_divisor(6.0f * global_scale)) {}

  __device__ bool fits(const BlockRange& range, const Scale& scale) const {
    // Squares of errors are to be neither subnormal nor infinite.
    const bool squares_fit =
        !kSearch || scale.by.d == 0.0f || (scale.by.d >= 0x1p-30f && scale.by.d <= 0x1p60f);
    return is_plain(range.amax, limit) && in_range(scale.by.d) && squares_fit && g >= 0x1p-60f &&
           g <= 0x1p60f;
  }
  __device__ Scale scale_of(float ratio) const {
    const uint32_t code = ptx::e4m3x2_of_f32(ratio, 0.0f) & 0xffu;
    const float s = e4m3_value(code);
    return {code, s * 0x1p14f, make_divisor(__fmul_rn(s, g) * 0x1p14f)};
  }
  __device__ Scale make_scale(const BlockRange& range) const {
    return scale_of(kShort ? short_quotient(range.amax, six) : range.amax / (6.0f * g));
  }
  // The candidate that ends at 4; its ratio says whether it is allowed.
  __device__ float four_ratio(const BlockRange& range) const { return range.amax / (4.0f * g); }

  // |x| rounded, times 2^-14.
  __device__ float value(float x, const Scale& scale) const {
    return round_e2m1(kShort ? short_quotient(fabsf(x), scale.by) : quotient(fabsf(x), scale.by));
  }
  // Of two numbers, as fp16. A number of 8 bits and a boundary of at most 3 times a divisor of 4
  // are equal or 2^-8 of them apart: their quotient keeps its side of the boundary as fp16, where
  // it has 10 bits behind the point, and the reciprocal's error does not show.
  __device__ uint32_t values(float low, float high, const Scale& low_scale,
                             const Scale& high_scale) const {
    if constexpr (kShort && kOfBf16) {
      return round_e2m1_pair(ptx::f16x2_of_f32(__fmul_rn(fabsf(low), low_scale.by.r),
                                               __fmul_rn(fabsf(high), high_scale.by.r)));
    } else {
      return ptx::f16x2_of_f32(value(low, low_scale), value(high, high_scale));
    }
  }
  // What x lacks; `value` is its own.
  __device__ float error(float x, float value, const Scale& scale) const {
    if constexpr (kShort && kOfBf16) return fmaf(-value, scale.by.d, fabsf(x));  // exact
    const float decoded =
        kShort ? __fmul_rn(value, scale.by.d) : __fmul_rn(__fmul_rn(value, scale.s), g);
    return __fadd_rn(fabsf(x), -decoded);
  }
  // The sum of two errors' squares, each rounded. Of BF16 numbers they need no rounding: an error
  // has at most 11 bits.
  __device__ static float sum_of_squares(float a, float b) {
    if constexpr (kShort && kOfBf16) return fmaf(a, a, __fmul_rn(b, b));
    return __fadd_rn(__fmul_rn(a, a), __fmul_rn(b, b));
  }
  __device__ static uint32_t sign_mask(const Scale& low, const Scale& high) {
    return (low.by.d == 0.0f ? 0u : 0x8000u) | (high.by.d == 0.0f ? 0u : 0x80000000u);
  }
  __device__ void emit(uint32_t* words, int reg, uint32_t signs, float low, float high,
                       const Scale& low_scale, const Scale& high_scale) const {
    put_e2m1(words, reg, values(low, high, low_scale, high_scale), signs,
             sign_mask(low_scale, high_scale));
  }
};

}  // namespace kvant::backend::cuda::quant
