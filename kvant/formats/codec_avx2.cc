// The codec loops at AVX2: eight lanes. The algorithms are in codec_simd.inc.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kvant/formats/codec_kernels.h"

namespace kvant::formats::internal::avx2 {
namespace {

// Eight 32-bit lanes. F: fp32, I: int32, M: a mask with all bits of a lane equal.
struct V {
  static constexpr int kLanes = 8;
  static constexpr bool kDivides = true;
  using F = __m256;
  using I = __m256i;
  using M = __m256i;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static F set(float a) { return _mm256_set1_ps(a); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F mul_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }   // fl(a b + c)
  static F sub_mul(F c, F a, F b) { return _mm256_fnmadd_ps(a, b, c); }  // fl(c - a b)

  static F fmin(F a, F b) { return _mm256_min_ps(a, b); }

  static I iload(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void istore(void* p, I a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
  static I iset(int32_t a) { return _mm256_set1_epi32(a); }
  static I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
  static I isub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I iand(I a, I b) { return _mm256_and_si256(a, b); }
  static I ior(I a, I b) { return _mm256_or_si256(a, b); }
  static I ixor(I a, I b) { return _mm256_xor_si256(a, b); }
  static I imin(I a, I b) { return _mm256_min_epi32(a, b); }
  static I imax(I a, I b) { return _mm256_max_epi32(a, b); }
  static I shift_left(I a, int n) { return _mm256_slli_epi32(a, n); }
  static I shift_right(I a, int n) { return _mm256_srli_epi32(a, n); }
  static I shift_right_signed(I a, int n) { return _mm256_srai_epi32(a, n); }
  static I bits(F a) { return _mm256_castps_si256(a); }
  static F from_bits(I a) { return _mm256_castsi256_ps(a); }
  static I round(F a) { return _mm256_cvtps_epi32(a); }  // to nearest even
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }

  static M greater(I a, I b) { return _mm256_cmpgt_epi32(a, b); }
  static M equal(I a, I b) { return _mm256_cmpeq_epi32(a, b); }
  static M is_zero(F a) {
    return _mm256_castps_si256(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_EQ_OQ));
  }
  static M less(F a, F b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static M less_equal(F a, F b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LE_OQ)); }
  static M both(M a, M b) { return _mm256_and_si256(a, b); }
  static bool any(M m) { return _mm256_movemask_epi8(m) != 0; }
  static I select(M m, I yes, I no) { return _mm256_blendv_epi8(no, yes, m); }
  static F fselect(M m, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(m)); }
  static I clear(M m, I a) { return _mm256_andnot_si256(m, a); }  // 0 where m

  static int32_t reduce_max(I a) {
    __m128i b = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    b = _mm_max_epi32(b, _mm_shuffle_epi32(b, 0x4e));
    b = _mm_max_epi32(b, _mm_shuffle_epi32(b, 0xb1));
    return _mm_cvtsi128_si32(b);
  }
  static int32_t reduce_min(I a) {
    __m128i b = _mm_min_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    b = _mm_min_epi32(b, _mm_shuffle_epi32(b, 0x4e));
    b = _mm_min_epi32(b, _mm_shuffle_epi32(b, 0xb1));
    return _mm_cvtsi128_si32(b);
  }
  // x[i][j] becomes x[j][i].
  static void transpose(F* x) {
    F t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    F q[8];  // q[r + c] has rows r to r + 3 of columns c and c + 4
    for (int r = 0; r < 8; r += 4) {
      q[r] = _mm256_shuffle_ps(t[r], t[r + 2], 0x44);
      q[r + 1] = _mm256_shuffle_ps(t[r], t[r + 2], 0xee);
      q[r + 2] = _mm256_shuffle_ps(t[r + 1], t[r + 3], 0x44);
      q[r + 3] = _mm256_shuffle_ps(t[r + 1], t[r + 3], 0xee);
    }
    for (int c = 0; c < 4; ++c) {
      x[c] = _mm256_permute2f128_ps(q[c], q[4 + c], 0x20);
      x[4 + c] = _mm256_permute2f128_ps(q[c], q[4 + c], 0x31);
    }
  }

  // Codes 0..255 (or -128..127 for the signed version) to bytes.
  static void store_bytes(uint8_t* p, I a) {
    const __m128i words =
        _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }
  static void store_signed_bytes(uint8_t* p, I a) {
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  }
  // Codes 0..15, two to a byte, the even one low.
  static void store_nibbles(uint8_t* p, I a) {
    const __m128i words =
        _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const __m128i bytes = _mm_packus_epi16(words, words);
    const __m128i pairs = _mm_maddubs_epi16(bytes, _mm_set1_epi16(0x1001));
    const int32_t packed = _mm_cvtsi128_si32(_mm_packus_epi16(pairs, pairs));
    std::memcpy(p, &packed, 4);
  }
  // a[0], b[0], a[1], b[1], ...
  static void store_pairs(uint8_t* p, I a, I b) {
    const __m256i low = _mm256_unpacklo_epi32(a, b), high = _mm256_unpackhi_epi32(a, b);
    auto* const out = reinterpret_cast<__m256i*>(p);
    _mm256_storeu_si256(out, _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(low, high, 0x31));
  }
  static void store_words(uint16_t* p, I a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)));
  }
  static I load_bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static I load_signed_bytes(const uint8_t* p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static I load_nibbles(const uint8_t* p) {
    int32_t packed;
    std::memcpy(&packed, p, 4);
    const __m128i bytes = _mm_cvtsi32_si128(packed);
    const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
    return _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(low, high));
  }
  static I load_words(const uint8_t* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_f16(uint16_t* p, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static F load_f16(const void* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  // E4M3 bytes but for the NaN codes: as an f16 with the exponent moved, times 2^8.
  static F load_e4m3(const uint8_t* p) {
    const __m128i codes = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(codes, _mm_set1_epi16(0x80)), 8);
    const __m128i magnitude = _mm_slli_epi16(_mm_and_si128(codes, _mm_set1_epi16(0x7f)), 7);
    return _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(sign, magnitude)), _mm256_set1_ps(256.0f));
  }
  static F load_e5m2(const uint8_t* p) {
    const __m128i codes = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_cvtph_ps(_mm_slli_epi16(codes, 8));
  }
  // Values of E2M1 codes 0..15.
  static F e2m1(I codes) {
    const __m256 magnitudes = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
    const __m256 magnitude = _mm256_permutevar8x32_ps(magnitudes, codes);  // looks at three bits
    const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(codes, 3), 31);
    return _mm256_or_ps(magnitude, _mm256_castsi256_ps(sign));
  }
  // Butterflies of strides 1 to kLanes / 2 within a vector: partner + (x, negated in the upper
  // half).
  static F small_butterflies(F x) {
    const __m256 negate1 = _mm256_setr_ps(0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f);
    const __m256 negate2 = _mm256_setr_ps(0.0f, 0.0f, -0.0f, -0.0f, 0.0f, 0.0f, -0.0f, -0.0f);
    const __m256 negate4 = _mm256_setr_ps(0.0f, 0.0f, 0.0f, 0.0f, -0.0f, -0.0f, -0.0f, -0.0f);
    x = _mm256_add_ps(_mm256_permute_ps(x, 0xb1), _mm256_xor_ps(x, negate1));
    x = _mm256_add_ps(_mm256_permute_ps(x, 0x4e), _mm256_xor_ps(x, negate2));
    return _mm256_add_ps(_mm256_permute2f128_ps(x, x, 1), _mm256_xor_ps(x, negate4));
  }
};

}  // namespace
}  // namespace kvant::formats::internal::avx2

#define KVANT_SIMD_LEVEL avx2
#define KVANT_SIMD_KERNELS avx2_kernels
#include "kvant/formats/codec_simd.inc"
#endif
