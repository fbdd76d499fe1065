// What the integer products of keys and of values have in common; included by
// attention_integer_avx512.cc and *_amx.cc only.
#pragma once

#include "kvant/backend/cpu/attention_fetch-inl.h"
#include "kvant/backend/cpu/attention_integer.h"
#include "kvant/backend/cpu/attention_kernels.h"
#include "kvant/backend/cpu/attention_scales-inl.h"
#include "kvant/backend/cpu/attention_simd.h"

namespace kvant::backend::cpu::avx512 {
namespace {

// Whether this source is for processors whose 512-bit instructions take two halves: a product takes
// the two pipes for multiplications for a cycle, and what others do meanwhile costs nothing.
#if defined(KVANT_HALF_RATE_512)
constexpr bool kHalfRate = true;
#else
constexpr bool kHalfRate = false;
#endif

// Unrolled bodies must not become functions: their sums live in registers.
#define KVANT_ALWAYS __attribute__((always_inline))
// Kernels are not inlined where they are called: g++ 12 then runs out of registers (a seventh
// slower).
#define KVANT_OWN_FRAME __attribute__((noinline))

// 2 * E2M1 + `offset`, entry for entry of the code.
#define KVANT_E2M1(offset)                                                                      \
  (offset), 1 + (offset), 2 + (offset), 3 + (offset), 4 + (offset), 6 + (offset), 8 + (offset), \
      12 + (offset), (offset), -1 + (offset), -2 + (offset), -3 + (offset), -4 + (offset),      \
      -6 + (offset), -8 + (offset), -12 + (offset)
// vpermb looks at six bits, of which the upper two are the neighbour's.
alignas(64) constexpr int8_t kUnsignedE2m1[64] = {KVANT_E2M1(12), KVANT_E2M1(12), KVANT_E2M1(12),
                                                  KVANT_E2M1(12)};
alignas(64) constexpr int8_t kSignedE2m1[64] = {KVANT_E2M1(0), KVANT_E2M1(0), KVANT_E2M1(0),
                                                KVANT_E2M1(0)};
#undef KVANT_E2M1
#define KVANT_U4 -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7
alignas(64) constexpr int8_t kSignedU4[64] = {KVANT_U4, KVANT_U4, KVANT_U4, KVANT_U4};
#undef KVANT_U4

KVANT_INLINE __m512i bcast_dword(const void* p) {
  int32_t x;
  __builtin_memcpy(&x, p, sizeof(x));
  return _mm512_set1_epi32(x);
}

// A vector that stays in a register: g++ 12 would load it again for each use.
KVANT_INLINE __m512i load_once(const void* p) {
  __m512i x = _mm512_loadu_si512(p);
  __asm__("" : "+v"(x));
  return x;
}

// sum += a . b in each lane, four bytes of `a` unsigned, of `b` signed.
KVANT_INLINE void add_products(__m512i& sum, __m512i a, __m512i b) {
  sum = _mm512_dpbusd_epi32(sum, a, b);
}

constexpr int kMaxRows = 4;  // of a register tile

// An index for a permute.
template <typename T, int N>
struct alignas(64) Order {
  T at[N];
};

// ---- K's codes ----

// Of 16 bits in each of two words: where byte i of a word begins whose bit 2 is bit 4i + `element`.
constexpr Order<uint8_t, 64> begins_of_high_bits(int element) {
  Order<uint8_t, 64> order{};
  for (int i = 0; i < 64; ++i)
    order.at[i] = static_cast<uint8_t>((i % 8 / 4 * 32 + i % 4 * 4 + element + 62) % 64);
  return order;
}
constexpr Order<uint8_t, 64> kHighBitBegins[4] = {begins_of_high_bits(0), begins_of_high_bits(1),
                                                  begins_of_high_bits(2), begins_of_high_bits(3)};

// Of 16 bits in each word: bits 4i to 4i + 3 as the lower ones of byte i.
KVANT_INLINE __m512i high_bits_of_bytes(__m512i words) {
  const __m512i twice = _mm512_shuffle_epi8(
      words,
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13)));
  return _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, twice, _mm512_srli_epi16(twice, 4));
}

// Bytes of E2M1 of which each is 2 * E2M1 + 12: those in the lower nibbles of `w`, or the upper.
KVANT_INLINE __m512i e2m1_bytes(__m512i w, bool upper) {
  return _mm512_permutexvar_epi8(upper ? _mm512_srli_epi16(w, 4) : w,
                                 _mm512_load_si512(kUnsignedE2m1));
}

template <Code C>
constexpr int key_step_bytes() {  // sixteen channels of sixteen tokens
  return C == Code::kS8 ? 256 : C == Code::kU3 ? 96 : C == Code::kU2 ? 64 : 128;
}

// Vector J of the four of sixteen channels at `p`: a lane is four channels of a token, unsigned.
template <Code C, int J>
KVANT_INLINE __m512i key_bytes(const uint8_t* p) {
  if constexpr (C == Code::kS8) {
    return _mm512_xor_si512(_mm512_loadu_si512(p + 64 * J), _mm512_set1_epi8(-128));
  } else if constexpr (C == Code::kE2m1) {
    return e2m1_bytes(_mm512_loadu_si512(p + 64 * (J / 2)), J % 2 == 1);
  } else if constexpr (C == Code::kU4) {
    const __m512i w = _mm512_loadu_si512(p + 64 * (J / 2));
    return _mm512_and_si512(J % 2 == 0 ? w : _mm512_srli_epi16(w, 4), _mm512_set1_epi8(15));
  } else {
    const __m512i w = _mm512_srli_epi16(_mm512_loadu_si512(p), 2 * J);
    const __m512i two = _mm512_and_si512(w, _mm512_set1_epi8(3));
    if constexpr (C == Code::kU2) return two;
    // The high bit of element 4i + J to bit 2 of byte i: bytes that begin two bits before it.
    const __m512i high =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 64)));
    if constexpr (kHalfRate) {  // vpmultishiftqb is one for the pipes that multiply
      const __m512i bits = high_bits_of_bytes(high);
      const __m512i moved = J < 2    ? _mm512_slli_epi16(bits, 2 - J)
                            : J == 2 ? bits
                                     : _mm512_srli_epi16(bits, 1);
      return _mm512_ternarylogic_epi32(two, moved, _mm512_set1_epi8(4), 0xf8);
    }
    const __m512i begins = _mm512_load_si512(kHighBitBegins[J].at);
    // two | (high & 4)
    return _mm512_ternarylogic_epi32(two, _mm512_multishift_epi64_epi8(begins, high),
                                     _mm512_set1_epi8(4), 0xf8);
  }
}

}  // namespace
}  // namespace kvant::backend::cpu::avx512
