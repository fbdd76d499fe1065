// The vector operations of the kernels with eight lanes (AVX2, FMA, F16C); simd_scalar.h defines
// them.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace kvant::backend::cpu::avx2 {

struct Simd {
  static constexpr int kLanes = 8;
  static constexpr int kMaxPanel = 4;
  static constexpr bool kDotsBytes = false;
  using F = __m256;
  using I = __m256i;

  static I load_i(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store_low_halves(void* p, I v) {
    const __m256i low = _mm256_and_si256(v, _mm256_set1_epi32(0xffff));
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static int32_t max_of_lanes(I v) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    return _mm_cvtsi128_si32(m);
  }
  static int32_t sum_of_lanes(I v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
    return _mm_cvtsi128_si32(s);
  }
  static I broadcast_i(const void* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
  }
  static I set1_i(uint32_t v) { return _mm256_set1_epi32(static_cast<int32_t>(v)); }
  static I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
  static I or_masked(I a, I b, I mask) { return _mm256_or_si256(a, _mm256_and_si256(b, mask)); }
  static I max_signed(I a, I b) { return _mm256_max_epi32(a, b); }
  static I add_i(I a, I b) { return _mm256_add_epi32(a, b); }
  template <int kBits>
  static I shift_left(I v) {
    return _mm256_slli_epi32(v, kBits);
  }
  template <int kBits>
  static I shift_left_16(I v) {
    return _mm256_slli_epi16(v, kBits);
  }
  template <int kBits>
  static I shift_right_16(I v) {
    return _mm256_srli_epi16(v, kBits);
  }
  static I dot_pairs(I acc, I a, I b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }

  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static I round_to_int(F v) { return _mm256_cvtps_epi32(v); }
  static F as_float(I v) { return _mm256_castsi256_ps(v); }
  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float v) { return _mm256_set1_ps(v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load_unaligned_f32(const void* p) { return _mm256_castsi256_ps(load_i(p)); }
  static F load_f16(const void* p) { return _mm256_cvtph_ps(load_half(p)); }
  static F load_bf16(const void* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(p)), 16));
  }
  static F load_e4m3(const uint8_t* p) {
    const __m128i code = _mm_unpacklo_epi8(_mm_setzero_si128(),
                                           _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m128i bits = _mm_and_si128(_mm_srai_epi16(code, 1), _mm_set1_epi16(-0x4080));
    return _mm256_cvtph_ps(bits);
  }
  static F load_u8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static F load_i8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F negated_fma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }

 private:
  static __m128i load_half(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
  }
};

}  // namespace kvant::backend::cpu::avx2
