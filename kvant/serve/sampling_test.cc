#include "kvant/serve/sampling.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <optional>
#include <random>

namespace kvant::serve {
namespace {

constexpr int32_t kEnd = 2;

struct Row {
  std::vector<float> logits;
  SamplingParams params = {};
  std::vector<int32_t> tokens = {};
  size_t num_prompt_tokens = 0;
  std::vector<uint32_t> bitmask = {};
};

Result<SampledToken> sample(RowSampler& sampler, const Row& row, model::SplitMix64& random) {
  return sampler.sample({.logits = row.logits,
                         .params = &row.params,
                         .tokens = row.tokens,
                         .num_prompt_tokens = row.num_prompt_tokens,
                         .bitmask = row.bitmask,
                         .random = &random});
}

SampledToken sample_once(const Row& row, uint64_t seed = 1) {
  const int32_t end[] = {kEnd};
  RowSampler sampler(static_cast<int>(row.logits.size()), end);
  model::SplitMix64 random = choice_random(seed, 0);
  return sample(sampler, row, random).value();
}

int32_t greedy(Row row) {
  row.params.temperature = 0;
  return sample_once(row).id;
}

std::map<int32_t, double> shares(const Row& row, int count = 20000) {
  const int32_t end[] = {kEnd};
  RowSampler sampler(static_cast<int>(row.logits.size()), end);
  model::SplitMix64 random = choice_random(5, 0);
  std::map<int32_t, double> out;
  for (int i = 0; i < count; ++i) out[sample(sampler, row, random).value().id] += 1.0 / count;
  return out;
}

std::vector<float> random_logits(size_t count, float spread, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> logits(count);
  for (float& logit : logits) logit = normal(random);
  return logits;
}

// What is left of the distribution, the slow way: probability by id.
std::map<int32_t, double> reference(const std::vector<float>& logits, const SamplingParams& p) {
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  const double max = logits[order[0]];
  const auto weight = [&](int32_t id) {
    return std::exp((logits[id] - max) / static_cast<double>(p.temperature));
  };
  if (p.min_p > 0) std::erase_if(order, [&](int32_t id) { return weight(id) < p.min_p; });
  if (p.top_k > 0 && static_cast<size_t>(p.top_k) < order.size()) order.resize(p.top_k);
  double sum = 0;
  for (const int32_t id : order) sum += weight(id);
  double held = 0;
  std::map<int32_t, double> out;
  for (const int32_t id : order) {
    held += weight(id);
    out[id] = weight(id);
    if (p.top_p < 1 && held >= p.top_p * sum) break;
  }
  double kept = 0;
  for (const auto& [id, w] : out) kept += w;
  for (auto& [id, w] : out) w /= kept;
  return out;
}

TEST(Sampling, GreedyTakesTheBestAndTheFirstOfEquals) {
  EXPECT_EQ(greedy({.logits = {1, 3, 0, 3}}), 1);
  std::vector<float> many = random_logits(1003, 1, 3);
  many[1002] = 9;
  EXPECT_EQ(greedy({.logits = many}), 1002);
}

TEST(Sampling, NothingButTheGreatestIsNeededOfPlainGreedyRows) {
  const auto takes = [](const std::function<void(SamplingParams&)>& change,
                        bool constrained = false, size_t num_output = 5) {
    SamplingParams params;
    params.temperature = 0;
    change(params);
    return takes_greatest(params, constrained, num_output);
  };
  const auto nothing = [](SamplingParams&) {};
  EXPECT_TRUE(takes(nothing));
  EXPECT_FALSE(takes(nothing, true));
  EXPECT_TRUE(takes([](SamplingParams& p) { p.top_k = 3, p.top_p = 0.5f, p.min_p = 0.1f; }));
  EXPECT_FALSE(takes([](SamplingParams& p) { p.temperature = 1; }));
  EXPECT_FALSE(takes([](SamplingParams& p) { p.logprobs = 0; }));
  EXPECT_FALSE(takes([](SamplingParams& p) { p.logit_bias = {{1, 2.0f}}; }));
  EXPECT_FALSE(takes([](SamplingParams& p) { p.allowed_token_ids = {1}; }));
  EXPECT_FALSE(takes([](SamplingParams& p) { p.bad_token_ids = {1}; }));
  EXPECT_FALSE(takes([](SamplingParams& p) { p.presence_penalty = 1; }));
  EXPECT_FALSE(takes([](SamplingParams& p) { p.frequency_penalty = 1; }));
  EXPECT_FALSE(takes([](SamplingParams& p) { p.repetition_penalty = 1.1f; }));
  EXPECT_FALSE(takes([](SamplingParams& p) { p.min_tokens = 6; }));
  EXPECT_TRUE(takes([](SamplingParams& p) { p.min_tokens = 5; }));
}

TEST(Sampling, DrawsFromWhatTheFiltersLeave) {
  std::mt19937 random(11);
  for (uint32_t round = 0; round < 24; ++round) {
    Row row = {.logits = random_logits(40 + random() % 2000, 3, 100u + round)};
    row.params.temperature = 0.4f + 0.1f * static_cast<float>(random() % 12);
    if (random() % 2) row.params.top_k = 1 + static_cast<int>(random() % 60);
    if (random() % 2) row.params.top_p = 0.05f + 0.09f * static_cast<float>(random() % 11);
    if (random() % 2) row.params.min_p = 0.02f * static_cast<float>(random() % 20);
    const auto expected = reference(row.logits, row.params);
    const auto got = shares(row, 4000);
    for (const auto& [id, share] : got) {
      ASSERT_TRUE(expected.contains(id)) << "round " << round << " token " << id;
    }
    for (const auto& [id, p] : expected) {
      const double share = got.contains(id) ? got.at(id) : 0;
      EXPECT_NEAR(share, p, 5 * std::sqrt(p * (1 - p) / 4000) + 1e-3) << "round " << round;
    }
  }
}

TEST(Sampling, LightTokensAreSetAsideOnlyIfTopPDropsThem) {
  for (const float top_p : {0.5f, 0.99f, 0.999999f}) {
    Row row = {.logits = std::vector<float>(500, 0.25f)};
    row.params.top_p = top_p;
    const auto expected = reference(row.logits, row.params);
    const auto got = shares(row, 20000);
    EXPECT_LE(got.rbegin()->first, expected.rbegin()->first) << top_p;
    EXPECT_EQ(got.size(), expected.size()) << top_p;
  }
}

TEST(Sampling, MinPAndTopPSeeTheTemperedDistribution) {
  Row row = {.logits = {std::log(0.6f), std::log(0.25f), std::log(0.15f)}};
  row.params.top_p = 0.7f;
  EXPECT_EQ(shares(row, 500).size(), 2u);
  row.params.temperature = 0.5f;  // 0.81, 0.14, 0.05
  EXPECT_EQ(shares(row, 500).size(), 1u);
}

TEST(Sampling, PenaltiesCountWhatTheyShould) {
  Row row = {.logits = {4, 3.5f, 0, -1}, .tokens = {0, 1, 1}, .num_prompt_tokens = 1};
  row.params.repetition_penalty = 2;  // prompt and output: 2, 1.75
  EXPECT_EQ(greedy(row), 0);
  row.params.repetition_penalty = 1;
  row.params.presence_penalty = 1;  // output only
  row.logits = {2, 2.5f, 0, -1};
  EXPECT_EQ(greedy(row), 0);
  row.logits = {1, 2.5f, 0, -1};
  EXPECT_EQ(greedy(row), 1);  // once
  row.params.presence_penalty = 0;
  row.params.frequency_penalty = 1;
  EXPECT_EQ(greedy(row), 0);  // twice
  row.params.frequency_penalty = 0;
  row.params.repetition_penalty = 2;
  row.logits = {-1, -1.5f, -1.9f, -3};
  EXPECT_EQ(greedy(row), 2);  // negative logits are multiplied
}

TEST(Sampling, BiasMasksAndMinTokens) {
  Row row = {.logits = {1, 2, 3, 0}};
  row.params.logit_bias = {{3, 5.0f}, {2, -100.0f}};
  EXPECT_EQ(greedy(row), 3);
  row.params.logit_bias.clear();
  row.params.bad_token_ids = {2};
  EXPECT_EQ(greedy(row), 1);
  row.params.allowed_token_ids = {0, 2};
  EXPECT_EQ(greedy(row), 0);
  row.params = {};
  row.params.min_tokens = 1;  // kEnd is 2
  EXPECT_EQ(greedy(row), 1);
  row.params.stop_token_ids = {1};
  EXPECT_EQ(greedy(row), 0);
  row.tokens = {0};
  EXPECT_EQ(greedy(row), 2);  // one token was generated
  row.bitmask = {0b1001};
  EXPECT_EQ(greedy(row), 0);
}

TEST(Sampling, MinTokensGivesWayWhenNothingElseMayFollow) {
  Row row = {.logits = {1, 2, 3, 0}};
  row.params.min_tokens = 9;
  row.bitmask = {1u << kEnd};
  EXPECT_EQ(greedy(row), kEnd);
}

TEST(Sampling, ATokenWhoseLogitIsNotANumberIsNeverChosen) {
  Row row = {.logits = std::vector<float>(50, 0.0f)};
  row.logits[9] = std::nanf("");
  EXPECT_FALSE(shares(row, 2000).contains(9));
  row.params.top_k = 49;
  EXPECT_FALSE(shares(row, 2000).contains(9));
  EXPECT_NE(greedy(row), 9);
}

TEST(Sampling, NoTokenLeftAndBrokenLogitsAreErrors) {
  RowSampler sampler(4, {});
  model::SplitMix64 random(1);
  Row row = {.logits = {1, 2, 3, 0}};
  row.bitmask = {0b0001};
  row.params.bad_token_ids = {0};
  EXPECT_EQ(sample(sampler, row, random).error().code(), ErrorCode::kInvalidArgument);
  row = {.logits = std::vector<float>(4, std::numeric_limits<float>::infinity())};
  EXPECT_EQ(sample(sampler, row, random).error().code(), ErrorCode::kNumericError);
}

TEST(Sampling, LogprobsAreThoseOfTheLogitsAsTheyCame) {
  Row row = {.logits = random_logits(3000, 4, 9)};
  row.params.temperature = 0;
  row.params.logprobs = 20;
  std::vector<int32_t> order(3000);
  std::iota(order.begin(), order.end(), 0);
  std::ranges::sort(order, [&](int32_t a, int32_t b) { return row.logits[a] > row.logits[b]; });
  row.params.bad_token_ids = {order[0]};
  const SampledToken token = sample_once(row);
  double sum = 0;
  for (const float logit : row.logits) sum += std::exp(static_cast<double>(logit));
  const auto logprob = [&](int32_t id) { return row.logits[id] - std::log(sum); };
  EXPECT_EQ(token.id, order[1]);
  EXPECT_NEAR(token.logprob, logprob(order[1]), 2e-6);
  ASSERT_EQ(token.top.size(), 20u);
  for (size_t i = 0; i < 20; ++i) {
    EXPECT_EQ(token.top[i].first, order[i]);
    EXPECT_NEAR(token.top[i].second, logprob(order[i]), 2e-6);
  }
  row.params.logprobs = 0;
  EXPECT_TRUE(sample_once(row).top.empty());
  EXPECT_NE(sample_once(row).logprob, 0);
}

TEST(Sampling, TopOfEqualsTakesTheLowerIds) {
  RowSampler sampler(300, {});
  const std::vector<float> logits(300, 1.0f);
  const SampledToken token = sampler.score(logits, 7, 3);
  ASSERT_EQ(token.top.size(), 3u);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(token.top[i].first, i);
  EXPECT_NEAR(token.logprob, -std::log(300.0), 1e-6);
}

TEST(Sampling, TheSameSeedDrawsTheSameWhateverTheSamplerDidBefore) {
  const int32_t end[] = {kEnd};
  Row row = {.logits = random_logits(500, 1, 4)};
  RowSampler fresh(500, end);
  RowSampler used(500, end);
  model::SplitMix64 other = choice_random(99, 0);
  for (int i = 0; i < 10; ++i) (void)sample(used, row, other);
  model::SplitMix64 a = choice_random(7, 1);
  model::SplitMix64 b = choice_random(8, 0);  // choice 1 of seed 7
  for (int i = 0; i < 50; ++i) {
    EXPECT_EQ(sample(fresh, row, a).value().id, sample(used, row, b).value().id);
  }
}

// ---- what a device finds in place of the logits ----

TEST(Sampling, QueriesAreForRowsWhoseLogitsNobodyElseNeeds) {
  using Kind = backend::RowQuery::Kind;
  const auto kind = [](const std::function<void(SamplingParams&)>& change,
                       bool constrained = false) {
    SamplingParams params;
    change(params);
    model::SplitMix64 random(3);
    const auto query = row_query(params, constrained, 5, 50000, random);
    return query ? std::optional(query->kind) : std::nullopt;
  };
  const auto nothing = [](SamplingParams&) {};
  EXPECT_EQ(kind(nothing), Kind::kDraw);
  EXPECT_EQ(kind(nothing, true), std::nullopt);
  EXPECT_EQ(kind([](SamplingParams& p) { p.top_k = 40, p.top_p = 0.9f, p.min_p = 0.1f; }),
            Kind::kTopK);
  EXPECT_EQ(kind([](SamplingParams& p) { p.top_k = 1025; }), std::nullopt);
  EXPECT_EQ(kind([](SamplingParams& p) { p.top_k = 50000; }), Kind::kDraw);
  EXPECT_EQ(kind([](SamplingParams& p) { p.top_p = 0.9f, p.min_p = 0.1f; }), Kind::kNear);
  EXPECT_EQ(kind([](SamplingParams& p) { p.top_p = 0.9f; }), Kind::kTopP);
  EXPECT_EQ(kind([](SamplingParams& p) { p.temperature = 0; }), std::nullopt);
  EXPECT_EQ(kind([](SamplingParams& p) { p.logprobs = 0; }), std::nullopt);
  EXPECT_EQ(kind([](SamplingParams& p) { p.min_tokens = 6; }), std::nullopt);
  EXPECT_EQ(kind([](SamplingParams& p) { p.presence_penalty = 1; }), std::nullopt);
}

TEST(Sampling, WhatAQueryFindsGivesTheTokenOfTheLogits) {
  std::mt19937 random(12);
  for (uint32_t round = 0; round < 400; ++round) {
    Row row = {.logits = random_logits(2 + random() % 2500, 3, 900u + round)};
    if (round % 3 == 0) {  // equals
      for (float& logit : row.logits) logit = std::round(logit);
    }
    row.params.temperature = 0.2f + 0.2f * static_cast<float>(random() % 20);
    if (random() % 2) row.params.top_k = 1 + static_cast<int>(random() % 60);
    if (random() % 2) row.params.top_p = 0.05f + 0.05f * static_cast<float>(random() % 20);
    if (random() % 2) row.params.min_p = 0.02f * static_cast<float>(random() % 51);
    const auto vocab_size = static_cast<int>(row.logits.size());
    RowSampler sampler(vocab_size, {});
    model::SplitMix64 of_logits = choice_random(round, 0);
    model::SplitMix64 of_query = of_logits;
    model::SplitMix64 of_choice = of_logits;
    const int32_t expected = sample(sampler, row, of_logits).value().id;
    const auto query = row_query(row.params, false, 0, vocab_size, of_query);
    ASSERT_TRUE(query);
    std::vector<backend::RowMaximum> candidates(row.logits.size());
    const auto choice = backend::answer_query(row.logits, *query, candidates);
    candidates.resize(static_cast<size_t>(choice.num_candidates));
    ASSERT_TRUE(choice.found());
    EXPECT_EQ(sampler.choose(choice, candidates, row.params, of_choice), expected)
        << "round " << round;
    const uint64_t next = of_logits.next();
    EXPECT_EQ(of_query.next(), next);
    EXPECT_EQ(of_choice.next(), next);
  }
}

}  // namespace
}  // namespace kvant::serve
