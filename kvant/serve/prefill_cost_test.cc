#include "kvant/serve/prefill_cost.h"

#include <gtest/gtest.h>

namespace kvant::serve {
namespace {

void observe(PrefillCost& cost, double tokens, double context, double seconds) {
  cost.observe(tokens, tokens * (context + tokens / 2), seconds);
}

TEST(PrefillCost, FindsBothCosts) {
  PrefillCost cost;
  EXPECT_FALSE(cost.known());
  for (const double context : {0.0, 1000.0, 5000.0}) {
    for (const double tokens : {16.0, 512.0}) {
      observe(cost, tokens, context, 1e-3 * tokens + 2e-7 * tokens * (context + tokens / 2));
    }
  }
  EXPECT_TRUE(cost.known());
  EXPECT_NEAR(cost.token_seconds(), 1e-3, 1e-9);
  EXPECT_NEAR(cost.token_context_seconds(), 2e-7, 1e-12);
}

TEST(PrefillCost, OneKindOfStepGivesOneCost) {
  PrefillCost cost;
  for (int i = 0; i < 5; ++i) observe(cost, 100, 0, 0.2);
  EXPECT_NEAR(cost.token_seconds(), 2e-3, 1e-9);
  EXPECT_EQ(cost.token_context_seconds(), 0);
}

TEST(PrefillCost, FollowsChange) {
  PrefillCost cost;
  for (int i = 0; i < 300; ++i) observe(cost, 100, 0, 1.0);
  for (int i = 0; i < 700; ++i) observe(cost, 100, 0, 0.1);
  EXPECT_NEAR(cost.token_seconds(), 1e-3, 1e-4);
}

TEST(PrefillCost, NeverBelowZero) {
  PrefillCost cost;
  observe(cost, 100, 0, 1.0);
  observe(cost, 100, 5000, 0.5);  // noise
  EXPECT_GT(cost.token_seconds(), 0);
  EXPECT_GE(cost.token_context_seconds(), 0);
}

}  // namespace
}  // namespace kvant::serve
