// answer_queries() on the host: everything sorted, sums one value after the other.
#include <algorithm>
#include <numeric>
#include <vector>

#include "kvant/backend/backend.h"
#include "kvant/base/row_weight.h"

namespace kvant::backend {
namespace {

// Sums of blocks of weights, in the order of row_weight.h.
template <typename Weight>
std::vector<double> block_sums(size_t num_values, const Weight& weight) {
  std::vector<double> sums;
  for (size_t begin = 0; begin < num_values; begin += kWeightBlock) {
    const size_t count = std::min<size_t>(kWeightBlock, num_values - begin);
    const size_t whole = count / kWeightLanes * kWeightLanes;
    double sum = 0;
    for (size_t lane = 0; lane < kWeightLanes; ++lane) {
      double chain = 0;
      for (size_t i = lane; i < whole; i += kWeightLanes) chain += weight(begin + i);
      sum += chain;
    }
    for (size_t i = whole; i < count; ++i) sum += weight(begin + i);
    sums.push_back(sum);
  }
  return sums;
}

// -1: nothing weighs anything.
template <typename Weight>
int32_t draw(size_t num_values, const std::vector<double>& sums, double target,
             const Weight& weight) {
  size_t block = 0;
  while (block + 1 < sums.size() && target >= sums[block]) target -= sums[block++];
  int32_t last = -1;
  const size_t end = std::min((block + 1) * kWeightBlock, num_values);
  for (size_t i = block * kWeightBlock; i < end && target >= 0; ++i) {
    if (weight(i) == 0) continue;
    last = static_cast<int32_t>(i);
    target -= weight(i);
  }
  return last;
}

}  // namespace

RowChoice answer_query(std::span<const float> values, const RowQuery& query,
                       std::span<RowMaximum> candidates) {
  using Kind = RowQuery::Kind;
  RowChoice choice;
  const RowMaximum greatest = greatest_value(values);
  if (greatest.index < 0 || query.kind == Kind::kGreatest) return choice;
  const auto weight = [&](size_t i) {
    const float exponent = (values[i] - greatest.value) * query.scale;
    return static_cast<double>(exp_of_negative(std::max(kLeastExponent, exponent)));
  };
  double total = 0;
  if (query.kind == Kind::kDraw || query.kind == Kind::kTopP) {
    const std::vector<double> sums = block_sums(values.size(), weight);
    total = std::accumulate(sums.begin(), sums.end(), 0.0);
    choice.total = total;
    if (query.kind == Kind::kDraw) {
      choice.drawn = draw(values.size(), sums, query.uniform * total, weight);
      if (choice.drawn < 0) choice.drawn = greatest.index;
      return choice;
    }
  }
  std::vector<int32_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  const auto value = [&](int32_t i) { return values[static_cast<size_t>(i)]; };
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return value(a) > value(b); });
  size_t count = 0;
  double held = 0;
  for (const int32_t i : order) {
    if (query.kind == Kind::kTopK && count == static_cast<size_t>(query.top_k)) break;
    if (query.kind == Kind::kNear && value(i) < greatest.value + query.below) break;
    if (count == candidates.size()) return {};
    candidates[count++] = {value(i), i};
    if (query.kind != Kind::kTopP) continue;
    held += weight(static_cast<size_t>(i));
    if (held >= query.top_p * total) break;
  }
  if (query.kind == Kind::kTopP && held < query.top_p * total) return {};
  choice.num_candidates = static_cast<int32_t>(count);
  return choice;
}

Status Backend::answer_queries(const void* x, int64_t num_rows, int64_t num_cols,
                               const RowQuery* queries, const RowAnswers& answers) {
  for (int64_t row = 0; row < num_rows; ++row) {
    const std::span values(static_cast<const float*>(x) + row * num_cols,
                           static_cast<size_t>(num_cols));
    answers.maxima[row] = greatest_value(values);
    answers.choices[row] =
        answer_query(values, queries[row],
                     {answers.candidates + row * kMostCandidates, size_t{kMostCandidates}});
    if (queries[row].kind != RowQuery::Kind::kGreatest && answers.maxima[row].index >= 0 &&
        !answers.choices[row].found()) {
      std::copy(values.begin(), values.end(), answers.values + row * num_cols);
    }
  }
  return {};
}

}  // namespace kvant::backend
