#include "kvant/model/sampler.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "kvant/base/check.h"

namespace kvant::model {

Status check_sampler_options(const SamplerOptions& options) {
  const auto bad = [](std::string text) {
    return Error(ErrorCode::kInvalidArgument, std::move(text));
  };
  if (!(options.temperature >= 0) || !std::isfinite(options.temperature)) {
    return bad(
        fmt::format("a temperature of {}; expected 0 (greedy) or more", options.temperature));
  }
  if (options.top_k < 0) return bad(fmt::format("top-k of {}; expected 0 or more", options.top_k));
  if (!(options.top_p > 0 && options.top_p <= 1)) {
    return bad(fmt::format("top-p of {}; expected a number above 0, at most 1", options.top_p));
  }
  if (!(options.min_p >= 0 && options.min_p <= 1)) {
    return bad(fmt::format("min-p of {}; expected a number from 0 to 1", options.min_p));
  }
  if (!(options.repeat_penalty > 0) || !std::isfinite(options.repeat_penalty)) {
    return bad(fmt::format("a repeat penalty of {}; expected a positive number, 1 for none",
                           options.repeat_penalty));
  }
  if (options.repeat_last < 0) return bad("the number of recent tokens is negative");
  return {};
}

bool takes_greatest(const SamplerOptions& options) {
  return options.temperature == 0 && options.repeat_penalty == 1;
}

std::optional<backend::RowQuery> row_query(const SamplerOptions& options, int vocab_size) {
  if (options.temperature == 0 || options.repeat_penalty != 1 || options.top_k < 1 ||
      options.top_k >= vocab_size || options.top_k > backend::kMostCandidates) {
    return std::nullopt;
  }
  return backend::RowQuery{.kind = backend::RowQuery::Kind::kTopK, .top_k = options.top_k};
}

Sampler::Sampler(const SamplerOptions& options, int vocab_size)
    : options_(options), random_(options.seed), vocab_size_(vocab_size) {
  candidates_.reserve(vocab_size_);
  weights_.reserve(vocab_size_);
}

bool Sampler::before(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

int32_t Sampler::sample(std::span<const float> logits, std::span<const int32_t> history) {
  KVANT_CHECK(logits.size() == vocab_size_, "one logit per token of the vocabulary");
  candidates_.resize(vocab_size_);
  for (size_t i = 0; i < vocab_size_; ++i) candidates_[i] = {logits[i], static_cast<int32_t>(i)};
  num_sorted_ = 0;
  penalize(history);
  return options_.temperature == 0 ? best() : choose();
}

int32_t Sampler::sample(std::span<const backend::RowMaximum> candidates) {
  KVANT_CHECK(static_cast<int>(candidates.size()) == options_.top_k, "what row_query() asks for");
  candidates_.clear();
  for (const auto& [logit, id] : candidates) candidates_.push_back({logit, id});
  num_sorted_ = candidates_.size();
  return choose();
}

int32_t Sampler::choose() {
  keep_top_k();
  keep_top_p();
  keep_min_p();
  return draw();
}

void Sampler::penalize(std::span<const int32_t> history) {
  if (options_.repeat_penalty == 1) return;
  const size_t count = std::min<size_t>(history.size(), options_.repeat_last);
  const std::span<const int32_t> recent = history.last(count);
  for (size_t i = 0; i < count; ++i) {
    // Once per token, however often it occurs.
    if (std::find(recent.begin(), recent.begin() + i, recent[i]) != recent.begin() + i) continue;
    float& logit = candidates_[recent[i]].logit;
    logit = logit > 0 ? logit / options_.repeat_penalty : logit * options_.repeat_penalty;
  }
}

int32_t Sampler::best() const {
  return std::ranges::min_element(candidates_, before)->id;
}

void Sampler::sort_front(size_t count) {
  count = std::min(count, candidates_.size());
  if (count <= num_sorted_) return;
  std::partial_sort(candidates_.begin() + num_sorted_, candidates_.begin() + count,
                    candidates_.end(), before);
  num_sorted_ = count;
}

void Sampler::keep_top_k() {
  const size_t k = static_cast<size_t>(options_.top_k);
  if (k == 0 || k >= candidates_.size()) return;
  sort_front(k);
  candidates_.resize(k);
}

void Sampler::keep_top_p() {
  if (options_.top_p >= 1) return;
  sort_front(1);
  const float max = candidates_.front().logit;
  double sum = 0;
  for (const Candidate& candidate : candidates_) {
    sum += std::exp(static_cast<double>(candidate.logit - max));
  }
  double held = 0;
  for (size_t i = 0; i < candidates_.size(); ++i) {
    if (i >= num_sorted_) sort_front(4 * i + 64);
    held += std::exp(static_cast<double>(candidates_[i].logit - max));
    if (held >= static_cast<double>(options_.top_p) * sum) {
      candidates_.resize(i + 1);
      return;
    }
  }
}

void Sampler::keep_min_p() {
  if (options_.min_p == 0) return;
  sort_front(1);
  const float least = candidates_.front().logit + std::log(options_.min_p);
  std::erase_if(candidates_,
                [least](const Candidate& candidate) { return candidate.logit < least; });
  num_sorted_ = std::min(num_sorted_, candidates_.size());
}

int32_t Sampler::draw() {
  sort_front(1);
  const double max = candidates_.front().logit;
  weights_.clear();
  double sum = 0;
  for (const Candidate& candidate : candidates_) {
    sum += std::exp((candidate.logit - max) / options_.temperature);
    weights_.push_back(sum);
  }
  const double target = random_.uniform() * sum;
  const auto found = std::upper_bound(weights_.begin(), weights_.end(), target);
  const size_t index = std::min<size_t>(found - weights_.begin(), candidates_.size() - 1);
  return candidates_[index].id;
}

}  // namespace kvant::model
