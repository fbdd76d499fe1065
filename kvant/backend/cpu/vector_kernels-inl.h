// Norm, gates, RoPE and sums, over one row or a run of values. Compiled once per SIMD level:
// include it inside the level's namespace, after its Simd. Every output value has the same bits at
// every level and wherever it lies: full vectors and the tail (through a padded buffer) compute the
// same.

// f(first) for full vectors; tail(first, count) for the rest.
template <typename Full, typename Tail>
inline void for_vectors(int64_t n, Full&& full, Tail&& tail) {
  int64_t i = 0;
  for (; i + Simd::kLanes <= n; i += Simd::kLanes) full(i);
  if (i < n) tail(i, static_cast<int>(n - i));
}

// The `count` values at p, followed by zeros.
inline Simd::F load_part(const float* p, int count) {
  float values[Simd::kLanes] = {};
  std::memcpy(values, p, sizeof(float) * static_cast<size_t>(count));
  return Simd::load(values);
}
inline void store_part(float* p, int count, Simd::F v) {
  float values[Simd::kLanes];
  Simd::store(values, v);
  std::memcpy(p, values, sizeof(float) * static_cast<size_t>(count));
}

// out[i] = f(a[i], b[i])
template <typename F>
inline void map2(const float* a, const float* b, float* out, int64_t n, F&& f) {
  for_vectors(
      n, [&](int64_t i) { Simd::store(out + i, f(Simd::load(a + i), Simd::load(b + i))); },
      [&](int64_t i, int count) {
        store_part(out + i, count, f(load_part(a + i, count), load_part(b + i, count)));
      });
}

void rms_norm(const float* x, const float* weight, int64_t dim, float epsilon, float* out) {
  constexpr int kAccumulators = 16;  // the order of the sum, the same at every level
  constexpr int kVectors = kAccumulators / Simd::kLanes;
  Simd::F acc[kVectors];
  for (int v = 0; v < kVectors; ++v) acc[v] = Simd::zero();
  int64_t i = 0;
  for (; i + kAccumulators <= dim; i += kAccumulators) {
    for (int v = 0; v < kVectors; ++v) {
      const Simd::F value = Simd::load(x + i + v * Simd::kLanes);
      acc[v] = Simd::fma(value, value, acc[v]);
    }
  }
  float sums[kAccumulators];
  for (int v = 0; v < kVectors; ++v) Simd::store(sums + v * Simd::kLanes, acc[v]);
  for (int64_t j = 0; i + j < dim; ++j) {
    const float value = x[i + j];
    sums[j] = __builtin_fmaf(value, value, sums[j]);
  }
  for (int width = kAccumulators / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) sums[j] = sums[j] + sums[j + width];
  }
  const float mean = sums[0] / static_cast<float>(dim);
  const Simd::F factor = Simd::set1(1.0f / __builtin_sqrtf(mean + epsilon));
  map2(x, weight, out, dim,
       [&](Simd::F a, Simd::F w) { return Simd::mul(Simd::mul(a, factor), w); });
}

// e^x within 2 ulp for |x| <= 87, clamped there; NaN stays NaN.
inline Simd::F exp_clamped(Simd::F x) {
  x = Simd::min(Simd::set1(87.0f), x);
  x = Simd::max(Simd::set1(-87.0f), x);
  const Simd::I n = Simd::round_to_int(Simd::mul(x, Simd::set1(1.44269504f)));
  const Simd::F nf = Simd::to_float(n);
  // ln 2 in two parts: the first has few bits, so that n * part is exact.
  Simd::F r = Simd::negated_fma(nf, Simd::set1(0.693359375f), x);
  r = Simd::negated_fma(nf, Simd::set1(-2.12194440e-4f), r);
  // (e^r - 1 - r) / r^2 on |r| <= ln 2 / 2, polynomial of Cephes' expf.
  Simd::F p = Simd::set1(1.9875691500e-4f);
  p = Simd::fma(p, r, Simd::set1(1.3981999507e-3f));
  p = Simd::fma(p, r, Simd::set1(8.3334519073e-3f));
  p = Simd::fma(p, r, Simd::set1(4.1665795894e-2f));
  p = Simd::fma(p, r, Simd::set1(1.6666665459e-1f));
  p = Simd::fma(p, r, Simd::set1(5.0000001201e-1f));
  p = Simd::fma(p, Simd::mul(r, r), Simd::add(r, Simd::set1(1.0f)));
  // 2^n; for NaN n is INT_MIN and p is NaN.
  const Simd::F power = Simd::as_float(Simd::shift_left<23>(Simd::add_i(n, Simd::set1_i(127))));
  return Simd::mul(p, power);
}

// x / (1 + e^-t)
inline Simd::F times_sigmoid(Simd::F x, Simd::F t) {
  const Simd::F e = exp_clamped(Simd::sub(Simd::zero(), t));
  return Simd::div(x, Simd::add(Simd::set1(1.0f), e));
}

void silu_gate(const float* gate, const float* up, float* out, int64_t n) {
  map2(gate, up, out, n, [](Simd::F g, Simd::F u) { return Simd::mul(times_sigmoid(g, g), u); });
}

// GELU with tanh: x / 2 * (1 + tanh t) = x / (1 + e^-2t), t = sqrt(2 / pi) * (x + 0.044715 x^3).
void gelu_gate(const float* gate, const float* up, float* out, int64_t n) {
  map2(gate, up, out, n, [](Simd::F g, Simd::F u) {
    const Simd::F factor = Simd::fma(Simd::mul(g, g), Simd::set1(2.0f * 0.7978845608f * 0.044715f),
                                     Simd::set1(2.0f * 0.7978845608f));
    return Simd::mul(times_sigmoid(g, Simd::mul(g, factor)), u);
  });
}

void add(const float* x, float* y, int64_t n) {
  map2(x, y, y, n, [](Simd::F a, Simd::F b) { return Simd::add(b, a); });
}

void add_scaled(const float* x, float factor, float* y, int64_t n) {
  const Simd::F f = Simd::set1(factor);
  map2(x, y, y, n, [&](Simd::F a, Simd::F b) { return Simd::fma(f, a, b); });
}

void scale(float factor, float* x, int64_t n) {
  const Simd::F f = Simd::set1(factor);
  map2(x, x, x, n, [&](Simd::F a, Simd::F) { return Simd::mul(f, a); });
}

void rope(float* x, const float* cos_sin, int64_t half) {
  const float* sines = cos_sin + half;
  const auto rotate = [](Simd::F a, Simd::F b, Simd::F c, Simd::F s, Simd::F* first,
                         Simd::F* second) {
    *first = Simd::negated_fma(b, s, Simd::mul(a, c));
    *second = Simd::fma(a, s, Simd::mul(b, c));
  };
  for_vectors(
      half,
      [&](int64_t i) {
        Simd::F first;
        Simd::F second;
        rotate(Simd::load(x + i), Simd::load(x + half + i), Simd::load(cos_sin + i),
               Simd::load(sines + i), &first, &second);
        Simd::store(x + i, first);
        Simd::store(x + half + i, second);
      },
      [&](int64_t i, int count) {
        Simd::F first;
        Simd::F second;
        rotate(load_part(x + i, count), load_part(x + half + i, count),
               load_part(cos_sin + i, count), load_part(sines + i, count), &first, &second);
        store_part(x + i, count, first);
        store_part(x + half + i, count, second);
      });
}
