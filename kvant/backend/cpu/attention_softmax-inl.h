// Online softmax over a page. Included like attention_simd.h, after KVANT_LEVEL is defined.
#pragma once

#include "kvant/backend/cpu/attention_fetch-inl.h"
#include "kvant/backend/cpu/attention_kernels.h"
#include "kvant/backend/cpu/attention_shape-inl.h"
#include "kvant/backend/cpu/attention_simd.h"

namespace kvant::backend::cpu::KVANT_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kSoftmaxRows = 8;
#elif defined(__AVX2__)
constexpr int kSoftmaxRows = 2;
#else
constexpr int kSoftmaxRows = 1;
#endif

constexpr float kInfinity = __builtin_huge_valf();

constexpr int steps_of(int count, int step) {
  return (count + step - 1) / step;
}

KVANT_INLINE uint16_t visible_lanes(const SoftmaxArgs& a, int64_t position, int tile) {
  const int64_t first = a.page_begin + tile * kLanes;
  const auto clip = [](int64_t x) { return static_cast<int>(x < 0 ? 0 : x > kLanes ? kLanes : x); };
  const int end = clip(position + 1 - first);
  const int begin = a.window > 0 ? clip(position - a.window + 1 - first) : 0;
  const int sinks = clip(a.sink_tokens - first);
  return static_cast<uint16_t>(lane_range(begin, end) | lane_range(0, sinks < end ? sinks : end));
}

// Whether every row sees every token of the tiles.
bool all_visible(const SoftmaxArgs& a) {
  if (a.all_see) return true;
  const int64_t last = a.first_position + (a.rows - 1) / a.group;
  return a.page_begin + a.num_tiles * kLanes <= a.first_position + 1 &&
         (a.window <= 0 || last - a.window < a.page_begin);
}

// How scores become weights, known when kernels are compiled.
template <bool Masked, bool Capped>
struct Softmax {
  static constexpr bool kMasked = Masked;
  static constexpr bool kCapped = Capped;
};

// What M rows have of all pages so far.
template <int M>
KVANT_INLINE void finish_rows(const SoftmaxArgs& a, int row, F factor, F maxima, F page_sum) {
  const auto add_sums = [&](float* sums, F of_page) {
    store_first<M>(sums, add(mul(load_first<M>(sums), factor), of_page));
  };
  store_first<M>(a.factor + row, factor);
  store_first<M>(a.max + row, maxima);
  add_sums(a.sum + row, page_sum);
  add_sums(a.share + row, a.add_to_share ? page_sum : zero());
}

// What makes weights of M rows' scores, a lane for each row.
struct Exponents {
  F multiplier;  // in all lanes: weight = 2^(score * multiplier + base)
  F base;
  F maxima;  // of all pages so far
  F factor;  // of what was accumulated before
};

// Finds the largest score of M rows from `row` on, which rounding leaves in its place. Scores that
// are capped or masked are written so.
template <typename How, int M, typename Page>
KVANT_INLINE Exponents find_exponents(const SoftmaxArgs& a, const Page& page, int row,
                                      Fetcher& fetcher) {
  const int64_t stride = page.page_tokens;
  float* s = a.s + row * stride;
  F multiplier = bcast(a.multiplier);
  F offset = mul(load_first<M>(a.offset + row), bcast(a.offset_scale));
  alignas(64) float of_row[kLanes];
  if constexpr (How::kCapped) store(of_row, offset);
  F largest[M];
  unroll<M>([&](auto m) { largest[m.value] = bcast(-kInfinity); });
  for (int tile = 0; tile < page.num_tiles; ++tile) {
    unroll<M>([&](auto m) {
      float* x = s + m.value * stride + tile * kLanes;
      F score = load(x);
      if constexpr (How::kCapped) {
        score = fma(score, multiplier, bcast(of_row[m.value]));
        score = mul(bcast(a.softcap), tanh_lanes(div(score, bcast(a.softcap))));
      }
      if constexpr (How::kMasked) {
        const int64_t position = a.first_position + (row + m.value) / a.group;
        score = select(visible_lanes(a, position, tile), bcast(-kInfinity), score);
        store(x, score);
      }
      largest[m.value] = max(largest[m.value], score);
    });
    if constexpr (How::kMasked) fetcher.step(M);
  }
  if constexpr (How::kCapped) {
    multiplier = bcast(1.0f);
    offset = zero();
  }
  // The rows' lanes stay together: a scalar would be a chain through memory.
  const F before = load_first<M>(a.max + row);
  const F maxima = max(fma(max_rows(largest), multiplier, offset), before);
  const F log2_e = bcast(kLog2E);
  return {mul(multiplier, log2_e), mul(sub(offset, maxima), log2_e), maxima,
          exp_lanes(sub(before, maxima))};
}

// M rows from `row` on go together: one alone is a chain of latencies.
template <typename How, int M, typename Page>
void softmax_rows(const SoftmaxArgs& a, const Page& page, int row, Fetcher& fetcher) {
  const int64_t stride = page.page_tokens;
  float* s = a.s + row * stride;
  const Exponents e = find_exponents<How, M>(a, page, row, fetcher);
  // A copy: stores of scores could change what `a` points to.
  const F weight_scale = bcast(a.weight_scale);
  const bool scales = a.weight_scale != 1.0f;
  alignas(64) float base[kLanes];
  store(base, e.base);
  F sum[M];
  unroll<M>([&](auto m) { sum[m.value] = zero(); });
  for (int tile = 0; tile < page.num_tiles; ++tile) {
    unroll<M>([&](auto m) {
      float* x = s + m.value * stride + tile * kLanes;
      const F weight = exp2_lanes(fma(load(x), e.multiplier, bcast(base[m.value])));
      sum[m.value] = add(sum[m.value], weight);
      store(x, scales ? mul(weight, weight_scale) : weight);
    });
    fetcher.step(M);
  }
  finish_rows<M>(a, row, e.factor, e.maxima, sum_rows(sum));
}

template <typename How, typename Page>
void softmax_page(const SoftmaxArgs& a, const Page& page) {
  Fetcher fetcher(a.fetch, (How::kMasked ? 2 : 1) * a.rows * page.num_tiles);
  for (int r = 0; r < a.rows; r += kSoftmaxRows) {
    with_count<kSoftmaxRows>(
        a.rows - r, [&](auto m) { softmax_rows<How, decltype(m)::value>(a, page, r, fetcher); });
  }
}

void softmax(const SoftmaxArgs& a) {
  const AnyPage page{0, a.page_tokens, a.num_tiles};
  if (a.softcap > 0.0f) return softmax_page<Softmax<true, true>>(a, page);
  if (!all_visible(a)) return softmax_page<Softmax<true, false>>(a, page);
  if (is_whole(a)) return softmax_page<Softmax<false, false>>(a, WholePage<0>{});
  softmax_page<Softmax<false, false>>(a, page);
}

}  // namespace
}  // namespace kvant::backend::cpu::KVANT_LEVEL
