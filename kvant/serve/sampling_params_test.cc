#include "kvant/serve/sampling_params.h"

#include <gtest/gtest.h>

#include <cmath>

namespace kvant::serve {
namespace {

constexpr SamplingLimits kLimits = {.vocab_size = 100};

// The message that a change of the defaults gives; empty if it is fine.
template <typename Change>
std::string problem(Change change) {
  SamplingParams params;
  change(params);
  const Status status = params.check(kLimits);
  if (status) return "";
  EXPECT_EQ(status.error().code(), ErrorCode::kInvalidArgument);
  return status.error().message();
}

TEST(SamplingParams, DefaultsAndLimitsThemselvesAreFine) {
  EXPECT_EQ(problem([](SamplingParams&) {}), "");
  EXPECT_EQ(problem([](SamplingParams& p) {
              p.n = 128;
              p.temperature = 0;
              p.top_p = 1;
              p.top_k = -1;
              p.min_p = 1;
              p.presence_penalty = -2;
              p.frequency_penalty = 2;
              p.logit_bias = {{0, -100.0f}, {99, 100.0f}};
              p.max_tokens = 0;
              p.stop = {"a"};
              p.logprobs = 20;
              p.prompt_logprobs = 0;
            }),
            "");
}

TEST(SamplingParams, TheFirstFieldOutOfRangeIsNamedWithItsRange) {
  using P = SamplingParams;
  EXPECT_EQ(problem([](P& p) { p.n = 0; }), "n is 0; expected 1 to 128");
  EXPECT_EQ(problem([](P& p) { p.temperature = -0.5f; }),
            "temperature is -0.5; expected a finite number, 0 (greedy) or more");
  EXPECT_EQ(problem([](P& p) { p.top_p = 0; }), "top_p is 0; expected a number above 0, at most 1");
  EXPECT_EQ(problem([](P& p) { p.top_k = -2; }),
            "top_k is -2; expected 1 or more, or 0 or -1 for all tokens");
  EXPECT_EQ(problem([](P& p) { p.min_p = 1.5f; }), "min_p is 1.5; expected a number from 0 to 1");
  EXPECT_EQ(problem([](P& p) { p.presence_penalty = 3; }),
            "presence_penalty is 3; expected a number from -2 to 2");
  EXPECT_EQ(problem([](P& p) {
              p.logit_bias = {{100, 1.0f}};
            }),
            "logit_bias is 100; expected token ids from 0 to 99");
  EXPECT_EQ(problem([](P& p) {
              p.logit_bias = {{7, 101.0f}};
            }),
            "logit_bias of token 7 is 101; expected a number from -100 to 100");
  EXPECT_EQ(problem([](P& p) { p.stop_token_ids = {-1}; }),
            "stop_token_ids is -1; expected token ids from 0 to 99");
  EXPECT_EQ(problem([](P& p) {
              p.max_tokens = 4;
              p.min_tokens = 5;
            }),
            "min_tokens is 5; expected at most max_tokens, 4");
  EXPECT_EQ(problem([](P& p) {
              p.stop = {"x", ""};
            }),
            "stop is an empty string; expected strings of 1 byte or more");
  EXPECT_EQ(problem([](P& p) { p.logprobs = 21; }), "logprobs is 21; expected 0 to 20");
  EXPECT_EQ(problem([](P& p) { p.prompt_logprobs = -1; }),
            "prompt_logprobs is -1; expected 0 to 20");
}

TEST(SamplingParams, NotANumberIsNeverInRange) {
  const float nan = std::nanf("");
  EXPECT_NE(problem([&](SamplingParams& p) { p.temperature = nan; }), "");
  EXPECT_NE(problem([&](SamplingParams& p) { p.top_p = nan; }), "");
  EXPECT_NE(problem([&](SamplingParams& p) { p.min_p = nan; }), "");
  EXPECT_NE(problem([&](SamplingParams& p) { p.presence_penalty = nan; }), "");
  EXPECT_NE(problem([&](SamplingParams& p) { p.frequency_penalty = nan; }), "");
  EXPECT_NE(problem([&](SamplingParams& p) { p.repetition_penalty = nan; }), "");
  EXPECT_NE(problem([&](SamplingParams& p) { p.logit_bias = {{1, nan}}; }), "");
}

}  // namespace
}  // namespace kvant::serve
