#include "kvant/model/eval_stats.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <type_traits>

#include "kvant/base/check.h"

namespace kvant::model {

RowSoftmax row_softmax(std::span<const float> logits) {
  KVANT_CHECK(!logits.empty(), "a row of logits");
  const auto top = std::max_element(logits.begin(), logits.end());
  const float highest = *top;
  // Partial sums in double: a vocabulary has up to 262,144 terms.
  double sum = 0;
  for (const float logit : logits) sum += static_cast<double>(std::exp(logit - highest));
  return {highest + std::log(sum), static_cast<int32_t>(top - logits.begin()), highest};
}

double row_kl(std::span<const float> base, double base_log_sum_exp, std::span<const float> logits,
              double log_sum_exp, float floor) {
  KVANT_CHECK(base.size() == logits.size(), "rows of one vocabulary");
  const auto shift = static_cast<float>(base_log_sum_exp);
  const double offset = log_sum_exp - base_log_sum_exp;
  double sum = 0;
  for (size_t i = 0; i < base.size(); ++i) {
    const float log_p = base[i] - shift;
    if (log_p <= floor) continue;
    const double difference = static_cast<double>(base[i]) - static_cast<double>(logits[i]);
    sum += static_cast<double>(std::exp(log_p)) * (difference + offset);
  }
  return sum;
}

namespace {

template <typename T>
double quantile_of(std::span<T> values, double fraction) {
  KVANT_CHECK(!values.empty() && fraction >= 0 && fraction <= 1, "a quantile of something");
  const double position = fraction * static_cast<double>(values.size() - 1);
  const auto index = static_cast<size_t>(position);
  const auto nth = values.begin() + static_cast<std::ptrdiff_t>(index);
  std::nth_element(values.begin(), nth, values.end());
  const double low = *nth;
  if (index + 1 == values.size()) return low;
  const double high = *std::min_element(nth + 1, values.end());
  const double weight = position - static_cast<double>(index);
  return low + weight * (high - low);
}

double mean_of(std::span<const double> values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

// Sum and count of the values of one block of tokens that is resampled as a whole.
struct Block {
  double sum = 0;
  double count = 0;
};

constexpr int64_t kMinChunksToResample = 30;
constexpr int64_t kBlockTokens = 64;
constexpr int kResamples = 2000;

std::vector<Block> make_blocks(std::span<const double> values, int64_t tokens_per_chunk) {
  const auto total = static_cast<int64_t>(values.size());
  const int64_t chunks = total / tokens_per_chunk;
  const int64_t block = chunks >= kMinChunksToResample ? tokens_per_chunk : kBlockTokens;
  std::vector<Block> blocks;
  for (int64_t chunk = 0; chunk < total; chunk += tokens_per_chunk) {
    const int64_t chunk_end = std::min(chunk + tokens_per_chunk, total);
    for (int64_t start = chunk; start < chunk_end; start += block) {
      const int64_t end = std::min(start + block, chunk_end);
      const auto part =
          values.subspan(static_cast<size_t>(start), static_cast<size_t>(end - start));
      blocks.push_back(
          {std::accumulate(part.begin(), part.end(), 0.0), static_cast<double>(part.size())});
    }
  }
  return blocks;
}

// splitmix64 (Steele, Lea, Flood 2014): the same numbers on every platform, unlike std
// distributions.
uint64_t next_random(uint64_t& state) {
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

std::vector<double> bootstrap_means(std::span<const double> values, int64_t tokens_per_chunk) {
  const std::vector<Block> blocks = make_blocks(values, tokens_per_chunk);
  uint64_t state = 20240607;  // any constant: results must not change from run to run
  std::vector<double> means(kResamples);
  for (double& mean : means) {
    Block sum;
    for (size_t i = 0; i < blocks.size(); ++i) {
      const Block& drawn = blocks[next_random(state) % blocks.size()];
      sum.sum += drawn.sum;
      sum.count += drawn.count;
    }
    mean = sum.sum / sum.count;
  }
  return means;
}

}  // namespace

double quantile(std::span<float> values, double fraction) {
  return quantile_of(values, fraction);
}
double quantile(std::span<double> values, double fraction) {
  return quantile_of(values, fraction);
}

void append(TokenScores& scores, const TokenScores& more) {
  const auto add = [](auto& to, const auto& from) {
    to.insert(to.end(), from.begin(), from.end());
  };
  add(scores.nll, more.nll);
  add(scores.delta_nll, more.delta_nll);
  add(scores.kl, more.kl);
  add(scores.same_top, more.same_top);
}

TokenScores part(const TokenScores& scores, int64_t first, int64_t count) {
  const auto cut = [&](const auto& values) {
    KVANT_CHECK(first >= 0 && count >= 0 && first + count <= static_cast<int64_t>(values.size()),
                "scores that are there");
    return std::decay_t<decltype(values)>(values.begin() + first, values.begin() + first + count);
  };
  return {cut(scores.nll), cut(scores.delta_nll), cut(scores.kl), cut(scores.same_top)};
}

EvalSummary summarize(const TokenScores& scores, int64_t tokens_per_chunk) {
  const size_t n = scores.nll.size();
  KVANT_CHECK(n > 0 && scores.kl.size() == n && scores.same_top.size() == n &&
                  scores.delta_nll.size() == n && tokens_per_chunk > 0,
              "scores of the same tokens");
  EvalSummary summary;
  summary.num_tokens = static_cast<int64_t>(n);
  summary.nll = mean_of(scores.nll);
  summary.ppl = std::exp(summary.nll);
  const std::vector<double> kl(scores.kl.begin(), scores.kl.end());
  summary.kl_mean = mean_of(kl);
  std::vector<float> sorted = scores.kl;
  summary.kl_median = quantile(sorted, 0.5);
  summary.kl_p99 = quantile(sorted, 0.99);
  std::vector<double> means = bootstrap_means(kl, tokens_per_chunk);
  summary.kl_low = quantile(means, 0.025);
  summary.kl_high = quantile(means, 0.975);
  summary.top1 =
      std::accumulate(scores.same_top.begin(), scores.same_top.end(), 0.0) / static_cast<double>(n);
  summary.delta_nll = mean_of(scores.delta_nll);
  means = bootstrap_means(scores.delta_nll, tokens_per_chunk);
  summary.delta_nll_low = quantile(means, 0.025);
  summary.delta_nll_high = quantile(means, 0.975);
  return summary;
}

KlDifference compare_kl(const TokenScores& a, const TokenScores& b, int64_t tokens_per_chunk) {
  KVANT_CHECK(a.kl.size() == b.kl.size() && !a.kl.empty(), "scores of the same tokens");
  std::vector<double> differences(a.kl.size());
  for (size_t i = 0; i < differences.size(); ++i) {
    differences[i] = static_cast<double>(a.kl[i]) - static_cast<double>(b.kl[i]);
  }
  std::vector<double> means = bootstrap_means(differences, tokens_per_chunk);
  const auto up = std::count_if(means.begin(), means.end(), [](double mean) { return mean >= 0; });
  const auto down =
      std::count_if(means.begin(), means.end(), [](double mean) { return mean <= 0; });
  KlDifference result;
  result.mean = mean_of(differences);
  // The values themselves count as one more resample, so that p is never 0. And resampling cannot
  // show more than the signs of so many blocks could.
  const double share =
      static_cast<double>(std::min(up, down) + 1) / static_cast<double>(kResamples + 1);
  const auto blocks = static_cast<double>(make_blocks(differences, tokens_per_chunk).size());
  result.p = std::min(1.0, 2 * std::max(share, std::exp2(-blocks)));
  result.low = quantile(means, 0.025);
  result.high = quantile(means, 0.975);
  return result;
}

std::vector<PositionBin> by_position(const TokenScores& scores, int64_t tokens_per_chunk,
                                     int64_t first_position, int num_bins) {
  const auto total = static_cast<int64_t>(scores.kl.size());
  KVANT_CHECK(tokens_per_chunk > 0 && total % tokens_per_chunk == 0 && num_bins > 0,
              "scores of whole chunks");
  const int64_t length = (tokens_per_chunk + num_bins - 1) / num_bins;
  std::vector<PositionBin> bins(static_cast<size_t>((tokens_per_chunk + length - 1) / length));
  for (int64_t i = 0; i < total; ++i) {
    PositionBin& bin = bins[static_cast<size_t>(i % tokens_per_chunk / length)];
    ++bin.num_tokens;
    bin.kl_mean += static_cast<double>(scores.kl[i]);
    bin.delta_nll += scores.delta_nll[i];
  }
  for (size_t i = 0; i < bins.size(); ++i) {
    const int64_t start = static_cast<int64_t>(i) * length;
    bins[i].first = first_position + start;
    bins[i].last = first_position + std::min(start + length, tokens_per_chunk) - 1;
    const auto count = static_cast<double>(std::max<int64_t>(bins[i].num_tokens, 1));
    bins[i].kl_mean /= count;
    bins[i].delta_nll /= count;
  }
  return bins;
}

}  // namespace kvant::model
