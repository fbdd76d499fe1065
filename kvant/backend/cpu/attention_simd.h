// Sixteen lanes of fp32 or 32-bit integers on every SIMD level: one register (AVX-512), two (AVX2)
// or an array (any processor). The attention kernels are written once over these types.
//
// Included only by the three level sources, inside their namespace and an anonymous one, so that no
// inline function of one level can be linked into another. No containers, nothing that allocates.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define KVANT_INLINE inline __attribute__((always_inline))

namespace kvant::backend::cpu::KVANT_LEVEL {
namespace {

inline constexpr int kLanes = 16;

#if defined(__AVX512F__)

struct F {
  __m512 v;
};
struct I {
  __m512i v;
};
struct Table {
  __m512 v;
};

KVANT_INLINE F load(const float* p) {
  return {_mm512_loadu_ps(p)};
}
KVANT_INLINE void store(float* p, F a) {
  _mm512_storeu_ps(p, a.v);
}
KVANT_INLINE F bcast(float x) {
  return {_mm512_set1_ps(x)};
}
KVANT_INLINE F zero() {
  return {_mm512_setzero_ps()};
}
KVANT_INLINE F add(F a, F b) {
  return {_mm512_add_ps(a.v, b.v)};
}
KVANT_INLINE F sub(F a, F b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
KVANT_INLINE F mul(F a, F b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
KVANT_INLINE F div(F a, F b) {
  return {_mm512_div_ps(a.v, b.v)};
}
KVANT_INLINE F fma(F a, F b, F c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
KVANT_INLINE F max(F a, F b) {
  return {_mm512_max_ps(a.v, b.v)};
}
KVANT_INLINE F min(F a, F b) {
  return {_mm512_min_ps(a.v, b.v)};
}
// Lanes whose bit in `mask` is set from b, others from a.
KVANT_INLINE F select(uint16_t mask, F a, F b) {
  return {_mm512_mask_blend_ps(mask, a.v, b.v)};
}
KVANT_INLINE F zero_below(F x, F limit, F value) {  // x < limit ? 0 : value
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_NLT_UQ), value.v)};
}

KVANT_INLINE I load_i(const void* p) {
  return {_mm512_loadu_si512(p)};
}
KVANT_INLINE I load_u8(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
KVANT_INLINE I load_u16(const void* p) {
  return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)))};
}
KVANT_INLINE I bcast_i(uint32_t x) {
  return {_mm512_set1_epi32(static_cast<int>(x))};
}
KVANT_INLINE I shl(I a, int n) {
  return {_mm512_slli_epi32(a.v, static_cast<unsigned>(n))};
}
KVANT_INLINE I shr(I a, int n) {
  return {_mm512_srli_epi32(a.v, static_cast<unsigned>(n))};
}
KVANT_INLINE I sra(I a, int n) {
  return {_mm512_srai_epi32(a.v, static_cast<unsigned>(n))};
}
KVANT_INLINE I and_(I a, I b) {
  return {_mm512_and_si512(a.v, b.v)};
}
KVANT_INLINE I or_(I a, I b) {
  return {_mm512_or_si512(a.v, b.v)};
}
KVANT_INLINE I add_i(I a, I b) {
  return {_mm512_add_epi32(a.v, b.v)};
}
KVANT_INLINE F to_float(I a) {
  return {_mm512_cvtepi32_ps(a.v)};
}
KVANT_INLINE F as_float(I a) {
  return {_mm512_castsi512_ps(a.v)};
}
KVANT_INLINE I as_int(F a) {
  return {_mm512_castps_si512(a.v)};
}
// fp32 of the f16 in the low half of each lane; the upper half must be zero.
KVANT_INLINE F from_half(I a) {
  return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(a.v))};
}
// The same whatever the upper half holds.
KVANT_INLINE F from_low_half(I a) {
  return from_half(a);
}
KVANT_INLINE I shl_halves(I a, int n) {
  return {_mm512_slli_epi16(a.v, static_cast<unsigned>(n))};
}
KVANT_INLINE I sra_halves(I a, int n) {
  return {_mm512_srai_epi16(a.v, static_cast<unsigned>(n))};
}
// Sixteen f16.
KVANT_INLINE F load_f16(const void* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)))};
}
// Sixteen E4M3 that are not negative, 2^-8 of their values: shifted into f16 by one place less than
// the exponent's bias asks for.
KVANT_INLINE F load_e4m3(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm512_cvtph_ps(_mm256_slli_epi16(wide, 7))};
}
// (a & mask) | (b & ~mask)
KVANT_INLINE I merge_bits(I mask, I a, I b) {
  return {_mm512_ternarylogic_epi32(mask.v, a.v, b.v, 0xca)};
}

KVANT_INLINE Table load_table(const float* p) {
  return {_mm512_loadu_ps(p)};
}
KVANT_INLINE Table table(F a) {
  return {a.v};
}
// Entry of the low four bits of each lane; other bits are ignored.
KVANT_INLINE F lookup(Table t, I index) {
  return {_mm512_permutexvar_ps(index.v, t.v)};
}

#elif defined(__AVX2__)

struct F {
  __m256 lo, hi;
};
struct I {
  __m256i lo, hi;
};
struct Table {
  __m256 lo, hi;
};

KVANT_INLINE F load(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
KVANT_INLINE void store(float* p, F a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
KVANT_INLINE F bcast(float x) {
  const __m256 v = _mm256_set1_ps(x);
  return {v, v};
}
KVANT_INLINE F zero() {
  return {_mm256_setzero_ps(), _mm256_setzero_ps()};
}
KVANT_INLINE F add(F a, F b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
KVANT_INLINE F sub(F a, F b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
KVANT_INLINE F mul(F a, F b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
KVANT_INLINE F div(F a, F b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
KVANT_INLINE F fma(F a, F b, F c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
KVANT_INLINE F max(F a, F b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
KVANT_INLINE F min(F a, F b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
KVANT_INLINE __m256 lane_mask(int bits) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(bits), bit);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit));
}
KVANT_INLINE F select(uint16_t mask, F a, F b) {
  return {_mm256_blendv_ps(a.lo, b.lo, lane_mask(mask & 0xff)),
          _mm256_blendv_ps(a.hi, b.hi, lane_mask(mask >> 8))};
}
KVANT_INLINE F zero_below(F x, F limit, F value) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.lo, limit.lo, _CMP_NLT_UQ), value.lo),
          _mm256_and_ps(_mm256_cmp_ps(x.hi, limit.hi, _CMP_NLT_UQ), value.hi)};
}

KVANT_INLINE I load_i(const void* p) {
  const __m256i* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
KVANT_INLINE I load_u8(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
}
KVANT_INLINE I load_u16(const void* p) {
  const __m128i* q = static_cast<const __m128i*>(p);
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), _mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1))};
}
KVANT_INLINE I bcast_i(uint32_t x) {
  const __m256i v = _mm256_set1_epi32(static_cast<int>(x));
  return {v, v};
}
KVANT_INLINE I shl(I a, int n) {
  return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)};
}
KVANT_INLINE I shr(I a, int n) {
  return {_mm256_srli_epi32(a.lo, n), _mm256_srli_epi32(a.hi, n)};
}
KVANT_INLINE I sra(I a, int n) {
  return {_mm256_srai_epi32(a.lo, n), _mm256_srai_epi32(a.hi, n)};
}
KVANT_INLINE I and_(I a, I b) {
  return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
KVANT_INLINE I or_(I a, I b) {
  return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}
KVANT_INLINE I add_i(I a, I b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
KVANT_INLINE F to_float(I a) {
  return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)};
}
KVANT_INLINE F as_float(I a) {
  return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)};
}
KVANT_INLINE I as_int(F a) {
  return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)};
}
KVANT_INLINE __m256 half8(__m256i a) {
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  return _mm256_cvtph_ps(packed);
}
KVANT_INLINE F from_half(I a) {
  return {half8(a.lo), half8(a.hi)};
}
KVANT_INLINE I merge_bits(I mask, I a, I b) {
  return {_mm256_or_si256(_mm256_and_si256(mask.lo, a.lo), _mm256_andnot_si256(mask.lo, b.lo)),
          _mm256_or_si256(_mm256_and_si256(mask.hi, a.hi), _mm256_andnot_si256(mask.hi, b.hi))};
}

KVANT_INLINE Table load_table(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
KVANT_INLINE Table table(F a) {
  return {a.lo, a.hi};
}
KVANT_INLINE __m256 lookup8(Table t, __m256i index) {
  const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 as the sign
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.lo, index),
                          _mm256_permutevar8x32_ps(t.hi, index), upper);
}
KVANT_INLINE F lookup(Table t, I index) {
  return {lookup8(t, index.lo), lookup8(t, index.hi)};
}

#else  // any processor: the compiler splits these vectors into what the target has

using FloatLanes = float __attribute__((vector_size(64)));
using UintLanes = uint32_t __attribute__((vector_size(64)));
using IntLanes = int32_t __attribute__((vector_size(64)));

struct F {
  FloatLanes v;
};
struct I {
  UintLanes v;
};
struct Table {
  float v[kLanes];
};

KVANT_INLINE F load(const float* p) {
  F r;
  __builtin_memcpy(&r.v, p, sizeof(r.v));
  return r;
}
KVANT_INLINE void store(float* p, F a) {
  __builtin_memcpy(p, &a.v, sizeof(a.v));
}
KVANT_INLINE F zero() {
  return {FloatLanes{}};
}
KVANT_INLINE F bcast(float x) {
  return {x - FloatLanes{}};
}
KVANT_INLINE F add(F a, F b) {
  return {a.v + b.v};
}
KVANT_INLINE F sub(F a, F b) {
  return {a.v - b.v};
}
KVANT_INLINE F mul(F a, F b) {
  return {a.v * b.v};
}
KVANT_INLINE F div(F a, F b) {
  return {a.v / b.v};
}
KVANT_INLINE F fma(F a, F b, F c) {
  return {a.v * b.v + c.v};
}
KVANT_INLINE F max(F a, F b) {
  return {a.v > b.v ? a.v : b.v};
}
KVANT_INLINE F min(F a, F b) {
  return {a.v < b.v ? a.v : b.v};
}
KVANT_INLINE F select(uint16_t mask, F a, F b) {
  for (int i = 0; i < kLanes; ++i) {
    if ((mask >> i & 1) != 0) a.v[i] = b.v[i];
  }
  return a;
}
KVANT_INLINE F zero_below(F x, F limit, F value) {
  return {x.v < limit.v ? FloatLanes{} : value.v};
}

KVANT_INLINE I load_i(const void* p) {
  I r;
  __builtin_memcpy(&r.v, p, sizeof(r.v));
  return r;
}
KVANT_INLINE I load_u8(const uint8_t* p) {
  I r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = p[i];
  return r;
}
KVANT_INLINE I load_u16(const void* p) {
  uint16_t half[kLanes];
  __builtin_memcpy(half, p, sizeof(half));
  I r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = half[i];
  return r;
}
KVANT_INLINE I bcast_i(uint32_t x) {
  return {x | UintLanes{}};
}
KVANT_INLINE I shl(I a, int n) {
  return {a.v << static_cast<uint32_t>(n)};
}
KVANT_INLINE I shr(I a, int n) {
  return {a.v >> static_cast<uint32_t>(n)};
}
KVANT_INLINE I sra(I a, int n) {
  return {reinterpret_cast<UintLanes>(reinterpret_cast<IntLanes>(a.v) >> n)};
}
KVANT_INLINE I and_(I a, I b) {
  return {a.v & b.v};
}
KVANT_INLINE I or_(I a, I b) {
  return {a.v | b.v};
}
KVANT_INLINE I add_i(I a, I b) {
  return {a.v + b.v};
}
KVANT_INLINE F to_float(I a) {
  return {__builtin_convertvector(reinterpret_cast<IntLanes>(a.v), FloatLanes)};
}
KVANT_INLINE F as_float(I a) {
  return {reinterpret_cast<FloatLanes>(a.v)};
}
KVANT_INLINE I as_int(F a) {
  return {reinterpret_cast<UintLanes>(a.v)};
}
// Magnitude as fp32 bits, exponent rebased by a multiply that is exact for normal and subnormal
// f16.
KVANT_INLINE F from_half(I a) {
  const F magnitude = mul(as_float(shl(and_(a, bcast_i(0x7fffu)), 13)), bcast(0x1p112f));
  return as_float(or_(shl(and_(a, bcast_i(0x8000u)), 16), as_int(magnitude)));
}
KVANT_INLINE I merge_bits(I mask, I a, I b) {
  return {(mask.v & a.v) | (~mask.v & b.v)};
}

KVANT_INLINE Table load_table(const float* p) {
  Table r;
  __builtin_memcpy(r.v, p, sizeof(r.v));
  return r;
}
KVANT_INLINE Table table(F a) {
  Table r;
  store(r.v, a);
  return r;
}
KVANT_INLINE F lookup(const Table& t, I index) {
  F r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = t.v[index.v[i] & 15u];
  return r;
}

#endif

// ---- on every level ----

template <int N>
struct Int {
  static constexpr int value = N;
};

template <int N, typename Fn>
KVANT_INLINE void unroll(Fn&& f) {
  if constexpr (N > 0) {
    unroll<N - 1>(f);
    f(Int<N - 1>{});
  }
}

// Calls f(Int<n>) for n in [1, N].
template <int N, typename Fn>
KVANT_INLINE void with_count(int n, Fn&& f) {
  if constexpr (N > 1) {
    if (n < N) return with_count<N - 1>(n, f);
  }
  f(Int<N>{});
}

// Calls f(Int<n>) for the largest n <= `left` of N, N / 2, ... 1 and returns it: fewer kernels to
// compile than one for each count.
template <int N, typename Fn>
KVANT_INLINE int with_power(int left, Fn&& f) {
  if constexpr (N > 1) {
    if (left < N) return with_power<N / 2>(left, f);
  }
  f(Int<N>{});
  return N;
}

// Sum of the lanes as a binary tree: lanes i and i + 8, then + 4, + 2, + 1.
#if defined(__AVX2__)
KVANT_INLINE __m256 lower_half(F a) {
#if defined(__AVX512F__)
  return _mm512_castps512_ps256(a.v);
#else
  return a.lo;
#endif
}
KVANT_INLINE __m256 upper_half(F a) {
#if defined(__AVX512F__)
  return _mm512_extractf32x8_ps(a.v, 1);
#else
  return a.hi;
#endif
}
// op over the lanes of each of M <= 8 rows as the first M lanes, in an order that does not depend
// on M. Rows go together: one alone is a chain of latencies.
template <int First, int M, typename Op8, typename Op4>
KVANT_INLINE __m128 reduce_four(const F (&a)[M], Op8 op8, Op4 op4) {
  __m256 e[4];
  for (int i = 0; i < 4; ++i) {
    const F& row = a[First + i < M ? First + i : First];
    e[i] = op8(lower_half(row), upper_half(row));
  }
  const __m256 x = op8(_mm256_unpacklo_ps(e[0], e[1]), _mm256_unpackhi_ps(e[0], e[1]));
  const __m256 y = op8(_mm256_unpacklo_ps(e[2], e[3]), _mm256_unpackhi_ps(e[2], e[3]));
  const __m256d low = _mm256_unpacklo_pd(_mm256_castps_pd(x), _mm256_castps_pd(y));
  const __m256d high = _mm256_unpackhi_pd(_mm256_castps_pd(x), _mm256_castps_pd(y));
  const __m256 both = op8(_mm256_castpd_ps(low), _mm256_castpd_ps(high));
  return op4(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
}
template <int M, typename Op8, typename Op4>
KVANT_INLINE F reduce_rows(const F (&a)[M], Op8 op8, Op4 op4) {
  static_assert(M <= 8);
  __m256 all = _mm256_zextps128_ps256(reduce_four<0>(a, op8, op4));
  if constexpr (M > 4) all = _mm256_insertf128_ps(all, reduce_four<4>(a, op8, op4), 1);
#if defined(__AVX512F__)
  return {_mm512_zextps256_ps512(all)};
#else
  return {all, _mm256_setzero_ps()};
#endif
}
template <int M>
KVANT_INLINE F sum_rows(const F (&a)[M]) {
  return reduce_rows(
      a, [](__m256 x, __m256 y) { return _mm256_add_ps(x, y); },
      [](__m128 x, __m128 y) { return _mm_add_ps(x, y); });
}
template <int M>
KVANT_INLINE F max_rows(const F (&a)[M]) {
  return reduce_rows(
      a, [](__m256 x, __m256 y) { return _mm256_max_ps(x, y); },
      [](__m128 x, __m128 y) { return _mm_max_ps(x, y); });
}
KVANT_INLINE float sum_lanes(F a) {
  const F one[1] = {a};
  return _mm256_cvtss_f32(lower_half(sum_rows(one)));
}
KVANT_INLINE float max_lanes(F a) {
  const F one[1] = {a};
  return _mm256_cvtss_f32(lower_half(max_rows(one)));
}
#else
KVANT_INLINE float sum_lanes(F a) {
  for (int n = 8; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) a.v[i] += a.v[i + n];
  }
  return a.v[0];
}
KVANT_INLINE float max_lanes(F a) {
  for (int n = 8; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) a.v[i] = a.v[i] > a.v[i + n] ? a.v[i] : a.v[i + n];
  }
  return a.v[0];
}
template <int M>
KVANT_INLINE F sum_rows(const F (&a)[M]) {
  F r = zero();
  for (int i = 0; i < M; ++i) r.v[i] = sum_lanes(a[i]);
  return r;
}
template <int M>
KVANT_INLINE F max_rows(const F (&a)[M]) {
  F r = zero();
  for (int i = 0; i < M; ++i) r.v[i] = max_lanes(a[i]);
  return r;
}
#endif

// The first M <= 8 lanes; others are 0, or stay as they are in memory.
template <int M>
KVANT_INLINE F load_first(const float* p) {
#if defined(__AVX512F__)
  return {_mm512_maskz_loadu_ps((1 << M) - 1, p)};
#else
  alignas(64) float lanes[kLanes] = {};
  __builtin_memcpy(lanes, p, M * sizeof(float));
  return load(lanes);
#endif
}
template <int M>
KVANT_INLINE void store_first(float* p, F a) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (1 << M) - 1, a.v);
#else
  alignas(64) float lanes[kLanes];
  store(lanes, a);
  __builtin_memcpy(p, lanes, M * sizeof(float));
#endif
}

#if !defined(__AVX512F__)
KVANT_INLINE F load_f16(const void* p) {
  return from_half(load_u16(p));
}
KVANT_INLINE F load_e4m3(const uint8_t* p) {
  return from_half(shl(load_u8(p), 7));
}
#endif

// Bits of the lanes in [begin, end), clipped to the sixteen.
KVANT_INLINE uint16_t lane_range(int begin, int end) {
  const uint32_t below_end = end >= kLanes ? 0xffffu : end <= 0 ? 0u : (1u << end) - 1u;
  const uint32_t below_begin = begin >= kLanes ? 0xffffu : begin <= 0 ? 0u : (1u << begin) - 1u;
  return static_cast<uint16_t>(below_end & ~below_begin);
}

#if defined(__AVX512DQ__)
// 2^(k / 32) as fp32 less k at bit 18, which adding n at bit 18 puts back.
struct alignas(64) Roots {
  uint32_t at[32];
};
constexpr Roots kRootsOfTwo = {
    {0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3,
     0x3f78f4f0, 0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b,
     0x3f75583f, 0x3f7523f6, 0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a,
     0x3f75b9be, 0x3f76248c, 0x3f76a81e, 0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907,
     0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3}};
constexpr float kExpC1 = 0.693157344f, kExpC2 = 0.240228268f;
#endif

constexpr float kLog2E = 1.44269504f;

// 2^t for t <= 127, relative error below 2e-7; 0 below -86.5 (e^-60): of a weight that small
// nothing is left in a sum, but times a scale it would be subnormal, which costs processors a
// hundred cycles.
KVANT_INLINE F exp2_lanes(F t) {
  const F lowest = bcast(-86.5f);
#if defined(__AVX512DQ__)
  // 2^t = 2^(n / 32) 2^r with n an integer and |r| <= 1/64: the polynomial is the one of degree 2
  // that is nearest to 2^r, relatively, with p(0) = 1. A lookup and a shift instead of a longer
  // one: after products in tiles only one port multiplies for a while.
  const F biased = add(t, bcast(0x1.8p18f));                        // n in the low bits
  const F r = {_mm512_reduce_ps(t.v, 5 << 4 | _MM_FROUND_NO_EXC)};  // less n / 32
  const F p = mul(fma(r, bcast(kExpC2), bcast(kExpC1)), r);
  const __m512i n = as_int(biased).v;
  const __m512i root = _mm512_permutex2var_epi32(_mm512_load_si512(kRootsOfTwo.at), n,
                                                 _mm512_load_si512(kRootsOfTwo.at + kLanes));
  const F power = as_float({_mm512_add_epi32(root, _mm512_slli_epi32(n, 18))});
  const __mmask16 counts = _mm512_cmp_ps_mask(t.v, lowest.v, _CMP_GE_OQ);
  return {_mm512_maskz_fmadd_ps(counts, p.v, power.v, power.v)};
#else
  const F clipped = max(t, lowest);
  const F magic = bcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const F biased = add(clipped, magic);
  const F r = sub(clipped, sub(biased, magic));
  // The series of 2^r, |r| <= 1/2: (ln 2)^k / k!.
  F p = bcast(1.52527338e-5f);
  p = fma(p, r, bcast(1.54035304e-4f));
  p = fma(p, r, bcast(1.33335581e-3f));
  p = fma(p, r, bcast(9.61812911e-3f));
  p = fma(p, r, bcast(5.55041087e-2f));
  p = fma(p, r, bcast(2.40226507e-1f));
  p = fma(p, r, bcast(6.93147181e-1f));
  p = fma(p, r, bcast(1.0f));
  const F scaled = as_float(add_i(as_int(p), shl(as_int(biased), 23)));
  return zero_below(t, lowest, scaled);
#endif
}

// e^x for x <= 88, to 9e-8 |x| more; 0 below -60.
KVANT_INLINE F exp_lanes(F x) {
  return exp2_lanes(mul(x, bcast(kLog2E)));
}

// tanh through exp; absolute error below 2e-7.
KVANT_INLINE F tanh_lanes(F x) {
  const F limited = max(min(x, bcast(15.0f)), bcast(-15.0f));
  const F e = exp_lanes(add(limited, limited));
  return sub(bcast(1.0f), div(bcast(2.0f), add(e, bcast(1.0f))));
}

}  // namespace
}  // namespace kvant::backend::cpu::KVANT_LEVEL
