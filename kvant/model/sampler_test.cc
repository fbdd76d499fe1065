#include "kvant/model/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <random>
#include <set>

namespace kvant::model {
namespace {

SamplerOptions plain() {
  return {.temperature = 1, .top_k = 0, .top_p = 1, .min_p = 0, .repeat_penalty = 1, .seed = 7};
}

std::map<int32_t, int> draw_many(const SamplerOptions& options, const std::vector<float>& logits,
                                 int count = 20000) {
  Sampler sampler(options, static_cast<int>(logits.size()));
  std::map<int32_t, int> counts;
  for (int i = 0; i < count; ++i) ++counts[sampler.sample(logits, {})];
  return counts;
}

TEST(Sampler, TemperatureZeroTakesTheBestAndTheFirstOfEquals) {
  SamplerOptions options = plain();
  options.temperature = 0;
  Sampler sampler(options, 4);
  EXPECT_EQ(sampler.sample(std::vector<float>{1, 3, 3, 2}, {}), 1);
  EXPECT_EQ(sampler.sample(std::vector<float>{-1, -3, -3, -0.5f}, {}), 3);
}

TEST(Sampler, DrawsWithTheProbabilitiesOfSoftmax) {
  const std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.2f)};
  const auto counts = draw_many(plain(), logits);
  EXPECT_NEAR(counts.at(0) / 20000.0, 0.5, 0.015);
  EXPECT_NEAR(counts.at(1) / 20000.0, 0.3, 0.015);
  EXPECT_NEAR(counts.at(2) / 20000.0, 0.2, 0.015);
}

TEST(Sampler, TemperatureSharpens) {
  SamplerOptions options = plain();
  options.temperature = 0.5f;
  const std::vector<float> logits = {std::log(0.6f), std::log(0.4f)};
  const auto counts = draw_many(options, logits);
  EXPECT_NEAR(counts.at(0) / 20000.0, 0.36 / (0.36 + 0.16), 0.015);
}

TEST(Sampler, TopKKeepsTheBest) {
  SamplerOptions options = plain();
  options.top_k = 2;
  const auto counts = draw_many(options, {0, 2, 1, -1, 0.5f});
  EXPECT_EQ(counts.size(), 2u);
  EXPECT_TRUE(counts.contains(1) && counts.contains(2));
}

TEST(Sampler, CandidatesGiveTheTokenOfTheLogits) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0, 2);
  for (const int top_k : {1, 2, 40, 200}) {
    const SamplerOptions options{.top_k = top_k};
    Sampler of_logits(options, 1000);
    Sampler of_candidates(options, 1000);
    const auto query = row_query(options, 1000);
    ASSERT_TRUE(query);
    for (int i = 0; i < 50; ++i) {
      std::vector<float> logits(1000);
      for (float& logit : logits) logit = std::round(8 * normal(random)) / 8;
      std::vector<backend::RowMaximum> candidates(static_cast<size_t>(top_k));
      ASSERT_TRUE(backend::answer_query(logits, *query, candidates).found());
      EXPECT_EQ(of_candidates.sample(candidates), of_logits.sample(logits, {}));
    }
  }
  EXPECT_FALSE(row_query({.temperature = 0}, 1000));
  EXPECT_FALSE(row_query({.top_k = 0}, 1000));
  EXPECT_FALSE(row_query({.top_k = 1000}, 1000));
  EXPECT_FALSE(row_query({.top_k = 1025}, 5000));
  EXPECT_FALSE(row_query({.repeat_penalty = 1.1f}, 1000));
}

TEST(Sampler, TopPKeepsTheFewestThatHoldTheMass) {
  SamplerOptions options = plain();
  options.top_p = 0.75f;
  std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.15f), std::log(0.05f)};
  EXPECT_EQ(draw_many(options, logits).size(), 2u);
  // Over many more tokens than are sorted at first.
  logits.assign(500, 0.0f);
  options.top_p = 0.5f;
  const auto counts = draw_many(options, logits, 5000);
  EXPECT_EQ(counts.size(), 250u);
  EXPECT_LT(counts.rbegin()->first, 250);  // of equals, the lower ids
}

TEST(Sampler, MinPDropsWhatIsFarBelowTheBest) {
  SamplerOptions options = plain();
  options.min_p = 0.25f;
  const auto counts =
      draw_many(options, {std::log(0.6f), std::log(0.2f), std::log(0.14f), std::log(0.06f)});
  EXPECT_EQ(counts.size(), 2u);
}

TEST(Sampler, RepeatPenaltyCountsATokenOnceAndOnlyRecentOnes) {
  SamplerOptions options = plain();
  options.temperature = 0;
  options.repeat_penalty = 2;
  options.repeat_last = 2;
  Sampler sampler(options, 3);
  const std::vector<int32_t> history = {2, 0, 0};
  EXPECT_EQ(sampler.sample(std::vector<float>{4, 3, 1}, history), 1);           // 4 becomes 2
  EXPECT_EQ(sampler.sample(std::vector<float>{4, 1.5f, 1}, history), 0);        // once: 2, not 1
  EXPECT_EQ(sampler.sample(std::vector<float>{-1, -1.5f, -1.2f}, history), 2);  // -1 becomes -2
}

TEST(Sampler, TheSameSeedGivesTheSameTokens) {
  const std::vector<float> logits(100, 0.0f);
  SamplerOptions options = plain();
  const auto run = [&] {
    Sampler sampler(options, 100);
    std::vector<int32_t> ids;
    for (int i = 0; i < 50; ++i) ids.push_back(sampler.sample(logits, {}));
    return ids;
  };
  const std::vector<int32_t> first = run();
  EXPECT_EQ(run(), first);
  options.seed = 8;
  EXPECT_NE(run(), first);
}

TEST(Sampler, OptionsOutOfRangeAreErrors) {
  const auto with = [](auto set) {
    SamplerOptions options;
    set(options);
    return static_cast<bool>(check_sampler_options(options));
  };
  EXPECT_TRUE(with([](SamplerOptions&) {}));
  EXPECT_FALSE(with([](SamplerOptions& o) { o.temperature = -1; }));
  EXPECT_FALSE(with([](SamplerOptions& o) { o.temperature = std::nanf(""); }));
  EXPECT_FALSE(with([](SamplerOptions& o) { o.top_k = -1; }));
  EXPECT_FALSE(with([](SamplerOptions& o) { o.top_p = 0; }));
  EXPECT_FALSE(with([](SamplerOptions& o) { o.top_p = 1.5f; }));
  EXPECT_FALSE(with([](SamplerOptions& o) { o.min_p = 2; }));
  EXPECT_FALSE(with([](SamplerOptions& o) { o.repeat_penalty = 0; }));
}

}  // namespace
}  // namespace kvant::model
