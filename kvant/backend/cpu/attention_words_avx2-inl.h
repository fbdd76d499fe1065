// Codes of keys and values as words for the products of AVX2; included by
// attention_integer_avx2.cc only.
//
// A 32-bit word of codes holds 4, 8 or 16 of them: channels of a token of K, tokens of a channel of
// V. They are taken out in pairs (key_pair(), value_pair()), and queries and weights lie in the
// order of these pairs (store_words()).
#pragma once

#include "kvant/backend/cpu/attention_kernels.h"
#include "kvant/backend/cpu/attention_simd.h"

namespace kvant::backend::cpu::avx2 {
namespace {

constexpr int kE2m1Offset = 12;  // makes twice an E2M1 unsigned

template <Code C>
constexpr int codes_of_word() {
  return C == Code::kS8 ? 4 : C == Code::kU3 || C == Code::kU2 ? 16 : 8;
}
template <Code C>
constexpr int key_step_bytes() {  // codes_of_word() channels of sixteen tokens
  return C == Code::kU3 ? 96 : 64;
}
// What products with codes have to be multiplied by.
template <Code C>
constexpr float code_factor() {
  return C == Code::kE2m1 ? 0.5f : 1.0f;
}

KVANT_INLINE __m256i load_32(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
KVANT_INLINE __m256i bcast_dword(const void* p) {
  int32_t x;
  __builtin_memcpy(&x, p, sizeof(x));
  return _mm256_set1_epi32(x);
}
KVANT_INLINE void add_products(__m256i& sum, __m256i a, __m256i b) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}

// ---- codes ----

// Words of codes on the way to pairs: E2M1 as two vectors of bytes, of U3 the high bits apart.
struct Unpacked {
  __m256i low;
  __m256i high;
};

KVANT_INLINE __m256i e2m1_table(int offset) {
  const auto entry = [&](int value) { return static_cast<char>(value + offset); };
  const __m128i table = _mm_setr_epi8(entry(0), entry(1), entry(2), entry(3), entry(4), entry(6),
                                      entry(8), entry(12), entry(0), entry(-1), entry(-2),
                                      entry(-3), entry(-4), entry(-6), entry(-8), entry(-12));
  return _mm256_broadcastsi128_si256(table);
}
KVANT_INLINE Unpacked e2m1_bytes(__m256i w, __m256i table) {
  const __m256i nibble = _mm256_set1_epi8(15);
  return {_mm256_shuffle_epi8(table, _mm256_and_si256(w, nibble)),
          _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble))};
}

// Eight tokens' words at `p`; of U3 the high bits of their sixteen channels at `high`.
template <Code C>
KVANT_INLINE Unpacked unpack_keys(const uint8_t* p, const uint8_t* high) {
  const __m256i w = load_32(p);
  if constexpr (C == Code::kE2m1) return e2m1_bytes(w, e2m1_table(kE2m1Offset));
  if constexpr (C == Code::kU3) {
    const __m256i bits =
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high)));
    // Channels from 8 on to the upper half of the word.
    return {w, _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(0xff)),
                               _mm256_slli_epi32(_mm256_srli_epi32(bits, 8), 16))};
  }
  return {w, w};
}

// Pair P of a word's channels: (0, 2), (1, 3) of four; (0, 4), (2, 6), (1, 5), (3, 7) of eight;
// (P, P + 8) of sixteen. E2M1 twice its value plus kE2m1Offset.
template <Code C, int P>
KVANT_INLINE __m256i key_pair(const Unpacked& keys) {
  if constexpr (C == Code::kS8) {
    return _mm256_srai_epi16(P == 0 ? _mm256_slli_epi16(keys.low, 8) : keys.low, 8);
  } else if constexpr (C == Code::kE2m1) {
    const __m256i bytes = P < 2 ? keys.low : keys.high;
    return P % 2 == 0 ? _mm256_and_si256(bytes, _mm256_set1_epi16(0xff))
                      : _mm256_srli_epi16(bytes, 8);
  } else if constexpr (C == Code::kU4) {
    constexpr int kNibble = P / 2 + P % 2 * 2;
    return _mm256_and_si256(_mm256_srli_epi16(keys.low, 4 * kNibble), _mm256_set1_epi16(15));
  } else {
    const __m256i two = _mm256_and_si256(_mm256_srli_epi16(keys.low, 2 * P), _mm256_set1_epi16(3));
    if constexpr (C == Code::kU2) return two;
    const __m256i moved =
        P < 2 ? _mm256_slli_epi16(keys.high, 2 - P) : _mm256_srli_epi16(keys.high, P - 2);
    return _mm256_or_si256(two, _mm256_and_si256(moved, _mm256_set1_epi16(4)));
  }
}

// The same of V's tokens, E2M1 with its sign.
template <Code C, int P>
KVANT_INLINE __m256i value_pair(const Unpacked& values) {
  if constexpr (C == Code::kU4) return key_pair<C, P>(values);
  const __m256i bytes = C == Code::kS8 || P < 2 ? values.low : values.high;
  return _mm256_srai_epi16(P % 2 == 0 ? _mm256_slli_epi16(bytes, 8) : bytes, 8);
}

// Sixteen integers as words in the order of the pairs.
template <Code C>
KVANT_INLINE void store_words(I x, int16_t* to) {
  const auto pairs = [](auto even, auto odd) { return _mm256_blend_epi16(even, odd, 0xaa); };
  if constexpr (codes_of_word<C>() == 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), pairs(x.lo, _mm256_slli_epi32(x.hi, 16)));
    return;
  }
  for (int half = 0; half < 2; ++half) {
    const __m256i v = half == 0 ? x.lo : x.hi;
    __m128i words;
    if constexpr (C == Code::kS8) {
      const __m256i odd = _mm256_slli_epi32(_mm256_shuffle_epi32(v, _MM_SHUFFLE(3, 2, 3, 2)), 16);
      words =
          _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs(v, odd), _MM_SHUFFLE(3, 1, 2, 0)));
    } else {
      const __m128i odd = _mm_slli_epi32(_mm256_extracti128_si256(v, 1), 16);
      words = _mm_shuffle_epi32(_mm_blend_epi16(_mm256_castsi256_si128(v), odd, 0xaa),
                                _MM_SHUFFLE(3, 1, 2, 0));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8 * half), words);
  }
}

KVANT_INLINE I round_to_int(F x) {
  return {_mm256_cvtps_epi32(x.lo), _mm256_cvtps_epi32(x.hi)};
}
KVANT_INLINE F magnitude(F x) {
  const __m256 bits = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.lo, bits), _mm256_and_ps(x.hi, bits)};
}

}  // namespace
}  // namespace kvant::backend::cpu::avx2
