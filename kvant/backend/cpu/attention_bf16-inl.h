// Queries, weights and scales of products in BF16; included by attention_bf16_avx512.cc and the AMX
// sources only.
//
// Words of 32 bits are two BF16: two channels of a token each (K) or two tokens of a channel (V).
// Fp32 values become the sum of two BF16, which is 16 bits.
#pragma once

#include "kvant/backend/cpu/attention_integer-inl.h"
#include "kvant/backend/cpu/attention_kernels.h"
#include "kvant/backend/cpu/attention_simd.h"

namespace kvant::backend::cpu::avx512 {
namespace {

constexpr int kMaxPageTokens = 128;

// Powers of two on codes that are BF16 already, 2^-kBelow of their values: their exponents take
// sums, zeros stay. E8M0 scales from 2^-97 on; up to 2^62 sums stay finite, too. Results are
// kScaledUnit of their values.
constexpr float kScaledUnit = 0x1p-20f;
template <int kBelow>
KVANT_INLINE __m512i e8m0_as_addends(__m512i scales) {  // 16-bit words, or twice in 32
  const __m512i exponents = _mm512_max_epi16(scales, _mm512_set1_epi16(127 - 97));
  return _mm512_slli_epi16(_mm512_sub_epi16(exponents, _mm512_set1_epi16(127 + 20 - kBelow)), 7);
}
KVANT_INLINE __m512i add_exponents(__m512i bf16, __m512i addends) {
  const __mmask32 not_zero = _mm512_test_epi16_mask(bf16, _mm512_set1_epi16(0x7fff));
  return _mm512_maskz_add_epi16(not_zero, bf16, addends);
}

// 16-bit values of channels or tokens in the order of the words that codes become.
template <Code C>
KVANT_INLINE __m512i in_row_order(__m512i v) {
  if constexpr (C == Code::kE4m3) {  // of each four: 0, 2, 1, 3
    return _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(v, 0xd8), 0xd8);
  }
  if constexpr (C == Code::kE2m1) {  // of each eight: 0, 4, 1, 5, 2, 6, 3, 7
    return _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4,
                                                                       5, 12, 13, 6, 7, 14, 15)));
  }
  return v;
}

// E8M0 scales of blocks of 32 channels of V as add_exponents() takes them, [block][page_tokens],
// tokens in the order of the words that codes become.
template <int kBelow>
void load_exponents(const DecodeArgs& side, uint16_t* exponents) {
  for (int at = 0; at < side.head_dim / 32 * side.page_tokens; at += 32) {
    const auto* scales = reinterpret_cast<const __m256i*>(side.scales + at);
    const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(scales));
    _mm512_store_si512(exponents + at, in_row_order<Code::kE4m3>(e8m0_as_addends<kBelow>(words)));
  }
}

// Fp32 values of 32 channels or tokens as two rows of words: what BF16 holds of each, and the rest.
template <Code C>
KVANT_INLINE void store_parts(F first, F second, uint8_t* upper, uint8_t* lower) {
  const F x[2] = {first, second};
  const auto join = [](const F(&v)[2]) KVANT_ALWAYS {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v[1].v, v[0].v));
  };
  const auto widen = [](__m256i v) KVANT_ALWAYS {
    return as_float({_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)});
  };
  const __m512i top = join(x);
  const F rest[2] = {sub(x[0], widen(_mm512_castsi512_si256(top))),
                     sub(x[1], widen(_mm512_extracti64x4_epi64(top, 1)))};
  _mm512_store_si512(upper, in_row_order<C>(top));
  _mm512_store_si512(lower, in_row_order<C>(join(rest)));
}

}  // namespace
}  // namespace kvant::backend::cpu::avx512
