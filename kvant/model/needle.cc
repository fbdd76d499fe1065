#include "kvant/model/needle.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <span>
#include <utility>

#include "kvant/base/check.h"
#include "kvant/model/eval_stats.h"
#include "kvant/model/random.h"

namespace kvant::model {
namespace {

constexpr std::array<std::string_view, 3> kTaskNames = {"single", "multi-key", "multi-value"};

// Keys are an adjective and a noun: rare together, of a few ordinary tokens each.
constexpr std::array<std::string_view, 24> kAdjectives = {
    "amber",  "brisk",  "candid", "dusty",  "eager",  "faint",  "gentle", "hollow",
    "icy",    "jolly",  "keen",   "lively", "mellow", "narrow", "opaque", "placid",
    "quaint", "rustic", "silent", "tender", "upbeat", "vivid",  "woolly", "zesty"};
constexpr std::array<std::string_view, 24> kNouns = {
    "anchor", "basket", "candle", "drawer", "engine", "falcon", "garden",  "hammer",
    "island", "jacket", "kettle", "ladder", "mirror", "needle", "orchard", "pencil",
    "quarry", "ribbon", "saddle", "tunnel", "umpire", "violin", "window",  "yacht"};

constexpr int kAnswersOfMultiValue = 4;
constexpr std::string_view kIntroduction =
    "Some special magic numbers are hidden in the following text. Remember them: there will be a "
    "question about them afterwards.\n\n";

int64_t below(SplitMix64& random, int64_t limit) {
  return static_cast<int64_t>(random.next() % static_cast<uint64_t>(limit));
}

std::vector<std::string> draw_keys(SplitMix64& random, size_t count) {
  std::vector<std::string> keys;
  while (keys.size() < count) {
    const auto adjective = kAdjectives[static_cast<size_t>(below(random, kAdjectives.size()))];
    const auto noun = kNouns[static_cast<size_t>(below(random, kNouns.size()))];
    std::string key = fmt::format("{} {}", adjective, noun);
    if (std::find(keys.begin(), keys.end(), key) == keys.end()) keys.push_back(std::move(key));
  }
  return keys;
}

// Seven digits, so that tokenizers cut them all alike.
std::vector<std::string> draw_values(SplitMix64& random) {
  std::vector<std::string> values;
  while (values.size() < kNeedleCandidates) {
    std::string value = std::to_string(1'000'000 + below(random, 9'000'000));
    if (std::find(values.begin(), values.end(), value) == values.end()) {
      values.push_back(std::move(value));
    }
  }
  return values;
}

std::string needle(const std::string& key, const std::string& value) {
  return fmt::format("One of the special magic numbers for the {} is {}. ", key, value);
}

// What a sample says, before it is laid out in the haystack.
struct Content {
  std::vector<std::string> needles;
  std::string question;
  std::vector<std::string> answers;  // right ones first
  size_t num_right = 1;
};

Content make_content(NeedleTask task, SplitMix64& random) {
  Content content;
  content.answers = draw_values(random);
  const size_t num_keys = task == NeedleTask::kMultiKey     ? kNeedleCandidates
                          : task == NeedleTask::kMultiValue ? 2
                                                            : 1;
  const std::vector<std::string> keys = draw_keys(random, num_keys);
  content.question = fmt::format(
      "\n\nQuestion: What is the special magic number for the {0} in the text above?\nAnswer: The "
      "special magic number for the {0} is",
      keys[0]);
  switch (task) {
    case NeedleTask::kSingle: content.needles = {needle(keys[0], content.answers[0])}; break;
    case NeedleTask::kMultiKey:
      for (size_t i = 0; i < keys.size(); ++i) {
        content.needles.push_back(needle(keys[i], content.answers[i]));
      }
      break;
    case NeedleTask::kMultiValue:
      content.num_right = kAnswersOfMultiValue;
      for (size_t i = 0; i < content.answers.size(); ++i) {
        content.needles.push_back(needle(keys[i / kAnswersOfMultiValue], content.answers[i]));
      }
      content.question = fmt::format(
          "\n\nQuestion: What are all the special magic numbers for the {0} in the text above?\n"
          "Answer: One of the special magic numbers for the {0} is",
          keys[0]);
  }
  return content;
}

// Where the needles go: before which sentence each.
std::vector<int64_t> draw_places(const NeedleMaker::Request& request, size_t num_needles,
                                 int64_t num_sentences, SplitMix64& random) {
  if (request.task == NeedleTask::kSingle) {
    return {(2 * request.sample + 1) * num_sentences / (2 * request.num_samples)};
  }
  std::vector<int64_t> places;
  for (size_t i = 0; i < num_needles; ++i) places.push_back(below(random, num_sentences + 1));
  return places;
}

size_t common_prefix(std::span<const int32_t> a, std::span<const int32_t> b) {
  const size_t length = std::min(a.size(), b.size());
  const auto end = a.begin() + static_cast<std::ptrdiff_t>(length);
  return static_cast<size_t>(std::mismatch(a.begin(), end, b.begin()).first - a.begin());
}

// One sentence, with what separates it from the next, off the front of `text`.
std::string_view take_sentence(std::string_view& text) {
  size_t end = 0;
  for (; end < text.size(); ++end) {
    if (text[end] == '\n') break;
    const bool stop = text[end] == '.' || text[end] == '!' || text[end] == '?';
    if (stop && end + 1 < text.size() && text[end + 1] == ' ') {
      ++end;
      break;
    }
  }
  while (end < text.size() && (text[end] == ' ' || text[end] == '\n')) ++end;
  const std::string_view sentence = text.substr(0, end);
  text.remove_prefix(end);
  return sentence;
}

}  // namespace

std::string_view needle_task_name(NeedleTask task) {
  return kTaskNames[static_cast<size_t>(task)];
}

std::optional<NeedleTask> find_needle_task(std::string_view name) {
  for (const NeedleTask task : kAllNeedleTasks) {
    if (needle_task_name(task) == name) return task;
  }
  return std::nullopt;
}

int64_t NeedleSample::tokens() const {
  size_t longest = 0;
  for (const auto& candidate : candidates) longest = std::max(longest, candidate.size());
  return static_cast<int64_t>(prompt.size() + longest);
}

Result<NeedleMaker> NeedleMaker::create(const Tokenizer& tokenizer, std::string_view haystack) {
  NeedleMaker maker(tokenizer);
  while (!haystack.empty()) {
    const std::string_view text = take_sentence(haystack);
    KVANT_ASSIGN(const std::vector<int32_t> ids,
                 tokenizer.encode(text, {.special = SpecialInText::kIgnore}));
    if (ids.empty()) continue;  // bytes that the vocabulary has no token for
    maker.sentences_.push_back({std::string(text), static_cast<int64_t>(ids.size())});
  }
  constexpr size_t kMinSentences = 8;
  if (maker.sentences_.size() < kMinSentences) {
    return Error(ErrorCode::kInvalidArgument,
                 fmt::format("the text to hide needles in has {} sentences; at least {} are needed",
                             maker.sentences_.size(), kMinSentences));
  }
  return maker;
}

Result<std::vector<int32_t>> NeedleMaker::encode(std::string_view text) const {
  return tokenizer_->encode(text, {.bos = Bos::kAsModel, .special = SpecialInText::kIgnore});
}

// Tokens may span the border between prompt and answer: both are encoded together, and the prompt
// is what all of them begin with.
Result<NeedleSample> NeedleMaker::tokenize(const std::string& prompt,
                                           const std::vector<std::string>& answers,
                                           size_t num_right) const {
  NeedleSample sample;
  KVANT_ASSIGN(sample.prompt, encode(prompt));
  for (const std::string& answer : answers) {
    KVANT_ASSIGN(std::vector<int32_t> ids, encode(fmt::format("{} {}", prompt, answer)));
    sample.prompt.resize(common_prefix(sample.prompt, ids));
    sample.candidates.push_back(std::move(ids));
    sample.right.push_back(sample.right.size() < num_right ? 1 : 0);
  }
  const auto length = static_cast<std::ptrdiff_t>(sample.prompt.size());
  for (auto& ids : sample.candidates) {
    ids.erase(ids.begin(), ids.begin() + length);
    KVANT_CHECK(!ids.empty(), "different answers have different tokens");
  }
  return sample;
}

Result<NeedleSample> NeedleMaker::make(const Request& request) const {
  KVANT_CHECK(request.sample >= 0 && request.sample < request.num_samples, "one of the samples");
  // Tasks and samples draw from streams of their own; all lengths share keys and numbers.
  SplitMix64 random(request.seed * 1'000'003 + static_cast<uint64_t>(request.sample) * 8 +
                    static_cast<uint64_t>(request.task));
  const Content content = make_content(request.task, random);
  std::string fixed(kIntroduction);
  for (const std::string& text : content.needles) fixed += text;
  KVANT_ASSIGN(const NeedleSample bare,
               tokenize(fixed + content.question, content.answers, content.num_right));
  int64_t room = request.length - bare.tokens();
  const auto first = static_cast<size_t>(below(random, static_cast<int64_t>(sentences_.size())));
  std::vector<const Sentence*> chosen;
  // Sentences that do not fit are left out; near the end a shorter one often does.
  constexpr int kMaxMisses = 16;
  int misses = 0;
  for (size_t i = first; misses < kMaxMisses; ++i) {
    const Sentence& sentence = sentences_[i % sentences_.size()];
    misses = sentence.tokens > room ? misses + 1 : 0;
    if (misses > 0) continue;
    room -= sentence.tokens;
    chosen.push_back(&sentence);
  }
  const uint64_t places_seed = random.next();
  // Sentences may have a few more tokens together than alone.
  for (; chosen.size() >= 2; chosen.pop_back()) {
    SplitMix64 for_places(places_seed);
    const std::vector<int64_t> places = draw_places(
        request, content.needles.size(), static_cast<int64_t>(chosen.size()), for_places);
    std::string text(kIntroduction);
    for (int64_t at = 0; at <= static_cast<int64_t>(chosen.size()); ++at) {
      for (size_t i = 0; i < places.size(); ++i) {
        if (places[i] == at) text += content.needles[i];
      }
      if (at < static_cast<int64_t>(chosen.size())) text += chosen[static_cast<size_t>(at)]->text;
    }
    while (text.back() == ' ' || text.back() == '\n') text.pop_back();
    KVANT_ASSIGN(NeedleSample sample,
                 tokenize(text + content.question, content.answers, content.num_right));
    if (sample.tokens() <= request.length) return sample;
  }
  return Error(ErrorCode::kInvalidArgument,
               fmt::format("{} tokens are too few for the task {}, whose question alone takes {}",
                           request.length, needle_task_name(request.task), bare.tokens()));
}

void size_for_needles(RuntimeOptions& runtime, int64_t length) {
  runtime.context_tokens = length;
  runtime.max_sequences = 1 + kNeedleCandidates;
  // Forks share the prompt's closed pages; each has an open page, and one that an answer fills.
  runtime.total_tokens = length + int64_t{2} * runtime.max_sequences * runtime.page_tokens;
  runtime.max_logit_rows = std::max(runtime.max_logit_rows, 64);
}

namespace {

// Removes its sequences from the cache at the end.
class Sequences {
 public:
  explicit Sequences(cache::KvCache& cache) : cache_(cache) {}
  ~Sequences() {
    for (const cache::SequenceId id : ids_) cache_.remove_sequence(id);
  }
  Sequences(const Sequences&) = delete;
  Sequences& operator=(const Sequences&) = delete;
  void add(cache::SequenceId id) { ids_.push_back(id); }

 private:
  cache::KvCache& cache_;
  std::vector<cache::SequenceId> ids_;
};

double log_prob(std::span<const float> logits, double log_sum_exp, int32_t token) {
  return static_cast<double>(logits[static_cast<size_t>(token)]) - log_sum_exp;
}

// Ranks by likelihood; of equals the earlier.
NeedleScore rank(std::vector<double> log_probs, std::span<const uint8_t> right) {
  NeedleScore score;
  std::vector<size_t> order(log_probs.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return log_probs[a] > log_probs[b]; });
  const auto num_right = static_cast<size_t>(std::accumulate(right.begin(), right.end(), 0));
  for (size_t i = 0; i < num_right; ++i) score.accuracy += right[order[i]];
  for (size_t i = 0; i < right.size(); ++i) {
    if (right[i] != 0) score.nll -= log_probs[i];
  }
  score.accuracy /= static_cast<double>(num_right);
  score.nll /= static_cast<double>(num_right);
  score.log_probs = std::move(log_probs);
  return score;
}

}  // namespace

Result<NeedleScore> score_needle(Model& model, cache::KvCache& cache, const NeedleSample& sample,
                                 const std::function<Status(int64_t)>& on_tokens,
                                 const std::atomic<bool>* cancel) {
  Sequences sequences(cache);
  KVANT_ASSIGN(const cache::SequenceId prompt, cache.add_sequence());
  sequences.add(prompt);
  std::vector<double> log_probs(sample.candidates.size());
  const LogitsSink first_token = [&](int64_t, std::span<const float> logits) -> Status {
    const double log_sum_exp = row_softmax(logits).log_sum_exp;
    for (size_t i = 0; i < log_probs.size(); ++i) {
      log_probs[i] = log_prob(logits, log_sum_exp, sample.candidates[i][0]);
    }
    return {};
  };
  const auto step = static_cast<size_t>(model.max_step_tokens());
  for (size_t done = 0; done < sample.prompt.size(); done += step) {
    const auto piece =
        std::span(sample.prompt).subspan(done, std::min(step, sample.prompt.size() - done));
    const bool last = done + piece.size() == sample.prompt.size();
    const ForwardSequence part = {prompt, piece, last ? 1 : 0};
    KVANT_TRY(model.forward(std::span(&part, 1), cache, first_token, cancel));
    if (on_tokens) KVANT_TRY(on_tokens(static_cast<int64_t>(piece.size())));
  }

  std::vector<ForwardSequence> parts;
  std::vector<std::pair<size_t, int32_t>> wanted;  // candidate and its next token, of each row
  for (size_t i = 0; i < sample.candidates.size(); ++i) {
    const std::vector<int32_t>& ids = sample.candidates[i];
    if (ids.size() == 1) continue;
    KVANT_ASSIGN(const cache::SequenceId fork, cache.fork(prompt));
    sequences.add(fork);
    const auto fed = std::span(ids).first(ids.size() - 1);
    parts.push_back({fork, fed, static_cast<int>(fed.size())});
    for (size_t k = 1; k < ids.size(); ++k) wanted.emplace_back(i, ids[k]);
  }
  const LogitsSink next_tokens = [&](int64_t row, std::span<const float> logits) -> Status {
    const auto& [candidate, token] = wanted[static_cast<size_t>(row)];
    log_probs[candidate] += log_prob(logits, row_softmax(logits).log_sum_exp, token);
    return {};
  };
  if (!parts.empty()) KVANT_TRY(model.forward(parts, cache, next_tokens, cancel));
  return rank(std::move(log_probs), sample.right);
}

}  // namespace kvant::model
