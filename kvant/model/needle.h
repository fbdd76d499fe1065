// Needle retrieval: facts hidden in a long text, and which answer a model finds most likely.
//
// Tasks in the style of RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3 "needle in a
// haystack"; "style" because the haystack and the way of scoring differ). Answers are not generated
// but scored by likelihood among eight candidates, which works for small models and has less
// variance. Everything follows from the seed, on every platform.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/cache/kv_cache.h"
#include "kvant/model/model.h"
#include "kvant/model/tokenizer.h"

namespace kvant::model {

enum class NeedleTask {
  kSingle,      // one number in the text; the other candidates are not in it
  kMultiKey,    // eight numbers in the text, each of its own key; one is asked for
  kMultiValue,  // two keys in the text with four numbers each; those of one are asked for
};
std::string_view needle_task_name(NeedleTask task);  // "single", "multi-key", "multi-value"
std::optional<NeedleTask> find_needle_task(std::string_view name);
inline constexpr NeedleTask kAllNeedleTasks[] = {NeedleTask::kSingle, NeedleTask::kMultiKey,
                                                 NeedleTask::kMultiValue};
inline constexpr int kNeedleCandidates = 8;

// One question: a prompt that ends where the answer begins, and possible answers.
struct NeedleSample {
  std::vector<int32_t> prompt;
  std::vector<std::vector<int32_t>> candidates;  // [8], at least one token each
  std::vector<uint8_t> right;                    // [8], 1: is an answer
  int64_t tokens() const;                        // of the prompt with its longest candidate
};

// Thread-safe once created; the tokenizer must outlive it.
class NeedleMaker {
 public:
  // `haystack` is prose; it is used from a random sentence on and repeated where it is too short.
  // kInvalidArgument unless it has a few sentences.
  static Result<NeedleMaker> create(const Tokenizer& tokenizer, std::string_view haystack);

  struct Request {
    NeedleTask task = NeedleTask::kSingle;
    int64_t length = 1024;  // tokens of prompt and answer: at most, and less by about a sentence
    int sample = 0;         // 0 .. num_samples - 1
    int num_samples = 1;    // of `single`: its depths are spread evenly
    uint64_t seed = 0;
  };
  // kInvalidArgument if the length is too small for the question.
  Result<NeedleSample> make(const Request& request) const;

 private:
  struct Sentence {
    std::string text;  // with the space or newline after it
    int64_t tokens = 0;
  };
  NeedleMaker(const Tokenizer& tokenizer) : tokenizer_(&tokenizer) {}
  Result<std::vector<int32_t>> encode(std::string_view text) const;
  Result<NeedleSample> tokenize(const std::string& prompt, const std::vector<std::string>& answers,
                                size_t num_right) const;
  const Tokenizer* tokenizer_;
  std::vector<Sentence> sentences_;
};

struct NeedleScore {
  std::vector<double> log_probs;  // of each candidate, nats
  double accuracy = 0;            // share of the right ones among the as many most likely ones
  double nll = 0;                 // mean of -log p of the right ones
};

// Sizes for score_needle() with samples of at most `length` tokens: changes sequences, context and
// total tokens of `runtime`.
void size_for_needles(RuntimeOptions& runtime, int64_t length);

// Reads the prompt into a new sequence of the cache, whose forks take the candidates all at once,
// and removes them. `on_tokens` (may be empty) is called after each step with the prompt's tokens
// that it took. Errors of Model::forward() and of on_tokens.
Result<NeedleScore> score_needle(Model& model, cache::KvCache& cache, const NeedleSample& sample,
                                 const std::function<Status(int64_t)>& on_tokens = {},
                                 const std::atomic<bool>* cancel = nullptr);

}  // namespace kvant::model
