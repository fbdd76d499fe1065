// The codec loops at AVX-512: sixteen lanes. The algorithms are in codec_simd.inc.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kvant/formats/codec_kernels.h"

namespace kvant::formats::internal::avx512 {
namespace {

// Sixteen 32-bit lanes. F: fp32, I: int32, M: one bit a lane.
struct V {
  static constexpr int kLanes = 16;
  static constexpr bool kDivides = false;
  using F = __m512;
  using I = __m512i;
  using M = __mmask16;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F set(float a) { return _mm512_set1_ps(a); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F mul_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }   // fl(a b + c)
  static F sub_mul(F c, F a, F b) { return _mm512_fnmadd_ps(a, b, c); }  // fl(c - a b)

  static F fmin(F a, F b) { return _mm512_min_ps(a, b); }

  static I iload(const void* p) { return _mm512_loadu_si512(p); }
  static void istore(void* p, I a) { _mm512_storeu_si512(p, a); }
  static I iset(int32_t a) { return _mm512_set1_epi32(a); }
  static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
  static I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I iand(I a, I b) { return _mm512_and_si512(a, b); }
  static I ior(I a, I b) { return _mm512_or_si512(a, b); }
  static I ixor(I a, I b) { return _mm512_xor_si512(a, b); }
  static I imin(I a, I b) { return _mm512_min_epi32(a, b); }
  static I imax(I a, I b) { return _mm512_max_epi32(a, b); }
  static I shift_left(I a, int n) { return _mm512_slli_epi32(a, static_cast<unsigned>(n)); }
  static I shift_right(I a, int n) { return _mm512_srli_epi32(a, static_cast<unsigned>(n)); }
  static I shift_right_signed(I a, int n) { return _mm512_srai_epi32(a, static_cast<unsigned>(n)); }
  static I bits(F a) { return _mm512_castps_si512(a); }
  static F from_bits(I a) { return _mm512_castsi512_ps(a); }
  static I round(F a) { return _mm512_cvtps_epi32(a); }  // to nearest even
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }

  static M greater(I a, I b) { return _mm512_cmpgt_epi32_mask(a, b); }
  static M equal(I a, I b) { return _mm512_cmpeq_epi32_mask(a, b); }
  static M is_zero(F a) { return _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_EQ_OQ); }
  static M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static M less_equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
  static M both(M a, M b) { return static_cast<M>(a & b); }
  static bool any(M m) { return m != 0; }
  static I select(M m, I yes, I no) { return _mm512_mask_blend_epi32(m, no, yes); }
  static F fselect(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
  static I clear(M m, I a) { return _mm512_maskz_mov_epi32(static_cast<M>(~m), a); }  // 0 where m

  static int32_t reduce_max(I a) {
    __m256i h = _mm256_max_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    __m128i b = _mm_max_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
    b = _mm_max_epi32(b, _mm_shuffle_epi32(b, 0x4e));
    b = _mm_max_epi32(b, _mm_shuffle_epi32(b, 0xb1));
    return _mm_cvtsi128_si32(b);
  }
  static int32_t reduce_min(I a) {
    __m256i h = _mm256_min_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    __m128i b = _mm_min_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
    b = _mm_min_epi32(b, _mm_shuffle_epi32(b, 0x4e));
    b = _mm_min_epi32(b, _mm_shuffle_epi32(b, 0xb1));
    return _mm_cvtsi128_si32(b);
  }
  // x[i][j] becomes x[j][i].
  static void transpose(F* x) {
    F t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    const auto low = [&](int a, int b) {
      return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[a]), _mm512_castps_pd(t[b])));
    };
    const auto high = [&](int a, int b) {
      return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[a]), _mm512_castps_pd(t[b])));
    };
    F q[16];  // q[r + c] has rows r to r + 3 of columns c, c + 4, c + 8, c + 12
    for (int r = 0; r < 16; r += 4) {
      q[r] = low(r, r + 2);
      q[r + 1] = high(r, r + 2);
      q[r + 2] = low(r + 1, r + 3);
      q[r + 3] = high(r + 1, r + 3);
    }
    for (int c = 0; c < 4; ++c) {
      const F a = _mm512_shuffle_f32x4(q[c], q[4 + c], 0x44);
      const F b = _mm512_shuffle_f32x4(q[8 + c], q[12 + c], 0x44);
      x[c] = _mm512_shuffle_f32x4(a, b, 0x88);
      x[4 + c] = _mm512_shuffle_f32x4(a, b, 0xdd);
      const F d = _mm512_shuffle_f32x4(q[c], q[4 + c], 0xee);
      const F e = _mm512_shuffle_f32x4(q[8 + c], q[12 + c], 0xee);
      x[8 + c] = _mm512_shuffle_f32x4(d, e, 0x88);
      x[12 + c] = _mm512_shuffle_f32x4(d, e, 0xdd);
    }
  }

  // Codes 0..255 (or -128..127 for the signed version) to bytes.
  static void store_bytes(uint8_t* p, I a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
  }
  static void store_signed_bytes(uint8_t* p, I a) { store_bytes(p, a); }
  // Codes 0..15, two to a byte, the even one low.
  static void store_nibbles(uint8_t* p, I a) {
    const __m128i pairs = _mm_maddubs_epi16(_mm512_cvtepi32_epi8(a), _mm_set1_epi16(0x1001));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(pairs, pairs));
  }
  // a[0], b[0], a[1], b[1], ...
  static void store_pairs(uint8_t* p, I a, I b) {
    const __m512i low = _mm512_unpacklo_epi32(a, b), high = _mm512_unpackhi_epi32(a, b);
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    _mm512_storeu_si512(p, _mm512_permutex2var_epi64(low, first, high));
    _mm512_storeu_si512(p + 64, _mm512_permutex2var_epi64(low, second, high));
  }
  static void store_words(uint16_t* p, I a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a));
  }
  static I load_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I load_signed_bytes(const uint8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I load_nibbles(const uint8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
    return _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high));
  }
  static I load_words(const uint8_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_f16(uint16_t* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static F load_f16(const void* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  }
  // E4M3 bytes but for the NaN codes: as an f16 with the exponent moved, times 2^8.
  static F load_e4m3(const uint8_t* p) {
    const __m256i codes =
        _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(0x80)), 8);
    const __m256i magnitude =
        _mm256_slli_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(0x7f)), 7);
    return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(sign, magnitude)), _mm512_set1_ps(256.0f));
  }
  static F load_e5m2(const uint8_t* p) {
    const __m256i codes =
        _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_cvtph_ps(_mm256_slli_epi16(codes, 8));
  }
  // Values of E2M1 codes 0..15.
  static F e2m1(I codes) {
    const __m512 values = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f,
                                         -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
    return _mm512_permutexvar_ps(codes, values);
  }
  // Butterflies of strides 1 to kLanes / 2 within a vector: partner + (x, negated in the upper
  // half).
  static F small_butterflies(F x) {
    const __m512 sign = _mm512_set1_ps(-0.0f);
    const auto negated = [&](__mmask16 lanes) { return _mm512_mask_xor_ps(x, lanes, x, sign); };
    x = _mm512_add_ps(_mm512_permute_ps(x, 0xb1), negated(0xaaaa));
    x = _mm512_add_ps(_mm512_permute_ps(x, 0x4e), negated(0xcccc));
    x = _mm512_add_ps(_mm512_shuffle_f32x4(x, x, 0xb1), negated(0xf0f0));
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, x, 0x4e), negated(0xff00));
  }
};

}  // namespace
}  // namespace kvant::formats::internal::avx512

#define KVANT_SIMD_LEVEL avx512
#define KVANT_SIMD_KERNELS avx512_kernels
#include "kvant/formats/codec_simd.inc"
#endif
