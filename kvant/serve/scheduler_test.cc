#include "kvant/serve/scheduler.h"

#include <gtest/gtest.h>

namespace kvant::serve {
namespace {

TEST(ChooseWaiting, TakesTheFirstOfEquals) {
  const std::vector<WaitingView> waiting = {{.missing_tokens = 5}, {.missing_tokens = 5}};
  EXPECT_EQ(choose_waiting(waiting, 2), 0u);
  EXPECT_EQ(choose_waiting({}, 2), std::nullopt);
}

TEST(ChooseWaiting, PriorityGoesBeforeCachedPages) {
  const std::vector<WaitingView> waiting = {
      {.priority = 1, .cached_tokens = 90, .missing_tokens = 10},
      {.priority = 0, .missing_tokens = 100}};
  EXPECT_EQ(choose_waiting(waiting, 2), 1u);
}

TEST(ChooseWaiting, TheTenantThatGotLeastGoesFirst) {
  const std::vector<WaitingView> waiting = {{.tenant_share = 900, .missing_tokens = 10},
                                            {.tenant_share = 100, .missing_tokens = 10}};
  EXPECT_EQ(choose_waiting(waiting, 2), 1u);
}

TEST(ChooseWaiting, CachedPrefixesOvertakeForALimitedTime) {
  std::vector<WaitingView> waiting = {{.waited_seconds = 1, .missing_tokens = 100},
                                      {.cached_tokens = 90, .missing_tokens = 10}};
  EXPECT_EQ(choose_waiting(waiting, 2), 1u);
  waiting[0].waited_seconds = 3;
  EXPECT_EQ(choose_waiting(waiting, 2), 0u);
}

TEST(ChooseWaiting, PassesOverWhatWaitsForPages) {
  std::vector<WaitingView> waiting = {{.missing_tokens = 1, .deferred = true},
                                      {.missing_tokens = 100}};
  EXPECT_EQ(choose_waiting(waiting, 2), 1u);
  waiting[1].deferred = true;
  EXPECT_EQ(choose_waiting(waiting, 2), std::nullopt);
}

TEST(FairShare, CountsTokensAndGivesNoCreditForAbsence) {
  FairShare share;
  share.arrive("a");
  share.charge("a", 100);
  share.arrive("b");
  EXPECT_EQ(share.served("b"), 100);  // starts where the others are
  share.charge("b", 50);
  EXPECT_EQ(share.served("b"), 150);
  EXPECT_EQ(share.served("a"), 100);
  share.leave("b");
  share.charge("a", 500);
  share.arrive("b");
  EXPECT_EQ(share.served("b"), 600);
  share.leave("a");
  share.leave("b");
  EXPECT_EQ(share.served("a"), 0);
}

TEST(ShareBudget, AnswersComeBeforePrompts) {
  const std::vector<RunningView> running = {
      {.missing_tokens = 1000}, {.missing_tokens = 1}, {.missing_tokens = 300}, {}};
  EXPECT_EQ(share_budget(running, 512), (std::vector<int64_t>{510, 1, 0, 1}));
  EXPECT_EQ(share_budget(running, 2000), (std::vector<int64_t>{1000, 1, 300, 1}));
}

TEST(ShareBudget, DraftsComeAfterTokensAndBeforePrompts) {
  const std::vector<RunningView> running = {
      {.draft_tokens = 4}, {.draft_tokens = 4}, {.missing_tokens = 50}};
  EXPECT_EQ(share_budget(running, 8), (std::vector<int64_t>{5, 3, 0}));
  EXPECT_EQ(share_budget(running, 20), (std::vector<int64_t>{5, 5, 10}));
}

TEST(ChooseVictim, TakesTheLeastImportantThenTheLast) {
  const std::vector<VictimView> running = {{0, 1}, {1, 2}, {1, 5}, {0, 9}};
  EXPECT_EQ(choose_victim(running), 2u);
}

}  // namespace
}  // namespace kvant::serve
