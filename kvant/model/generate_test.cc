#include "kvant/model/generate.h"

#include <gtest/gtest.h>

#include "kvant/model/testing/engine.h"
#include "kvant/model/testing/tiny_models.h"

namespace kvant::model {
namespace {

using testing::Engine;
using testing::must;
using testing::random_tokens;

constexpr int kVocab = 64;

class Generation : public ::testing::Test {
 protected:
  Generation() : engine_(testing::tiny_model("llama"), "cpu") {
    runtime_ = testing::small_runtime("4bit");
    runtime_.max_sequences = 2;
    runtime_.context_tokens = 96;
    runtime_.max_step_tokens = 24;
    options_.sampler.temperature = 0;
    options_.max_tokens = 20;
    cache_ = engine_.cache(runtime_);
  }
  Session session() { return must(Session::create(engine_.model(), *cache_)); }
  static TokenCallback ignore() {
    return [](int32_t) { return Status(); };
  }

  Engine engine_;
  RuntimeOptions runtime_;
  GenerateOptions options_;
  std::unique_ptr<cache::KvCache> cache_;
};

TEST_F(Generation, GreedyTokensAreTheBestOfTheModel) {
  const std::vector<int32_t> prompt = random_tokens(40, kVocab, 1);
  std::vector<int32_t> streamed;
  Session greedy = session();
  const GenerateResult result = must(greedy.generate(prompt, options_, [&](int32_t id) {
    streamed.push_back(id);
    return Status();
  }));
  EXPECT_EQ(result.reason, StopReason::kMaxTokens);
  EXPECT_EQ(result.token_ids, streamed);
  ASSERT_EQ(result.token_ids.size(), 20u);
  EXPECT_EQ(result.stats.prompt_tokens, 40);
  EXPECT_EQ(result.stats.prefill_tokens, 40);
  EXPECT_EQ(result.stats.decode_tokens, 19);  // the last token needs no step
  EXPECT_EQ(result.stats.context_tokens, 59);

  // The same by hand.
  const cache::SequenceId id = must(cache_->add_sequence());
  std::vector<int32_t> tokens = prompt;
  size_t done = 0;
  for (const int32_t want : result.token_ids) {
    const auto rows = engine_.logits(*cache_, id, std::span(tokens).subspan(done), 24);
    const auto best = std::ranges::max_element(rows.back()) - rows.back().begin();
    ASSERT_EQ(best, want);
    done = tokens.size();
    tokens.push_back(want);
  }
}

TEST_F(Generation, EndsAtTheTokenThatEndsAnswers) {
  const std::vector<int32_t> prompt = random_tokens(10, kVocab, 2);
  Session first = session();
  const std::vector<int32_t> all = must(first.generate(prompt, options_, ignore())).token_ids;
  options_.end_ids = {all[3]};
  const size_t at = std::ranges::find(all, all[3]) - all.begin();
  Session second = session();
  const GenerateResult ended = must(second.generate(prompt, options_, ignore()));
  EXPECT_EQ(ended.reason, StopReason::kEndOfGeneration);
  EXPECT_EQ(ended.token_ids.size(), at);
}

TEST_F(Generation, ReusesWhatItHasInCommonWithTheLastPrompt) {
  const std::vector<int32_t> prompt = random_tokens(40, kVocab, 3);
  Session chat = session();
  const GenerateResult first = must(chat.generate(prompt, options_, ignore()));
  std::vector<int32_t> longer = prompt;
  longer.insert(longer.end(), first.token_ids.begin(), first.token_ids.end());
  longer.push_back(5);
  const GenerateResult second = must(chat.generate(longer, options_, ignore()));
  EXPECT_EQ(second.stats.reused_tokens, 59);
  EXPECT_EQ(second.stats.prefill_tokens, 2);

  // Another ending: what is shared with a closed page is computed again, and nothing else changes.
  std::vector<int32_t> other(prompt.begin(), prompt.begin() + 20);
  other.push_back(9);
  const GenerateResult again = must(chat.generate(other, options_, ignore()));
  EXPECT_EQ(again.stats.reused_tokens, 16);
  Session fresh = session();
  EXPECT_EQ(must(fresh.generate(other, options_, ignore())).token_ids, again.token_ids);
}

TEST_F(Generation, TheSamePromptAgainGivesTheSame) {
  const std::vector<int32_t> prompt = random_tokens(33, kVocab, 4);
  Session chat = session();
  const auto first = must(chat.generate(prompt, options_, ignore()));
  const auto second = must(chat.generate(prompt, options_, ignore()));
  EXPECT_EQ(first.token_ids, second.token_ids);
  EXPECT_EQ(second.stats.reused_tokens, 32);
}

TEST_F(Generation, AFullContextSaysSo) {
  options_.max_tokens = -1;
  Session chat = session();
  const std::vector<int32_t> prompt = random_tokens(80, kVocab, 5);
  const GenerateResult full = must(chat.generate(prompt, options_, ignore()));
  EXPECT_EQ(full.reason, StopReason::kContextFull);
  EXPECT_EQ(full.stats.context_tokens, 96);
  EXPECT_EQ(full.token_ids.size(), 17u);

  const Result<GenerateResult> long_prompt =
      chat.generate(random_tokens(97, kVocab, 6), options_, ignore());
  ASSERT_FALSE(long_prompt);
  EXPECT_EQ(long_prompt.error().code(), ErrorCode::kResourceExhausted);
}

TEST_F(Generation, AShiftedContextIsComputedAnew) {
  options_.max_tokens = 30;
  options_.context_shift = true;
  options_.keep_tokens = 4;
  Session chat = session();
  const std::vector<int32_t> prompt = random_tokens(90, kVocab, 7);
  const GenerateResult shifted = must(chat.generate(prompt, options_, ignore()));
  EXPECT_EQ(shifted.token_ids.size(), 30u);
  EXPECT_EQ(shifted.stats.context_shifts, 1);
  // 96 tokens were in: the first 4 and the last 46 stayed.
  std::vector<int32_t> kept(prompt.begin(), prompt.begin() + 4);
  std::vector<int32_t> all = prompt;
  all.insert(all.end(), shifted.token_ids.begin(), shifted.token_ids.begin() + 6);
  kept.insert(kept.end(), all.end() - 46, all.end());
  kept.push_back(shifted.token_ids[6]);
  options_.max_tokens = 23;
  Session fresh = session();
  const GenerateResult again = must(fresh.generate(kept, options_, ignore()));
  EXPECT_EQ(again.token_ids,
            std::vector<int32_t>(shifted.token_ids.begin() + 7, shifted.token_ids.end()));
}

TEST_F(Generation, CancellationKeepsWhatWasSaid) {
  std::atomic<bool> cancel = false;
  options_.cancel = &cancel;
  Session chat = session();
  int count = 0;
  const GenerateResult result =
      must(chat.generate(random_tokens(10, kVocab, 8), options_, [&](int32_t) {
        cancel = ++count == 5;
        return Status();
      }));
  EXPECT_EQ(result.reason, StopReason::kCancelled);
  EXPECT_EQ(result.token_ids.size(), 5u);
  must(cache_->check_integrity());
}

TEST_F(Generation, AnErrorOfTheCallbackEndsIt) {
  Session chat = session();
  const Result<GenerateResult> result =
      chat.generate(random_tokens(10, kVocab, 9), options_,
                    [](int32_t) { return Error(ErrorCode::kIoError, "the pipe is closed"); });
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().code(), ErrorCode::kIoError);
}

TEST_F(Generation, SessionsGiveTheirSequenceBack) {
  for (int i = 0; i < 5; ++i) {
    Session chat = session();
    must(chat.generate(random_tokens(40, kVocab, 10), options_, ignore()));
  }
  EXPECT_EQ(cache_->bytes().tokens_now, 0);
  must(cache_->check_integrity());
}

TEST_F(Generation, AnEmptyPromptIsAnError) {
  Session chat = session();
  EXPECT_FALSE(chat.generate({}, options_, ignore()));
}

TEST_F(Generation, AdoptsPagesThatOthersPutIntoTheCache) {
  const std::vector<int32_t> prompt = random_tokens(40, kVocab, 3);
  Session first = session();
  const GenerateResult cold = must(first.generate(prompt, options_, ignore()));
  std::vector<cache::HeldPage> pages;
  for (int64_t page = 0; page < 2; ++page)
    pages.push_back(must(cache_->hold_page(first.sequence(), page)));
  const std::vector<const cache::HeldPage*> both = {&pages[0], &pages[1]};

  Session second = session();
  EXPECT_EQ(second.adopt(std::span(prompt).first(32)).error().code(), ErrorCode::kInvalidArgument);
  must(cache_->attach_pages(second.sequence(), both));
  EXPECT_FALSE(second.adopt(std::span(prompt).first(31)));
  must(second.adopt(std::span(prompt).first(32)));
  EXPECT_FALSE(second.adopt(std::span(prompt).first(32))) << "it is not empty any more";
  const GenerateResult warm = must(second.generate(prompt, options_, ignore()));
  EXPECT_EQ(warm.token_ids, cold.token_ids);
  EXPECT_EQ(warm.stats.reused_tokens, 32);
}

}  // namespace
}  // namespace kvant::model
