// Codes as BF16 for AMX tiles; included by attention_floats_amx.cc only.
//
// A row of B is sixteen words of two BF16: two channels of a token each (K) or two tokens of a
// channel (V). Codes become BF16 exactly, but for a power of two: f16 arithmetic gives normal
// numbers, and f16's exponent and upper mantissa are those of a BF16 with another bias.
#pragma once

#include "kvant/backend/cpu/attention_bf16-inl.h"
#include "kvant/backend/cpu/attention_integer-inl.h"
#include "kvant/backend/cpu/attention_kernels.h"
#include "kvant/backend/cpu/attention_simd.h"

namespace kvant::backend::cpu::amx {
namespace {

using namespace avx512;  // NOLINT(google-build-using-namespace): the level's vector language

// Rows of A are so many times their values: sums keep clear of what fp32 flushes to zero.
template <Code C>
constexpr float kRowFactor = C == Code::kBf16 ? 1.0f : 0x1p64f;
// What sums have to be multiplied by for code values (E2M1: times their scales).
template <Code C>
constexpr float kSumFactor = C == Code::kBf16   ? 1.0f
                             : C == Code::kE4m3 ? 0x1p41f
                                                : 0x1p48f;

// Normal f16 numbers of at most eight significant bits as 2^-112 of their values.
KVANT_INLINE __m512i as_bf16(__m512i half) {
  return _mm512_and_si512(_mm512_srai_epi16(half, 3), _mm512_set1_epi16(-0x7001));
}
KVANT_INLINE __m512i mul_halves(__m512i a, __m512i b) {
  return _mm512_castph_si512(_mm512_mul_ph(_mm512_castsi512_ph(a), _mm512_castsi512_ph(b)));
}

// Unpacked E4M3 are 2^-kCodesBelow of their values.
constexpr int kCodesBelow = 112 - 7;

// E4M3 in the upper bytes. Moved into f16 they are 2^-8 of their values, subnormals included; times
// 2^15 none is subnormal.
KVANT_INLINE __m512i e4m3_as_bf16(__m512i upper_bytes) {
  const __m512i half =
      _mm512_and_si512(_mm512_srai_epi16(upper_bytes, 1), _mm512_set1_epi16(-0x4080));
  return as_bf16(mul_halves(half, _mm512_set1_epi16(0x7800)));
}
// Words of four E4M3 as two rows of B: `scale(0)` of the even two and `scale(1)` of the odd two.
template <typename Scale>
KVANT_INLINE void unpack_e4m3(__m512i words, uint8_t* rows, Scale&& scale) {
  const __m512i even = e4m3_as_bf16(_mm512_slli_epi16(words, 8)), odd = e4m3_as_bf16(words);
  _mm512_store_si512(rows, scale(Int<0>{}, even));
  _mm512_store_si512(rows + 64, scale(Int<1>{}, odd));
}

// Where the bytes of two words of eight bits begin so that each is moved up seven places, twice.
constexpr Order<uint8_t, 64> begins_of_scales() {
  Order<uint8_t, 64> order{};
  for (int i = 0; i < 64; ++i)
    order.at[i] = static_cast<uint8_t>((i % 8 / 4 * 32 + i % 2 * 8 - 7 + 64) % 64);
  return order;
}
constexpr Order<uint8_t, 64> kScaleBegins = begins_of_scales();

// Sixteen E4M3 scales, none negative, each twice, as f16: 2^-8 of their values.
KVANT_INLINE __m512i scales_as_half(const uint8_t* scales) {
  return _mm512_multishift_epi64_epi8(_mm512_load_si512(kScaleBegins.at), load_u8(scales).v);
}

// Of each byte the lower one of its pair, in lanes of sixteen.
constexpr Order<uint8_t, 64> lower_bytes() {
  Order<uint8_t, 64> order{};
  for (int i = 0; i < 64; ++i) order.at[i] = static_cast<uint8_t>(i % 16 / 2 * 2);
  return order;
}
constexpr Order<uint8_t, 64> kLowerByte = lower_bytes();

// 2^8 times E2M1 in f16: lower bytes are 0.
#define KVANT_E2M1_HALF                                                                            \
  0x00, 0x58, 0x5c, 0x5e, 0x60, 0x62, 0x64, 0x66, -0x80, -0x28, -0x24, -0x22, -0x20, -0x1e, -0x1c, \
      -0x1a
// vpermb looks at six bits, of which the upper two are the neighbour's.
alignas(64) constexpr int8_t kE2m1Half[64] = {KVANT_E2M1_HALF, KVANT_E2M1_HALF, KVANT_E2M1_HALF,
                                              KVANT_E2M1_HALF};
#undef KVANT_E2M1_HALF

// Words of eight E2M1 as four rows of B: nibbles J and J + 4, times `scale`, f16 like they are. Of
// the two ports for such instructions one shifts, the other looks up and moves bytes; while tiles
// are used only the former multiplies. So this shares them out.
KVANT_INLINE void unpack_e2m1(__m512i words, uint8_t* rows, __m512i scale) {
  const __m512i table = _mm512_load_si512(kE2m1Half);
  const __m512i even = _mm512_permutexvar_epi8(words, table);  // bytes of nibbles 0, 2, 4, 6
  const __m512i odd = _mm512_permutexvar_epi8(_mm512_srli_epi16(words, 4), table);
  const __m512i upper = _mm512_set1_epi16(-256);
  const __m512i half[4] = {
      _mm512_slli_epi16(even, 8),
      _mm512_maskz_shuffle_epi8(0xaaaaaaaaaaaaaaaa, odd, _mm512_load_si512(kLowerByte.at)),
      _mm512_and_si512(even, upper), _mm512_and_si512(odd, upper)};
  unroll<4>([&](auto j) KVANT_ALWAYS {
    _mm512_store_si512(rows + 64 * j.value, as_bf16(mul_halves(half[j.value], scale)));
  });
}

// store_parts() of values times kRowFactor.
template <Code C>
KVANT_INLINE void store_row_parts(F first, F second, uint8_t* upper, uint8_t* lower) {
  const F factor = bcast(kRowFactor<C>);
  store_parts<C>(mul(first, factor), mul(second, factor), upper, lower);
}

// Calls f(Int<code>) with the code as a constant.
template <typename Fn>
KVANT_INLINE void with_tile_code(Code code, Fn&& f) {
  if (code == Code::kE4m3) return f(Int<static_cast<int>(Code::kE4m3)>{});
  if (code == Code::kE2m1) return f(Int<static_cast<int>(Code::kE2m1)>{});
  f(Int<static_cast<int>(Code::kBf16)>{});
}

}  // namespace
}  // namespace kvant::backend::cpu::amx
