#include "kvant/model/eval_stats.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

namespace kvant::model {
namespace {

constexpr float kNoFloor = -std::numeric_limits<float>::infinity();

TEST(RowSoftmax, IsStableAndPicksTheFirstTop) {
  const std::vector<float> logits = {1000.0f, 999.0f, 1000.0f, -1000.0f};
  const RowSoftmax row = row_softmax(logits);
  EXPECT_EQ(row.top, 0);
  EXPECT_NEAR(row.log_sum_exp, 1000 + std::log(2 + std::exp(-1.0)), 1e-6);
}

TEST(RowKl, MatchesTheDefinitionInDouble) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> p(1000);
  std::vector<float> q(1000);
  for (size_t i = 0; i < p.size(); ++i) {
    p[i] = normal(random);
    q[i] = p[i] + 0.1f * normal(random) + 7;  // a shift changes nothing
  }
  double sum_p = 0;
  double sum_q = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    sum_p += std::exp(static_cast<double>(p[i]));
    sum_q += std::exp(static_cast<double>(q[i]));
  }
  double expected = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    const double log_p = static_cast<double>(p[i]) - std::log(sum_p);
    expected += std::exp(log_p) * (log_p - (static_cast<double>(q[i]) - std::log(sum_q)));
  }
  const double kl = row_kl(p, row_softmax(p).log_sum_exp, q, row_softmax(q).log_sum_exp, kNoFloor);
  EXPECT_NEAR(kl, expected, 1e-6);
  EXPECT_GT(kl, 0.01);
  EXPECT_NEAR(row_kl(p, row_softmax(p).log_sum_exp, p, row_softmax(p).log_sum_exp, kNoFloor), 0,
              1e-12);
}

TEST(RowKl, LeavesOutWhatIsBelowTheFloor) {
  const std::vector<float> p = {0.0f, -20.0f};
  const std::vector<float> q = {0.0f, -60.0f};
  const double all = row_kl(p, 0, q, 0, kNoFloor);
  EXPECT_NEAR(all, std::exp(-20.0) * 40, 1e-10);
  EXPECT_EQ(row_kl(p, 0, q, 0, -16.0f), 0);
}

TEST(Quantile, InterpolatesBetweenOrderStatistics) {
  std::vector<double> values = {4, 1, 3, 2};
  EXPECT_DOUBLE_EQ(quantile(values, 0.5), 2.5);
  EXPECT_DOUBLE_EQ(quantile(values, 0.0), 1);
  EXPECT_DOUBLE_EQ(quantile(values, 1.0), 4);
  EXPECT_DOUBLE_EQ(quantile(values, 0.9), 3.7);
}

TokenScores scores_with(const std::vector<double>& nll, const std::vector<double>& base) {
  TokenScores scores;
  scores.nll = nll;
  for (size_t i = 0; i < nll.size(); ++i) scores.delta_nll.push_back(nll[i] - base[i]);
  scores.kl.assign(nll.size(), 0.5f);
  scores.same_top.assign(nll.size(), 1);
  scores.same_top[0] = 0;
  return scores;
}

TEST(Summarize, MeansAndShares) {
  const std::vector<double> nll = {1, 2, 3, 2};
  const EvalSummary summary = summarize(scores_with(nll, nll), 4);
  EXPECT_EQ(summary.num_tokens, 4);
  EXPECT_DOUBLE_EQ(summary.nll, 2);
  EXPECT_DOUBLE_EQ(summary.ppl, std::exp(2.0));
  EXPECT_DOUBLE_EQ(summary.kl_mean, 0.5);
  EXPECT_DOUBLE_EQ(summary.top1, 0.75);
  EXPECT_EQ(summary.delta_nll, 0);
  EXPECT_EQ(summary.delta_nll_low, 0);
  EXPECT_EQ(summary.delta_nll_high, 0);
}

// Of differences that are independent noise, the interval has the width that theory gives, and it
// is the paired one: the large variation that both sides share does not widen it.
TEST(Summarize, IntervalIsPairedAndOfTheRightWidth) {
  std::mt19937 random(7);
  std::normal_distribution<double> shared(3, 2);
  std::normal_distribution<double> noise(0.02, 0.1);
  for (const int64_t chunks : {4, 40}) {
    const int64_t per_chunk = 16000 / chunks;
    std::vector<double> base(16000);
    std::vector<double> own(16000);
    for (size_t i = 0; i < base.size(); ++i) {
      base[i] = shared(random);
      own[i] = base[i] + noise(random);
    }
    const EvalSummary summary = summarize(scores_with(own, base), per_chunk);
    const double half = 1.96 * 0.1 / std::sqrt(16000.0);
    EXPECT_NEAR(summary.delta_nll, 0.02, 3 * half);
    EXPECT_NEAR(summary.delta_nll_high - summary.delta_nll_low, 2 * half, 0.35 * 2 * half)
        << chunks;
    EXPECT_LT(summary.delta_nll_low, summary.delta_nll);
    EXPECT_GT(summary.delta_nll_high, summary.delta_nll);
    const EvalSummary again = summarize(scores_with(own, base), per_chunk);
    EXPECT_EQ(again.delta_nll_low, summary.delta_nll_low);
  }
}

TokenScores random_scores(size_t n, uint32_t seed, double kl) {
  std::mt19937 random(seed);
  std::exponential_distribution<double> exponential(1 / kl);
  TokenScores scores;
  for (size_t i = 0; i < n; ++i) {
    scores.kl.push_back(static_cast<float>(exponential(random)));
    scores.nll.push_back(3 + exponential(random));
    scores.delta_nll.push_back(exponential(random) - kl);
    scores.same_top.push_back(random() % 2);
  }
  return scores;
}

TEST(Summarize, BracketsTheMeanKl) {
  const EvalSummary summary = summarize(random_scores(4000, 1, 0.01), 1000);
  EXPECT_LT(summary.kl_low, summary.kl_mean);
  EXPECT_GT(summary.kl_high, summary.kl_mean);
  // 1.96 standard errors of independent values with a standard deviation of the mean.
  EXPECT_NEAR(summary.kl_high - summary.kl_mean, 1.96 * 0.01 / std::sqrt(4000.0), 1e-4);
}

TEST(CompareKl, TellsFormatsApart) {
  const TokenScores a = random_scores(2000, 1, 0.010);
  const TokenScores worse = random_scores(2000, 2, 0.013);
  const KlDifference clear = compare_kl(worse, a, 500);
  EXPECT_GT(clear.low, 0);
  EXPECT_LT(clear.p, 0.01);
  EXPECT_NEAR(clear.mean, 0.003, 0.001);
  const KlDifference mirrored = compare_kl(a, worse, 500);
  EXPECT_NEAR(mirrored.mean, -clear.mean, 1e-12);
  EXPECT_EQ(mirrored.p, clear.p);
  // The same values with noise that the pairing removes.
  TokenScores shifted = a;
  for (float& kl : shifted.kl) kl += 1e-5f;
  EXPECT_LT(compare_kl(shifted, a, 500).p, 0.01);
  EXPECT_EQ(compare_kl(a, a, 500).p, 1);
  // Two blocks say little, however far apart they are.
  EXPECT_EQ(compare_kl(part(shifted, 0, 128), part(a, 0, 128), 64).p, 0.5);
  // No difference: mostly not significant.
  int significant = 0;
  for (uint32_t seed = 10; seed < 30; ++seed) {
    significant +=
        compare_kl(random_scores(500, seed, 0.01), random_scores(500, seed + 100, 0.01), 500).p <
        0.05;
  }
  EXPECT_LE(significant, 4);
}

TEST(ByPosition, AveragesOverChunks) {
  TokenScores scores;
  for (int chunk = 0; chunk < 2; ++chunk) {
    for (int i = 0; i < 7; ++i) {
      scores.kl.push_back(static_cast<float>(i + chunk));
      scores.delta_nll.push_back(-i);
      scores.nll.push_back(1);
      scores.same_top.push_back(1);
    }
  }
  const std::vector<PositionBin> bins = by_position(scores, 7, 8, 3);
  ASSERT_EQ(bins.size(), 3u);  // of 3, 3 and 1 positions
  EXPECT_EQ(bins[0].first, 8);
  EXPECT_EQ(bins[0].last, 10);
  EXPECT_EQ(bins[0].num_tokens, 6);
  EXPECT_EQ(bins[0].kl_mean, 1.5);
  EXPECT_EQ(bins[1].delta_nll, -4);
  EXPECT_EQ(bins[2].first, 14);
  EXPECT_EQ(bins[2].last, 14);
  EXPECT_EQ(bins[2].kl_mean, 6.5);
  EXPECT_EQ(by_position(scores, 7, 8, 100).size(), 7u);
}

TEST(TokenScores, PartsMakeTheWhole) {
  const TokenScores whole = random_scores(10, 3, 1);
  TokenScores joined = part(whole, 0, 4);
  append(joined, part(whole, 4, 6));
  EXPECT_EQ(joined.nll, whole.nll);
  EXPECT_EQ(joined.delta_nll, whole.delta_nll);
  EXPECT_EQ(joined.kl, whole.kl);
  EXPECT_EQ(joined.same_top, whole.same_top);
}

}  // namespace
}  // namespace kvant::model
