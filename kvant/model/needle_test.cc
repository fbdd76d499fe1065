#include "kvant/model/needle.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "kvant/model/eval_stats.h"
#include "kvant/model/testing/engine.h"
#include "kvant/model/testing/tiny_models.h"

namespace kvant::model {
namespace {

using testing::Engine;
using testing::must;

constexpr std::string_view kHaystack =
    "It was a quiet year. Nobody came to the house! Was the bell broken? It was not.\n\n"
    "In spring the river rose. The mill stood still for nine days. Then it turned again. "
    "Swallows came back to the barn. A letter arrived, and was not opened. "
    "The apples were small that autumn. Snow fell early.";

std::vector<std::byte> model_file() {
  return testing::tiny_model("llama", {.vocab = 100, .context = 2048, .tokenizer = true});
}

class Needle : public ::testing::Test {
 protected:
  Needle() : tokenizer_(must(Tokenizer::create(must(Gguf::parse(file_, "test"))))) {}
  NeedleMaker maker() const { return must(NeedleMaker::create(tokenizer_, kHaystack)); }
  std::string text(const std::vector<int32_t>& ids) const { return must(tokenizer_.decode(ids)); }
  // Numbers of seven digits.
  static std::set<std::string> numbers(const std::string& text) {
    std::set<std::string> found;
    for (size_t i = 0; i + 7 <= text.size(); ++i) {
      const std::string part = text.substr(i, 7);
      if (part.find_first_not_of("0123456789") == part.npos) found.insert(part);
    }
    return found;
  }

  std::vector<std::byte> file_ = model_file();
  Tokenizer tokenizer_;
};

TEST_F(Needle, HidesTheRightNumbers) {
  for (const NeedleTask task : kAllNeedleTasks) {
    const NeedleSample sample =
        must(maker().make({.task = task, .length = 1800, .sample = 1, .num_samples = 3}));
    EXPECT_LE(sample.tokens(), 1800);
    EXPECT_GT(sample.tokens(), 1800 - 80);  // a sentence is missing at most
    ASSERT_EQ(sample.candidates.size(), 8u);
    const std::string prompt = text(sample.prompt);
    const std::set<std::string> hidden = numbers(prompt);
    const size_t num_right = task == NeedleTask::kMultiValue ? 4 : 1;
    EXPECT_EQ(std::count(sample.right.begin(), sample.right.end(), 1), num_right);
    EXPECT_EQ(hidden.size(), task == NeedleTask::kSingle ? 1u : 8u);
    const size_t question = prompt.find("Question: ");
    ASSERT_NE(question, prompt.npos);
    const size_t the = prompt.rfind(" for the ");
    const std::string key = prompt.substr(the + 9, prompt.rfind(" is") - the - 9);
    EXPECT_TRUE(prompt.ends_with(key + " is"));
    for (size_t i = 0; i < 8; ++i) {
      const std::string answer = text(sample.candidates[i]);
      EXPECT_EQ(answer.size(), 8u) << answer;  // a space and seven digits
      const std::string value = answer.substr(1);
      EXPECT_EQ(hidden.count(value),
                sample.right[i] != 0 || num_right == 4 || task == NeedleTask::kMultiKey);
      const size_t said = prompt.find("numbers for the " + key + " is " + value + ". ");
      EXPECT_EQ(said != prompt.npos && said < question, sample.right[i] != 0) << value;
    }
  }
}

TEST_F(Needle, DependsOnSeedAndSampleOnly) {
  const NeedleMaker::Request request = {
      .task = NeedleTask::kMultiKey, .length = 1500, .sample = 2, .num_samples = 4, .seed = 7};
  const NeedleSample sample = must(maker().make(request));
  EXPECT_EQ(must(maker().make(request)).prompt, sample.prompt);
  EXPECT_EQ(must(maker().make(request)).candidates, sample.candidates);
  NeedleMaker::Request longer = request;
  longer.length = 1900;
  EXPECT_EQ(must(maker().make(longer)).candidates, sample.candidates);
  NeedleMaker::Request other = request;
  other.seed = 8;
  EXPECT_NE(must(maker().make(other)).candidates, sample.candidates);
  other = request;
  other.sample = 3;
  EXPECT_NE(must(maker().make(other)).candidates, sample.candidates);
}

TEST_F(Needle, SpreadsSingleNeedlesOverTheText) {
  size_t last = 0;
  for (int i = 0; i < 4; ++i) {
    const NeedleSample sample = must(maker().make({.length = 1500, .sample = i, .num_samples = 4}));
    const std::string prompt = text(sample.prompt);
    const size_t at = prompt.find("One of the special magic numbers");
    ASSERT_NE(at, prompt.npos);
    EXPECT_GT(at, last + 150);
    EXPECT_NEAR(static_cast<double>(at), (i + 0.5) / 4 * 1100 + 160, 150);
    last = at;
  }
}

TEST_F(Needle, SaysWhatIsTooSmall) {
  const auto sample = maker().make({.task = NeedleTask::kMultiKey, .length = 400});
  ASSERT_FALSE(sample);
  EXPECT_EQ(sample.error().code(), ErrorCode::kInvalidArgument);
  EXPECT_NE(sample.error().message().find("multi-key"), std::string::npos);
  const auto few = NeedleMaker::create(tokenizer_, "One. Two. Three.");
  ASSERT_FALSE(few);
  EXPECT_EQ(few.error().code(), ErrorCode::kInvalidArgument);
}

TEST_F(Needle, NamesComeBack) {
  for (const NeedleTask task : kAllNeedleTasks) {
    EXPECT_EQ(find_needle_task(needle_task_name(task)), task);
  }
  EXPECT_FALSE(find_needle_task("double"));
}

// The forks give what each candidate would have after the prompt by itself.
TEST_F(Needle, ScoresAreThoseOfWholeSequences) {
  Engine engine(file_, "cpu", 2);
  const NeedleSample sample = must(maker().make({.task = NeedleTask::kMultiValue, .length = 1200}));
  for (const char* kv : {"bf16", "4bit", "nvfp4+recent64"}) {
    RuntimeOptions runtime = testing::small_runtime(kv);
    size_for_needles(runtime, 1200);
    const auto cache = engine.cache(runtime);
    int64_t tokens = 0;
    const NeedleScore score =
        must(score_needle(engine.model(), *cache, sample, [&](int64_t count) -> Status {
          tokens += count;
          return {};
        }));
    EXPECT_EQ(tokens, static_cast<int64_t>(sample.prompt.size()));
    EXPECT_EQ(cache->bytes().tokens_now, 0);  // nothing is left behind
    must(cache->check_integrity());

    for (const size_t i : {0, 3, 7}) {
      std::vector<int32_t> whole = sample.prompt;
      whole.insert(whole.end(), sample.candidates[i].begin(), sample.candidates[i].end());
      const cache::SequenceId id = must(cache->add_sequence());
      const auto rows = engine.logits(*cache, id, whole, 200);
      cache->remove_sequence(id);
      double sum = 0;
      for (size_t k = sample.prompt.size(); k < whole.size(); ++k) {
        sum += static_cast<double>(rows[k - 1][static_cast<size_t>(whole[k])]) -
               row_softmax(rows[k - 1]).log_sum_exp;
      }
      EXPECT_EQ(score.log_probs[i], sum) << kv << " " << i;
    }
    double right = 0;
    for (size_t i = 0; i < sample.right.size(); ++i) {
      right += sample.right[i] != 0 ? score.log_probs[i] : 0;
    }
    EXPECT_NEAR(score.nll, -right / 4, 1e-9);
    EXPECT_GE(score.accuracy, 0);
    EXPECT_LE(score.accuracy, 1);
  }
}

TEST_F(Needle, LeavesNothingBehindWhenItIsCancelled) {
  Engine engine(file_, "cpu", 1);
  const NeedleSample sample = must(maker().make({.length = 1200}));
  RuntimeOptions runtime = testing::small_runtime("4bit");
  size_for_needles(runtime, 1200);
  const auto cache = engine.cache(runtime);
  const auto stopped = score_needle(engine.model(), *cache, sample, [](int64_t) -> Status {
    return Error(ErrorCode::kCancelled, "stop");
  });
  ASSERT_FALSE(stopped);
  EXPECT_EQ(stopped.error().code(), ErrorCode::kCancelled);
  EXPECT_EQ(cache->bytes().tokens_now, 0);
}

}  // namespace
}  // namespace kvant::model
