// What the integer products of keys and of values have in common; included by
// attention_integer_avx512.cc only.
#pragma once

#include "kvant/backend/cpu/attention_fetch-inl.h"
#include "kvant/backend/cpu/attention_integer.h"
#include "kvant/backend/cpu/attention_kernels.h"
#include "kvant/backend/cpu/attention_scales-inl.h"
#include "kvant/backend/cpu/attention_simd.h"

namespace kvant::backend::cpu::avx512 {
namespace {

// Unrolled bodies must not become functions: their sums live in registers.
#define KVANT_ALWAYS __attribute__((always_inline))
// Kernels are not inlined where they are called: g++ 12 then runs out of registers (a seventh
// slower).
#define KVANT_OWN_FRAME __attribute__((noinline))

// 2 * E2M1 * `factor` + `offset`, entry for entry of the code.
#define KVANT_E2M1(factor, offset)                                                                 \
  (offset), factor + (offset), 2 * factor + (offset), 3 * factor + (offset),                       \
      4 * factor + (offset), 6 * factor + (offset), 8 * factor + (offset), 12 * factor + (offset), \
      (offset), -factor + (offset), -2 * factor + (offset), -3 * factor + (offset),                \
      -4 * factor + (offset), -6 * factor + (offset), -8 * factor + (offset),                      \
      -12 * factor + (offset)
// vpermb looks at six bits, of which the upper two are the neighbour's.
alignas(64) constexpr int8_t kUnsignedE2m1[64] = {KVANT_E2M1(1, 12), KVANT_E2M1(1, 12),
                                                  KVANT_E2M1(1, 12), KVANT_E2M1(1, 12)};
alignas(64) constexpr int8_t kE2m1Times8[64] = {KVANT_E2M1(8, 0), KVANT_E2M1(8, 0),
                                                KVANT_E2M1(8, 0), KVANT_E2M1(8, 0)};
#undef KVANT_E2M1

KVANT_INLINE __m512i bcast_dword(const void* p) {
  int32_t x;
  __builtin_memcpy(&x, p, sizeof(x));
  return _mm512_set1_epi32(x);
}

constexpr int kMaxRows = 4;  // of a register tile

// An index for a permute.
template <typename T, int N>
struct alignas(64) Order {
  T at[N];
};

}  // namespace
}  // namespace kvant::backend::cpu::avx512
