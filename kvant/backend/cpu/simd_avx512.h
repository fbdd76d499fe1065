// The vector operations of the kernels with sixteen lanes (AVX-512 with VNNI); simd_scalar.h
// defines them.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace kvant::backend::cpu::avx512 {

struct Simd {
  static constexpr int kLanes = 16;
  static constexpr int kMaxPanel = 12;
  static constexpr bool kDotsBytes = true;  // has dot_bytes and split_codes
  using F = __m512;
  using I = __m512i;

  static I load_i(const void* p) { return _mm512_loadu_si512(p); }
  static void store_low_halves(void* p, I v) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
  }
  static int32_t max_of_lanes(I v) { return _mm512_reduce_max_epi32(v); }
  // Wraps around, which _mm512_reduce_add_epi32 of g++ 12 does with signed arithmetic: undefined,
  // and UBSan says so when an activation is not finite.
  static int32_t sum_of_lanes(I v) {
    const __m256i half =
        _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
    return _mm_cvtsi128_si32(s);
  }
  static I broadcast_i(const void* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
  }
  static I set1_i(uint32_t v) { return _mm512_set1_epi32(static_cast<int32_t>(v)); }
  static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
  static I or_masked(I a, I b, I mask) {
    return _mm512_ternarylogic_epi32(a, b, mask, 0xf8);  // a | (b & mask)
  }
  static I max_signed(I a, I b) { return _mm512_max_epi32(a, b); }
  static I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
  template <int kBits>
  static I shift_left(I v) {
    return _mm512_slli_epi32(v, kBits);
  }
  template <int kBits>
  static I shift_left_16(I v) {
    return _mm512_slli_epi16(v, kBits);
  }
  template <int kBits>
  static I shift_right_16(I v) {
    return _mm512_srli_epi16(v, kBits);
  }
  static I dot_pairs(I acc, I a, I b) { return _mm512_dpwssd_epi32(acc, a, b); }

  // Unsigned bytes of `a` times signed bytes of `b`.
  static I dot_bytes(I acc, I a, I b) { return _mm512_dpbusd_epi32(acc, a, b); }
  // 32 codes of 16 bits to bytes, in place: [group] int8 high [4], low [4] (matrix_layout.h).
  static void split_codes(void* codes) {
    alignas(64) static constexpr uint8_t kOrder[64] = {
        0,  8,  2,  10, 1,  9,  3,  11, 4,  12, 6,  14, 5,  13, 7,  15, 16, 24, 18, 26, 17, 25,
        19, 27, 20, 28, 22, 30, 21, 29, 23, 31, 32, 40, 34, 42, 33, 41, 35, 43, 36, 44, 38, 46,
        37, 45, 39, 47, 48, 56, 50, 58, 49, 57, 51, 59, 52, 60, 54, 62, 53, 61, 55, 63};
    const I code = _mm512_loadu_si512(codes);
    const I high = _mm512_srai_epi16(_mm512_add_epi16(code, _mm512_set1_epi16(64)), 7);
    const I low = _mm512_sub_epi16(code, _mm512_slli_epi16(high, 7));
    const I both =
        _mm512_or_si512(_mm512_and_si512(high, _mm512_set1_epi16(0xff)), _mm512_slli_epi16(low, 8));
    _mm512_storeu_si512(codes, _mm512_permutexvar_epi8(_mm512_load_si512(kOrder), both));
  }

  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static I round_to_int(F v) { return _mm512_cvtps_epi32(v); }
  static F as_float(I v) { return _mm512_castsi512_ps(v); }
  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load_unaligned_f32(const void* p) { return _mm512_castsi512_ps(load_i(p)); }
  static F load_f16(const void* p) { return _mm512_cvtph_ps(load_half(p)); }
  static F load_bf16(const void* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_half(p)), 16));
  }
  static F load_e4m3(const uint8_t* p) {
    const __m256i code = _mm256_slli_epi16(
        _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 8);
    return _mm512_cvtph_ps(
        _mm256_and_si256(_mm256_srai_epi16(code, 1), _mm256_set1_epi16(-0x4080)));
  }
  static F load_u8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static F load_i8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F negated_fma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }

 private:
  static __m256i load_half(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
};

}  // namespace kvant::backend::cpu::avx512
