// Activations of 16 rows for matrix units (matrix_layout.h, "Wide panels"). Include it inside the
// level's namespace, after weight_kinds-inl.h.

// Sums or maxima of the 16 lanes of each of 16 vectors: lane i of the result belongs to v[i].
template <typename Combine>
KVANT_INLINE __m512i reduce_rows(const __m512i (&v)[16], Combine&& combine) {
  __m512i quarters[4];
  repeat<4>([&](auto i) __attribute__((always_inline)) {
    const auto pair = [&](int a, int b) __attribute__((always_inline)) {
      return combine(_mm512_shuffle_i32x4(v[a], v[b], 0x44),
                     _mm512_shuffle_i32x4(v[a], v[b], 0xee));
    };
    const __m512i x = pair(i, i + 4);
    const __m512i y = pair(i + 8, i + 12);
    quarters[i] = combine(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
  });
  const auto halve = [&](__m512i a, __m512i b) __attribute__((always_inline)) {
    return combine(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  };
  const __m512 x = _mm512_castsi512_ps(halve(quarters[0], quarters[1]));
  const __m512 y = _mm512_castsi512_ps(halve(quarters[2], quarters[3]));
  return combine(_mm512_castps_si512(_mm512_shuffle_ps(x, y, 0x88)),
                 _mm512_castps_si512(_mm512_shuffle_ps(x, y, 0xdd)));
}

// The high halves of 32 fp32 values: bfloat16 of values that have no more bits.
KVANT_INLINE __m512i high_halves(__m512 first, __m512 second) {
  alignas(64) static constexpr uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                    23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                    45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(_mm512_castps_si512(first), _mm512_load_si512(kOdd),
                                   _mm512_castps_si512(second));
}

// Codes, scales and sums as quantise_block computes them.
void quantise_panel(const float* const* rows, int n, int64_t cols, uint8_t* panel) {
  static const float kZeros[kBlock] = {};
  const float* x[kWidePanelRows];
  int64_t step[kWidePanelRows];
  for (int r = 0; r < kWidePanelRows; ++r) {
    x[r] = r < n ? rows[r] : kZeros;
    step[r] = r < n ? kBlock : 0;
  }
  const __m512 limit = _mm512_set1_ps(kMaxActivationCode);
  const __m512i magnitude_bits = _mm512_set1_epi32(0x7fffffff);
  const __m512 to_multiples = _mm512_set1_ps(1.5f * 0x1p30f);  // its last bit counts 128
  for (int64_t block = 0; block < cols / kBlock; ++block, panel += kWideBlockBytes) {
    __m512i lanes[kWidePanelRows];
    repeat<kWidePanelRows>([&](auto r) __attribute__((always_inline)) {
      const __m512i a = _mm512_and_si512(_mm512_loadu_si512(x[r]), magnitude_bits);
      const __m512i b = _mm512_and_si512(_mm512_loadu_si512(x[r] + 16), magnitude_bits);
      lanes[r] = _mm512_max_epi32(a, b);
    });
    // As integers: finite magnitudes in order, Inf and NaN above them.
    const __m512i amax_bits = reduce_rows(
        lanes,
        [](__m512i a, __m512i b) __attribute__((always_inline)) { return _mm512_max_epi32(a, b); });
    const __m512 amax = _mm512_castsi512_ps(amax_bits);
    const __mmask16 used = _mm512_cmp_ps_mask(amax, _mm512_set1_ps(kMinActivation), _CMP_NLT_UQ);
    const __mmask16 finite = _mm512_cmplt_epi32_mask(amax_bits, _mm512_set1_epi32(0x7f800000));
    const __m512 inverse = _mm512_maskz_div_ps(used & finite, limit, amax);
    // A row that is not finite makes all its outputs NaN.
    const __m512 scale = _mm512_mask_mov_ps(_mm512_set1_ps(__builtin_nanf("")), finite,
                                            _mm512_maskz_div_ps(used, amax, limit));
    alignas(64) float factor[kWidePanelRows];
    _mm512_store_ps(factor, inverse);
    repeat<kWidePanelRows>([&](auto r) __attribute__((always_inline)) {
      const __m512 f = _mm512_set1_ps(factor[r]);
      const auto code = [&](const float* p) __attribute__((always_inline)) {
        return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(p), f));
      };
      const __m512i first = code(x[r]);
      const __m512i second = code(x[r] + 16);
      lanes[r] = _mm512_add_epi32(first, second);
      const __m512 a = _mm512_cvtepi32_ps(first);
      const __m512 b = _mm512_cvtepi32_ps(second);
      const __m512 high_a = _mm512_sub_ps(_mm512_add_ps(a, to_multiples), to_multiples);
      const __m512 high_b = _mm512_sub_ps(_mm512_add_ps(b, to_multiples), to_multiples);
      _mm512_store_si512(panel + 64 * r, high_halves(high_a, high_b));
      _mm512_store_si512(panel + kTileBytes + 64 * r,
                         high_halves(_mm512_sub_ps(a, high_a), _mm512_sub_ps(b, high_b)));
      x[r] += step[r];
    });
    const __m512i sum = reduce_rows(
        lanes,
        [](__m512i a, __m512i b) __attribute__((always_inline)) { return _mm512_add_epi32(a, b); });
    float* row_scales = reinterpret_cast<float*>(panel + 2 * kTileBytes);
    _mm512_store_ps(row_scales, scale);
    _mm512_store_ps(row_scales + kWidePanelRows, _mm512_mul_ps(scale, _mm512_cvtepi32_ps(sum)));
  }
}
