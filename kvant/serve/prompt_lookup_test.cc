#include "kvant/serve/prompt_lookup.h"

#include <gtest/gtest.h>

namespace kvant::serve {
namespace {

using Ids = std::vector<int32_t>;

TEST(PromptLookup, ContinuesTheLatestEarlierPlace) {
  const Ids tokens = {1, 2, 3, 9, 1, 2, 4, 5, 1, 2};
  EXPECT_EQ(draft_by_lookup(tokens, 3, {.min_ngram = 2, .max_ngram = 2}), (Ids{4, 5, 1}));
}

TEST(PromptLookup, PrefersLongerMatches) {
  const Ids tokens = {7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2};
  EXPECT_EQ(draft_by_lookup(tokens, 1, {.min_ngram = 2, .max_ngram = 3}), Ids{3});
  EXPECT_EQ(draft_by_lookup(tokens, 1, {.min_ngram = 2, .max_ngram = 2}), Ids{4});
}

TEST(PromptLookup, RunsOfOneTokenContinueThemselves) {
  const Ids tokens = {5, 5, 5, 5};
  EXPECT_EQ(draft_by_lookup(tokens, 4, {.min_ngram = 2, .max_ngram = 3}), Ids{5});
}

TEST(PromptLookup, GivesNothingWhereNothingRepeats) {
  EXPECT_TRUE(draft_by_lookup(Ids{1, 2, 3, 4}, 4, {}).empty());
  EXPECT_TRUE(draft_by_lookup(Ids{}, 4, {}).empty());
  EXPECT_TRUE(draft_by_lookup(Ids{1}, 4, {}).empty());
  EXPECT_TRUE(draft_by_lookup(Ids{1, 2, 1, 2}, 0, {}).empty());
}

}  // namespace
}  // namespace kvant::serve
