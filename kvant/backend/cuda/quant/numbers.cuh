// Roundings and divisions of the codecs with the machine's own instructions, exact as codecs.md
// asks.
//
// Each of them gives the bits of the scalar function in base/small_floats.h that it stands for, in
// the range that its comment names; outside it the callers leave a page to the scalar code.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "kvant/backend/cuda/ptx.cuh"

namespace kvant::backend::cuda::quant {

__device__ __forceinline__ float as_float(uint32_t bits) {
  return __uint_as_float(bits);
}
__device__ __forceinline__ uint32_t as_bits(float x) {
  return __float_as_uint(x);
}

// The two numbers of a word of a BF16 page.
__device__ __forceinline__ float low_float(uint32_t word) {
  return as_float(word << 16);
}
__device__ __forceinline__ float high_float(uint32_t word) {
  return as_float(word & 0xffff0000u);
}

// ---- division ----

// A divisor, its reciprocal to within an ulp, and what the reciprocal lacks. Zero stands for "all
// codes are 0".
struct Divisor {
  float d = 0.0f;
  float r = 0.0f;
  float rest = 0.0f;
};

__device__ __forceinline__ Divisor make_divisor(float d) {
  float r = ptx::reciprocal_fast(d);
  r = __fmaf_rn(r, __fmaf_rn(-d, r, 1.0f), r);
  const float rest = __fmul_rn(__fmaf_rn(-d, r, 1.0f), r);
  return {d, d == 0.0f ? 0.0f : r, d == 0.0f ? 0.0f : rest};
}

// Quotients are exact enough for divisors in this range or zero.
__device__ __forceinline__ bool in_range(float d) {
  return d == 0.0f || (d >= 0x1p-90f && d <= 0x1p90f);
}

// fl(x / d) as the compiler's own division computes it where nothing over- or underflows. Smaller
// quotients (|x| < 2^-100) may be off, but then they round to code 0 either way.
__device__ __forceinline__ float quotient(float x, const Divisor& by) {
  float q = __fmul_rn(x, by.r);
  q = __fmaf_rn(__fmaf_rn(-by.d, q, x), by.r, q);
  return __fmaf_rn(__fmaf_rn(-by.d, q, x), by.r, q);
}

// The same up to one ulp, but never on another side of a boundary of at most 8 significant bits, if
// d has at most 12. r + rest is 1 / d to 2^-46, so the result is the rounding of x / d + e with |e|
// < 2^-20 ulps. It could differ from fl(x / d) in a comparison with the boundary b only if x / d
// were that close to the middle of b and its neighbour; but x - d b is a multiple of x's ulp and d
// times half an ulp of b is not, and both are multiples of 2^-12 ulps of x: they are at least 2^-12
// ulps apart.
__device__ __forceinline__ float short_quotient(float x, const Divisor& by) {
  return __fmaf_rn(x, by.r, __fmul_rn(x, by.rest));
}

// ---- rounding ----

// from_e4m3 of a code that is no NaN.
__device__ __forceinline__ float e4m3_value(uint32_t code) {
  const uint32_t pair = ptx::f16x2_of_e4m3x2(code);
  return __half2float(__ushort_as_half(static_cast<uint16_t>(pair)));
}

// to_f16_saturated of a number that is no NaN.
__device__ __forceinline__ uint32_t f16_saturated(float x) {
  const uint32_t h = __half_as_ushort(__float2half_rn(x));
  return (h & 0x7fffu) == 0x7c00u ? h - 1 : h;
}
__device__ __forceinline__ float f16_value(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
}

// E2M1 values are handled times 2^-14: as fp16 their bits 11..9 are then the code.
inline constexpr float kE2m1Unit = 0x1p-14f;

// RNE to E2M1 of a >= 0, saturating, both times 2^-14. An fp32 sum with a power of two whose ulp is
// the target's step at `a` rounds like the target.
__device__ __forceinline__ float round_e2m1(float a) {
  const uint32_t power = max(as_bits(a), as_bits(kE2m1Unit)) & 0x7f800000u;
  const float magic = __fmul_rn(as_float(power), 0x1p22f);
  return fminf(__fadd_rn(__fadd_rn(a, magic), -magic), 6.0f * kE2m1Unit);
}

// The same of two fp16: code in bits 11..9 of each half. As fp16 a number times 2^-14 has E2M1's
// own exponents, subnormals included, so that a mantissa of one bit is a multiple of 2^9 of its
// bits.
__device__ __forceinline__ uint32_t round_e2m1_pair(uint32_t pair) {
  const uint32_t odd = pair >> 9 & 0x00010001u;
  return __vminu2(pair + 0x00ff00ffu + odd, 0x0e000e00u) & 0x0e000e00u;
}

// RNE(q) in the low 16 bits of the result, with a sign; |q| < 2^15.
inline constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
__device__ __forceinline__ uint32_t round_integer(float q) {
  return as_bits(__fadd_rn(q, kMagic));
}
// The same of a clamped q.
__device__ __forceinline__ uint32_t round_integer(float q, float low, float high) {
  return as_bits(__fadd_rn(fminf(fmaxf(q, low), high), kMagic));
}

// ---- order ----

// Of two BF16.
inline constexpr uint32_t kSigns = 0x80008000u;
inline constexpr uint32_t kInfinities = 0x7f807f80u;

// Integers in the order of the floats, -0 below +0: formats::order_key.
__device__ __forceinline__ int32_t order_key(float x) {
  const int32_t bits = __float_as_int(x);
  return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ __forceinline__ float from_order_key(int32_t key) {
  return __int_as_float(key ^ (key >> 31 & 0x7fffffff));
}

// Of two BF16: NaN if one is, and -0 below +0.
__device__ __forceinline__ uint32_t min_bf16x2(uint32_t a, uint32_t b) {
  uint32_t least;
  asm("min.NaN.bf16x2 %0,%1,%2;" : "=r"(least) : "r"(a), "r"(b));
  return least;
}
__device__ __forceinline__ uint32_t max_bf16x2(uint32_t a, uint32_t b) {
  uint32_t most;
  asm("max.NaN.bf16x2 %0,%1,%2;" : "=r"(most) : "r"(a), "r"(b));
  return most;
}

}  // namespace kvant::backend::cuda::quant
