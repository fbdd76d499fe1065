#include "kvant/serve/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <stdexcept>

#include "kvant/base/check.h"
#include "kvant/model/generate.h"
#include "kvant/model/testing/engine.h"
#include "kvant/model/testing/tiny_models.h"
#include "kvant/serve/testing/collector.h"

namespace kvant::serve {
namespace {

using model::testing::must;
using model::testing::random_tokens;
using testing::Collector;
using Ids = std::vector<int32_t>;

constexpr int kVocab = 64;

// One engine over a model of its own.
struct Served {
  explicit Served(const EngineOptions& options, const std::string& architecture = "llama")
      : model(model::testing::tiny_model(architecture), "cpu"),
        engine(must(Engine::create(model.model(), options))) {}

  std::shared_ptr<Collector> submit(Request request, std::shared_ptr<Collector> collector = {}) {
    if (collector == nullptr) collector = std::make_shared<Collector>();
    request.listener = collector;
    last_number = must(engine->submit(std::move(request)));
    return collector;
  }
  // Nothing is used by requests any more, and the cache is whole.
  void expect_at_rest() {
    must(engine->run_between_steps([](cache::KvCache& cache, cache::PrefixTree* tree) {
      EXPECT_TRUE(cache.check_integrity()) << cache.check_integrity().error().message();
      EXPECT_EQ(cache.bytes().tokens_now, 0);
      if (tree == nullptr) return;
      EXPECT_TRUE(tree->check_invariants()) << tree->check_invariants().error().message();
      EXPECT_EQ(tree->stats().leased_nodes, 0);
    }));
    EXPECT_EQ(engine->stats().running, 0);
    EXPECT_EQ(engine->stats().pages_used, 0);
  }

  model::testing::Engine model;
  std::unique_ptr<Engine> engine;
  RequestNumber last_number = 0;
};

EngineOptions small_options(std::string_view kv) {
  EngineOptions options;
  options.runtime = model::testing::small_runtime(kv);
  options.runtime.max_sequences = 16;
  options.runtime.max_step_tokens = 64;
  options.runtime.total_tokens = 2048;
  options.runtime.held_sink_pages = 32;
  options.runtime.held_windows = 32;
  return options;
}

Request greedy(Ids prompt, int max_tokens) {
  Request request;
  request.prompt = std::move(prompt);
  request.sampling.temperature = 0;
  request.sampling.max_tokens = max_tokens;
  return request;
}

// What a plain session answers.
Ids session_answer(std::string_view kv, const std::string& architecture, const Ids& prompt,
                   int max_tokens) {
  model::testing::Engine engine(model::testing::tiny_model(architecture), "cpu");
  const auto cache = engine.cache(model::testing::small_runtime(kv));
  model::Session session = must(model::Session::create(engine.model(), *cache));
  model::GenerateOptions options;
  options.sampler.temperature = 0;
  options.max_tokens = max_tokens;
  return must(session.generate(prompt, options, [](int32_t) { return Status(); })).token_ids;
}

// ---- the same answer, whatever happens around it ----

class SameAnswer : public ::testing::TestWithParam<std::tuple<std::string, std::string>> {
 protected:
  const std::string architecture = std::get<0>(GetParam());
  const std::string kv = std::get<1>(GetParam());
};

TEST_P(SameAnswer, AsAPlainSession) {
  Served served(small_options(kv), architecture);
  const Ids prompt = random_tokens(75, kVocab, 1);
  const auto answer = served.submit(greedy(prompt, 40));
  EXPECT_EQ(answer->wait().reason, FinishReason::kLength);
  EXPECT_EQ(answer->ids(), session_answer(kv, architecture, prompt, 40));
  EXPECT_EQ(answer->wait().output_tokens, 40);
  served.expect_at_rest();
}

TEST_P(SameAnswer, FromThePrefixCache) {
  Served served(small_options(kv), architecture);
  const Ids prompt = random_tokens(75, kVocab, 2);
  const auto cold = served.submit(greedy(prompt, 40));
  EXPECT_EQ(cold->wait().cached_tokens, 0);
  const auto warm = served.submit(greedy(prompt, 40));
  EXPECT_EQ(warm->wait().cached_tokens, 64);
  EXPECT_EQ(warm->prompt().cached_tokens, 64);
  EXPECT_EQ(warm->ids(), cold->ids());
  // Answers are cached as prompts are.
  Ids longer = prompt;
  longer.insert(longer.end(), cold->ids().begin(), cold->ids().end());
  const auto next = served.submit(greedy(longer, 8));
  EXPECT_EQ(next->wait().cached_tokens, 112);
  EXPECT_EQ(next->ids(), session_answer(kv, architecture, longer, 8));
  served.expect_at_rest();
}

TEST_P(SameAnswer, InABatchWithPreemption) {
  EngineOptions options = small_options(kv);
  options.runtime.total_tokens = 512;  // a few of the sixteen at a time
  options.runtime.held_sink_pages = 4;
  options.runtime.held_windows = 4;
  Served served(options, architecture);
  std::vector<std::shared_ptr<Collector>> answers;
  std::vector<Ids> prompts;
  // At once, so that what happens does not depend on threads.
  must(served.engine->run_between_steps([&](cache::KvCache&, cache::PrefixTree*) {
    for (uint32_t i = 0; i < 16; ++i) {
      prompts.push_back(random_tokens(5 + 3 * i, kVocab, 100 + i));
      answers.push_back(served.submit(greedy(prompts.back(), 60)));
    }
  }));
  for (size_t i = 0; i < answers.size(); ++i) {
    EXPECT_EQ(answers[i]->wait().reason, FinishReason::kLength);
    if (i % 5 == 0) {
      EXPECT_EQ(answers[i]->ids(), session_answer(kv, architecture, prompts[i], 60)) << i;
    }
  }
  EXPECT_GT(served.engine->stats().preemptions, 0);
  served.expect_at_rest();
}

TEST_P(SameAnswer, WithDrafts) {
  EngineOptions options = small_options(kv);
  options.speculation.max_draft_tokens = 6;
  options.speculation.lookup.min_ngram = 1;
  Served served(options, architecture);
  const Ids prompt = random_tokens(30, kVocab, 4);
  const auto answer = served.submit(greedy(prompt, 150));
  const FinishRecord& record = answer->wait();
  EXPECT_EQ(answer->ids(), session_answer(kv, architecture, prompt, 150));
  EXPECT_GT(record.drafted_tokens, 0);
  EXPECT_GE(record.drafted_tokens, record.accepted_tokens);
  served.expect_at_rest();
}

INSTANTIATE_TEST_SUITE_P(Engines, SameAnswer,
                         ::testing::Combine(::testing::Values("llama", "gemma3"),
                                            ::testing::Values("bf16", "4bit", "nvfp4", "fp8",
                                                              "k=int8+mean,v=mxfp4")),
                         [](const auto& instance) {
                           std::string name = std::get<0>(instance.param);
                           name.push_back('_');
                           for (const char c : std::get<1>(instance.param)) {
                             name.push_back(std::isalnum(static_cast<unsigned char>(c)) != 0 ? c
                                                                                             : '_');
                           }
                           return name;
                         });

// ---- sharing ----

TEST(Engine, RequestsThatComeTogetherShareTheirPrompt) {
  Served served(small_options("4bit"));
  const Ids prompt = random_tokens(100, kVocab, 5);
  std::vector<std::shared_ptr<Collector>> answers;
  for (int i = 0; i < 4; ++i) answers.push_back(served.submit(greedy(prompt, 4)));
  int64_t cached = 0;
  for (const auto& answer : answers) {
    cached += answer->wait().cached_tokens;
    EXPECT_EQ(answer->ids(), answers[0]->ids());
  }
  EXPECT_EQ(cached, 3 * 96);
}

TEST(Engine, SaltsSeparateTenants) {
  Served served(small_options("4bit"));
  const Ids prompt = random_tokens(100, kVocab, 5);
  for (const char salt : {'a', 'b', 'a'}) {
    Request request = greedy(prompt, 2);
    request.cache_salt.push_back(salt);
    request.tenant.push_back(salt);
    const auto answer = served.submit(std::move(request));
    const bool again = served.last_number == 3;
    EXPECT_EQ(answer->wait().cached_tokens, again ? 96 : 0);
  }
}

TEST(Engine, ResetForgetsPrefixes) {
  Served served(small_options("4bit"));
  const Ids prompt = random_tokens(100, kVocab, 5);
  served.submit(greedy(prompt, 2))->wait();
  must(served.engine->reset_prefix_cache());
  EXPECT_EQ(served.engine->stats().tree.nodes, 0);
  EXPECT_EQ(served.submit(greedy(prompt, 2))->wait().cached_tokens, 0);
}

TEST(Engine, NothingIsSharedWithoutPrefixCaching) {
  EngineOptions options = small_options("4bit");
  options.prefix_caching = false;
  Served served(options);
  const Ids prompt = random_tokens(100, kVocab, 5);
  const auto first = served.submit(greedy(prompt, 8));
  first->wait();
  const auto second = served.submit(greedy(prompt, 8));
  EXPECT_EQ(second->wait().cached_tokens, 0);
  EXPECT_EQ(second->ids(), first->ids());
  served.expect_at_rest();
}

// ---- sampling ----

TEST(Engine, SeedsDecideWhateverRunsBeside) {
  const auto sampled = [](int neighbours) {
    Served served(small_options("nvfp4"));
    for (int i = 0; i < neighbours; ++i) {
      Request other = greedy(random_tokens(20, kVocab, 7 + static_cast<uint32_t>(i)), 30);
      other.sampling.temperature = 1;
      served.submit(std::move(other));
    }
    Request request = greedy(random_tokens(20, kVocab, 3), 30);
    request.sampling.temperature = 1.5;
    request.sampling.seed = 42;
    const auto answer = served.submit(std::move(request));
    answer->wait();
    return answer->ids();
  };
  const Ids alone = sampled(0);
  EXPECT_EQ(sampled(0), alone);
  EXPECT_EQ(sampled(7), alone);
}

// Only these of the vocabulary's first 32 tokens, whichever came before.
class Allowing : public TokenConstraint, public ConstraintSource {
 public:
  explicit Allowing(uint32_t mask) : mask_(mask) {}
  void allowed(std::span<uint32_t> bitmask) override {
    std::ranges::fill(bitmask, 0u);
    bitmask[0] = mask_;
  }
  bool accept(int32_t token) override { return token < 32 && (mask_ >> token & 1) != 0; }
  bool is_complete() const override { return false; }
  std::unique_ptr<TokenConstraint> clone() const override {
    return std::make_unique<Allowing>(mask_);
  }
  std::unique_ptr<TokenConstraint> create() const override { return clone(); }

 private:
  const uint32_t mask_;
};

// Every kind of choice side by side in one step.
TEST(Engine, ThreadsThatSampleDoNotChangeATokenOrALogProbability) {
  const auto answers_of = [](int threads) {
    EngineOptions options = small_options("4bit");
    options.sampling_threads = threads;
    options.runtime.max_logit_rows = 16;
    options.speculation.max_draft_tokens = 2;
    Served served(options);
    std::vector<std::shared_ptr<Collector>> answers;
    must(served.engine->run_between_steps([&](cache::KvCache&, cache::PrefixTree*) {
      for (uint32_t i = 0; i < 24; ++i) {
        Request request = greedy(random_tokens(6 + i, kVocab, 60 + i), 40);
        SamplingParams& sampling = request.sampling;
        sampling.seed = i;
        if (i % 2 == 0) sampling.temperature = 1.2f;
        if (i % 3 == 0) sampling.top_p = 0.8f;
        if (i % 4 == 1) sampling.logprobs = 3;
        if (i % 5 == 2) sampling.repetition_penalty = 1.3f;
        if (i % 6 == 4) sampling.prompt_logprobs = 2;
        if (i % 6 == 5) sampling.min_tokens = 7;
        if (i % 8 == 3) request.constraint = std::make_shared<Allowing>(0xf0f0u << (i / 8));
        answers.push_back(served.submit(std::move(request)));
      }
    }));
    std::vector<std::pair<Ids, std::vector<float>>> found;
    for (const auto& answer : answers) {
      EXPECT_EQ(answer->wait().reason, FinishReason::kLength);
      std::vector<float> logprobs;
      for (const SampledToken& token : answer->tokens()) logprobs.push_back(token.logprob);
      for (const SampledToken& token : answer->prompt().logprobs) logprobs.push_back(token.logprob);
      found.emplace_back(answer->ids(), logprobs);
    }
    served.expect_at_rest();
    return found;
  };
  const auto one = answers_of(1);
  EXPECT_EQ(answers_of(3), one);
  EXPECT_EQ(answers_of(7), one);
}

TEST(Engine, LogProbabilitiesOfPromptAndAnswer) {
  Served served(small_options("bf16"));
  const Ids prompt = random_tokens(90, kVocab, 8);  // more than one step
  served.submit(greedy(prompt, 1))->wait();         // a hit would hide the logits
  Request request = greedy(prompt, 5);
  request.sampling.logprobs = 3;
  request.sampling.prompt_logprobs = 2;
  const auto answer = served.submit(std::move(request));
  EXPECT_EQ(answer->wait().cached_tokens, 0);
  ASSERT_EQ(answer->prompt().logprobs.size(), prompt.size());
  model::testing::Engine engine(model::testing::tiny_model("llama"), "cpu");
  const auto cache = engine.cache(model::testing::small_runtime("bf16"));
  const auto rows = engine.logits(*cache, must(cache->add_sequence()), prompt, prompt.size());
  const auto logprob = [&](size_t row, int32_t id) {
    double sum = 0;
    for (const float logit : rows[row]) sum += std::exp(static_cast<double>(logit));
    return static_cast<double>(rows[row][static_cast<size_t>(id)]) - std::log(sum);
  };
  for (size_t i = 1; i < prompt.size(); ++i) {
    const SampledToken& token = answer->prompt().logprobs[i];
    EXPECT_EQ(token.id, prompt[i]);
    EXPECT_EQ(token.top.size(), 2u);
    EXPECT_NEAR(token.logprob, logprob(i - 1, prompt[i]), 1e-4);
  }
  const SampledToken& first = answer->tokens()[0];
  EXPECT_NEAR(first.logprob, logprob(prompt.size() - 1, first.id), 1e-4);
  ASSERT_EQ(first.top.size(), 3u);
  EXPECT_EQ(first.top[0].first, first.id);
}

TEST(Engine, APromptCanBeScoredWithoutAnAnswer) {
  Served served(small_options("4bit"));
  const Ids prompt = random_tokens(20, kVocab, 8);
  Request request = greedy(prompt, 0);
  request.sampling.prompt_logprobs = 0;
  const auto scored = served.submit(std::move(request));
  EXPECT_EQ(scored->wait().reason, FinishReason::kLength);
  EXPECT_EQ(scored->prompt().logprobs.size(), prompt.size());
  EXPECT_TRUE(scored->ids().empty());
}

// ---- ends ----

TEST(Engine, EndTokensEndUnlessIgnored) {
  const Ids prompt = random_tokens(20, kVocab, 9);
  const Ids answer = session_answer("4bit", "llama", prompt, 20);
  const auto first = std::ranges::find(answer, answer[5]) - answer.begin();
  EngineOptions options = small_options("4bit");
  options.end_ids = {answer[5]};
  Served served(options);
  const auto ended = served.submit(greedy(prompt, 20));
  EXPECT_EQ(ended->wait().reason, FinishReason::kStop);
  EXPECT_EQ(ended->wait().stop_token, answer[5]);
  EXPECT_EQ(static_cast<std::ptrdiff_t>(ended->ids().size()), first + 1);
  Request request = greedy(prompt, 20);
  request.sampling.ignore_eos = true;
  const auto ignored = served.submit(std::move(request));
  EXPECT_EQ(ignored->wait().reason, FinishReason::kLength);
  EXPECT_EQ(ignored->ids(), answer);
}

TEST(Engine, ListenersAndStopTokensEnd) {
  Served served(small_options("4bit"));
  const Ids prompt = random_tokens(20, kVocab, 9);
  const auto three =
      served.submit(greedy(prompt, 20),
                    std::make_shared<Collector>([](const Ids& ids) { return ids.size() < 3; }));
  EXPECT_EQ(three->wait().reason, FinishReason::kStop);
  EXPECT_EQ(three->ids().size(), 3u);
  Request request = greedy(prompt, 20);
  request.sampling.stop_token_ids = {three->ids()[1]};
  const auto stopped = served.submit(std::move(request));
  EXPECT_EQ(stopped->wait().stop_token, three->ids()[1]);
}

TEST(Engine, TheLongestSequenceEndsAnAnswer) {
  Served served(small_options("4bit"));
  Request request = greedy(random_tokens(200, kVocab, 9), 0);
  request.sampling.max_tokens.reset();
  const auto answer = served.submit(std::move(request));
  EXPECT_EQ(answer->wait().reason, FinishReason::kLength);
  EXPECT_EQ(answer->ids().size(), 56u);  // 256 in all
}

TEST(Engine, CancellationFreesPages) {
  Served served(small_options("4bit"));
  std::vector<std::shared_ptr<Collector>> answers;
  std::vector<RequestNumber> numbers;
  for (uint32_t i = 0; i < 30; ++i) {
    answers.push_back(served.submit(greedy(random_tokens(30, kVocab, i), 200)));
    numbers.push_back(served.last_number);
  }
  answers[0]->wait_for_tokens(2);
  for (const RequestNumber number : numbers) served.engine->cancel(number);
  served.engine->cancel(999);
  for (const auto& answer : answers) EXPECT_EQ(answer->wait().reason, FinishReason::kCancelled);
  served.expect_at_rest();
}

TEST(Engine, DeadlinesPass) {
  Served served(small_options("4bit"));
  Request request = greedy(random_tokens(30, kVocab, 1), 200);
  request.deadline = Clock::now();
  EXPECT_EQ(served.submit(std::move(request))->wait().reason, FinishReason::kDeadline);
}

TEST(Engine, DrainFinishesAndThenRefuses) {
  Served served(small_options("4bit"));
  const auto answer = served.submit(greedy(random_tokens(30, kVocab, 1), 30));
  served.engine->drain(std::chrono::minutes(1));
  EXPECT_EQ(answer->wait().reason, FinishReason::kLength);
  Request late = greedy(random_tokens(30, kVocab, 1), 30);
  late.listener = std::make_shared<Collector>();
  const auto refused = served.engine->submit(std::move(late));
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), ErrorCode::kCancelled);
}

TEST(Engine, DestructionEndsWhatRuns) {
  std::shared_ptr<Collector> answer;
  {
    Served served(small_options("4bit"));
    answer = served.submit(greedy(random_tokens(30, kVocab, 1), 200));
  }
  EXPECT_TRUE(answer->finished());
}

// ---- what must not happen ----

// Throws at its `last` token.
class Thrower : public Collector {
 public:
  explicit Thrower(size_t last) : last_(last) {}
  bool on_token(const SampledToken& token, bool ends) override {
    Collector::on_token(token, ends);
    if (ids().size() == last_) throw std::runtime_error("no");
    return true;
  }

 private:
  const size_t last_;
};

TEST(Engine, AListenerThatThrowsEndsItsOwnRequest) {
  Served served(small_options("4bit"));
  const auto other = served.submit(greedy(random_tokens(20, kVocab, 2), 40));
  const auto thrower =
      served.submit(greedy(random_tokens(20, kVocab, 1), 40), std::make_shared<Thrower>(3));
  EXPECT_EQ(thrower->wait().reason, FinishReason::kError);
  EXPECT_EQ(other->wait().reason, FinishReason::kLength);
  served.expect_at_rest();
}

// Throws after so many steps: a bug of the engine's own.
class Failing : public EngineObserver {
 public:
  void on_step(const StepRecord&) override {
    if (++steps_ == 3) throw InternalError("broken");
  }

 private:
  int steps_ = 0;
};

TEST(Engine, AFailureOfItsOwnTellsEverybodyAndRefuses) {
  model::testing::Engine model(model::testing::tiny_model("llama"), "cpu");
  Failing failing;
  const auto engine = must(Engine::create(model.model(), small_options("4bit"), &failing));
  std::vector<std::shared_ptr<Collector>> answers;
  for (uint32_t i = 0; i < 20; ++i) {
    Request request = greedy(random_tokens(20, kVocab, i), 40);
    request.listener = answers.emplace_back(std::make_shared<Collector>());
    if (!engine->submit(std::move(request))) answers.pop_back();
  }
  for (const auto& answer : answers) {
    ASSERT_TRUE(answer->wait().error);
    EXPECT_EQ(answer->wait().error->code(), ErrorCode::kInternal);
  }
  Request late = greedy({1}, 1);
  late.listener = std::make_shared<Collector>();
  EXPECT_EQ(engine->submit(std::move(late)).error().code(), ErrorCode::kInternal);
  EXPECT_TRUE(engine->draining());
  EXPECT_FALSE(engine->reset_prefix_cache());
  engine->drain(std::chrono::seconds(1));
}

// ---- refusals ----

TEST(Engine, RefusesWhatCannotBeServed) {
  EngineOptions options = small_options("4bit");
  options.max_waiting = 2;
  Served served(options);
  const auto refusal = [&](Request request) {
    request.listener = std::make_shared<Collector>();
    return served.engine->submit(std::move(request)).error();
  };
  EXPECT_EQ(refusal(greedy({}, 4)).code(), ErrorCode::kInvalidArgument);
  EXPECT_EQ(refusal(greedy({kVocab}, 4)).code(), ErrorCode::kInvalidArgument);
  EXPECT_EQ(refusal(greedy(Ids(256, 1), 4)).code(), ErrorCode::kInvalidArgument);
  Request bad = greedy({1}, 4);
  bad.sampling.top_p = 2;
  EXPECT_EQ(refusal(std::move(bad)).code(), ErrorCode::kInvalidArgument);
  must(served.engine->run_between_steps([&](cache::KvCache&, cache::PrefixTree*) {
    served.submit(greedy({1}, 4));
    served.submit(greedy({1}, 4));
    EXPECT_EQ(refusal(greedy({1}, 4)).code(), ErrorCode::kResourceExhausted);
  }));
}

TEST(Engine, RefusesOptionsThatContradict) {
  model::testing::Engine model(model::testing::tiny_model("llama"), "cpu");
  EngineOptions options = small_options("4bit");
  options.runtime.max_step_tokens = 8;
  EXPECT_FALSE(Engine::create(model.model(), options));
  options = small_options("4bit");
  options.runtime.total_tokens = 100;
  EXPECT_FALSE(Engine::create(model.model(), options));
  options = small_options("k=nvfp4,v=nvfp4+recent64");
  EXPECT_FALSE(Engine::create(model.model(), options));
  options.prefix_caching = false;
  EXPECT_TRUE(Engine::create(model.model(), options));
}

// ---- anything goes ----

TEST(Engine, RandomTrafficLeavesNothingBehind) {
  EngineOptions options = small_options("4bit");
  options.runtime.total_tokens = 400;
  options.runtime.held_sink_pages = 3;
  options.runtime.held_windows = 3;
  options.speculation.max_draft_tokens = 3;
  Served served(options, "gemma3");
  std::mt19937 random(11);
  const Ids shared = random_tokens(200, kVocab, 77);
  std::vector<std::shared_ptr<Collector>> answers;
  for (int i = 0; i < 150; ++i) {
    Ids prompt(shared.begin(), shared.begin() + random() % 200);
    const Ids own = random_tokens(1 + random() % 20, kVocab, i);
    prompt.insert(prompt.end(), own.begin(), own.end());
    Request request = greedy(std::move(prompt), static_cast<int>(random() % 30));
    request.sampling.temperature = random() % 2 == 0 ? 0.0f : 1.0f;
    request.priority = static_cast<int>(random() % 3);
    request.tenant.push_back(random() % 2 == 0 ? 'a' : 'b');
    if (random() % 4 == 0) request.sampling.prompt_logprobs = 1;
    answers.push_back(served.submit(std::move(request)));
    if (random() % 3 == 0) served.engine->cancel(1 + random() % served.last_number);
    if (random() % 20 == 0) must(served.engine->reset_prefix_cache());
    if (random() % 10 == 0) answers[random() % answers.size()]->wait();
  }
  for (const auto& answer : answers) {
    const FinishReason reason = answer->wait().reason;
    EXPECT_TRUE(reason == FinishReason::kLength || reason == FinishReason::kCancelled);
    if (reason == FinishReason::kLength && !answer->prompt().logprobs.empty()) {
      EXPECT_EQ(static_cast<int64_t>(answer->prompt().logprobs.size()),
                answer->prompt().prompt_tokens);
    }
  }
  served.expect_at_rest();
}

}  // namespace
}  // namespace kvant::serve
