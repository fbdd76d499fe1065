#include "kvant/serve/sampling.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "kvant/base/check.h"
#include "kvant/base/row_weight.h"

namespace kvant::serve {
namespace {

constexpr float kBarred = -std::numeric_limits<float>::infinity();
constexpr size_t kBlock = kWeightBlock;
constexpr size_t kLanes = kWeightLanes;

// NaN counts as the least: such a token is never chosen.
float greatest(std::span<const float> values) {
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, kBarred);
  const size_t whole = values.size() / kLanes * kLanes;
  for (size_t i = 0; i < whole; i += kLanes) {
    for (size_t j = 0; j < kLanes; ++j) {
      lanes[j] = values[i + j] > lanes[j] ? values[i + j] : lanes[j];
    }
  }
  float max = *std::max_element(lanes, lanes + kLanes);
  for (size_t i = whole; i < values.size(); ++i) max = std::max(max, values[i]);
  return max;
}

// Sum of exp((values - max) * scale); the terms go to `weights` [values.size()].
double exponentials(std::span<const float> values, float scale, float max, float* weights) {
  for (size_t i = 0; i < values.size(); ++i) {  // two loops: g++ makes branches of one
    weights[i] = std::max(kLeastExponent, (values[i] - max) * scale);
  }
  for (size_t i = 0; i < values.size(); ++i) weights[i] = exp_of_negative(weights[i]);
  double lanes[kLanes] = {};
  const size_t whole = values.size() / kLanes * kLanes;
  for (size_t i = 0; i < whole; i += kLanes) {
    for (size_t j = 0; j < kLanes; ++j) lanes[j] += static_cast<double>(weights[i + j]);
  }
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  for (size_t i = whole; i < values.size(); ++i) sum += static_cast<double>(weights[i]);
  return sum;
}

bool changes_logits(const SamplingParams& p, bool constrained, size_t num_output) {
  return constrained || !p.allowed_token_ids.empty() || !p.bad_token_ids.empty() ||
         !p.logit_bias.empty() || p.presence_penalty != 0 || p.frequency_penalty != 0 ||
         p.repetition_penalty != 1 || num_output < static_cast<size_t>(p.min_tokens);
}

bool keeps_top_k(const SamplingParams& p, size_t vocab_size) {
  return p.top_k > 0 && static_cast<size_t>(p.top_k) < vocab_size;
}

// What min_p leaves is at least so great.
float least_of_min_p(const SamplingParams& p, float max) {
  return max + p.temperature * std::log(p.min_p);
}

}  // namespace

bool takes_greatest(const SamplingParams& params, bool constrained, size_t num_output) {
  return params.is_greedy() && !params.logprobs && !changes_logits(params, constrained, num_output);
}

std::optional<backend::RowQuery> row_query(const SamplingParams& params, bool constrained,
                                           size_t num_output, int vocab_size,
                                           model::SplitMix64& random) {
  using Kind = backend::RowQuery::Kind;
  if (params.is_greedy() || params.logprobs || changes_logits(params, constrained, num_output)) {
    return std::nullopt;
  }
  backend::RowQuery query;
  query.scale = 1 / params.temperature;
  query.uniform = random.uniform();
  if (keeps_top_k(params, static_cast<size_t>(vocab_size))) {
    if (params.top_k > backend::kMostCandidates) return std::nullopt;
    query.kind = Kind::kTopK;
    query.top_k = params.top_k;
  } else if (params.min_p > 0) {
    query.kind = Kind::kNear;
    query.below = least_of_min_p(params, 0);
  } else if (params.top_p < 1) {
    query.kind = Kind::kTopP;
    query.top_p = static_cast<double>(params.top_p);
  } else {
    query.kind = Kind::kDraw;
  }
  return query;
}

bool RowSampler::before(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

model::SplitMix64 choice_random(uint64_t seed, int index) {
  // The generator's own output as its seed: neighbouring seeds give unrelated streams.
  return model::SplitMix64(model::SplitMix64(seed + static_cast<uint64_t>(index)).next());
}

RowSampler::RowSampler(int vocab_size, std::span<const int32_t> end_tokens)
    : vocab_size_(static_cast<size_t>(vocab_size)),
      end_tokens_(end_tokens.begin(), end_tokens.end()),
      adjusted_(vocab_size_),
      weights_(vocab_size_),
      counts_(vocab_size_) {
  sums_.reserve(vocab_size_ / kBlock + 1);
  maxima_.reserve(vocab_size_ / kLanes + 1);
}

Result<SampledToken> RowSampler::sample(const SamplingRow& row) {
  KVANT_CHECK(row.logits.size() == vocab_size_, "one logit per token of the vocabulary");
  KVANT_CHECK(row.num_prompt_tokens <= row.tokens.size(), "the prompt is part of the tokens");
  std::span<const float> logits = adjust(row, MinTokens::kObey);
  float max = greatest(logits);
  if (max == kBarred && row.params->min_tokens > 0) {
    logits = adjust(row, MinTokens::kLift);  // a sentence that cannot go on ends
    max = greatest(logits);
  }
  if (!std::isfinite(max)) {
    if (!std::isfinite(greatest(row.logits))) {
      return Error(ErrorCode::kNumericError,
                   fmt::format("the greatest logit is {}", greatest(row.logits)));
    }
    return Error(ErrorCode::kInvalidArgument,
                 "allowed_token_ids, bad_token_ids, logit_bias and the constraint on the output "
                 "leave no token; allow more tokens");
  }
  int32_t id;
  if (row.params->is_greedy()) {
    id = static_cast<int32_t>(std::find(logits.begin(), logits.end(), max) - logits.begin());
  } else {
    id = draw(logits, row, max);
  }
  if (row.params->logprobs) return score(row.logits, id, *row.params->logprobs);
  SampledToken token;
  token.id = id;
  return token;
}

std::span<const float> RowSampler::adjust(const SamplingRow& row, MinTokens min_tokens) {
  const size_t num_output = row.tokens.size() - row.num_prompt_tokens;
  if (!changes_logits(*row.params, !row.bitmask.empty(), num_output)) return row.logits;
  std::copy(row.logits.begin(), row.logits.end(), adjusted_.begin());
  mask(row, min_tokens);
  for (const auto& [id, bias] : row.params->logit_bias) adjusted_[id] += bias;
  penalize(row);
  return adjusted_;
}

void RowSampler::mask(const SamplingRow& row, MinTokens min_tokens) {
  const SamplingParams& p = *row.params;
  if (!row.bitmask.empty()) {
    KVANT_CHECK(row.bitmask.size() == (vocab_size_ + 31) / 32, "one bit per token");
    for (size_t i = 0; i < vocab_size_; ++i) {
      if ((row.bitmask[i / 32] >> (i % 32) & 1) == 0) adjusted_[i] = kBarred;
    }
  }
  if (!p.allowed_token_ids.empty()) {
    for (const int32_t id : p.allowed_token_ids) counts_[id] = 1;
    for (size_t i = 0; i < vocab_size_; ++i) {
      if (counts_[i] == 0) adjusted_[i] = kBarred;
    }
    for (const int32_t id : p.allowed_token_ids) counts_[id] = 0;
  }
  for (const int32_t id : p.bad_token_ids) adjusted_[id] = kBarred;
  const size_t num_output = row.tokens.size() - row.num_prompt_tokens;
  if (min_tokens == MinTokens::kObey && num_output < static_cast<size_t>(p.min_tokens)) {
    for (const int32_t id : end_tokens_) adjusted_[id] = kBarred;
    for (const int32_t id : p.stop_token_ids) adjusted_[id] = kBarred;
  }
}

void RowSampler::penalize(const SamplingRow& row) {
  const SamplingParams& p = *row.params;
  if (p.repetition_penalty != 1) {
    for (const int32_t id : row.tokens) {
      if (counts_[id]++ != 0) continue;  // once per token, however often it occurs
      float& logit = adjusted_[id];
      logit = logit > 0 ? logit / p.repetition_penalty : logit * p.repetition_penalty;
    }
    for (const int32_t id : row.tokens) counts_[id] = 0;
  }
  if (p.frequency_penalty == 0 && p.presence_penalty == 0) return;
  const std::span<const int32_t> output = row.tokens.subspan(row.num_prompt_tokens);
  for (const int32_t id : output) ++counts_[id];
  for (const int32_t id : output) {
    const float count = static_cast<float>(std::exchange(counts_[id], 0));
    if (count > 0) adjusted_[id] -= p.frequency_penalty * count + p.presence_penalty;
  }
}

int32_t RowSampler::draw(std::span<const float> logits, const SamplingRow& row, float max) {
  const SamplingParams& p = *row.params;
  const double uniform = row.random->uniform();
  const float scale = 1 / p.temperature;
  const bool with_top_k = keeps_top_k(p, vocab_size_);
  if (p.min_p == 0 && !with_top_k && p.top_p >= 1) return draw_any(logits, scale, max, uniform);
  // Every cut is by a bound first: one pass over the vocabulary leaves few tokens to sort.
  float least = std::numeric_limits<float>::lowest();
  if (p.min_p > 0) least = least_of_min_p(p, max);
  if (with_top_k) least = std::max(least, top_k_bound(logits, p.top_k));
  double total = 0;  // weight of what top_p chooses from
  if (p.top_p < 1 && p.min_p == 0 && !with_top_k) {
    // Tokens lighter than an equal share of 1 - top_p hold less than that together: none stays.
    // The bound is wider by far more than the rounding of weights and logits.
    total = weigh(logits, scale, max);
    const double share =
        (1 - static_cast<double>(p.top_p)) * total / static_cast<double>(vocab_size_);
    least = max + p.temperature * static_cast<float>(std::log(share) - 1e-3);
  }
  gather(logits, least);
  return draw_left(p, total, max, uniform);
}

// From the candidates that min_p left, in the order of ids, or the top_k and more, in any. `total`:
// the weight of what top_p chooses from if that is more than they are; 0: it is they.
int32_t RowSampler::draw_left(const SamplingParams& p, double total, float max, double uniform) {
  const float scale = 1 / p.temperature;
  if (keeps_top_k(p, vocab_size_)) keep_top_k(static_cast<size_t>(p.top_k));
  if (p.top_p >= 1 || total == 0) weigh_candidates(0, candidates_.size(), scale, max);
  if (p.top_p < 1) {
    if (total == 0) total = weight_of_candidates();
    keep_top_p(static_cast<double>(p.top_p) * total, scale, max);
  }
  return draw_candidate(uniform);
}

int32_t RowSampler::choose(const backend::RowChoice& choice,
                           std::span<const backend::RowMaximum> candidates,
                           const SamplingParams& params, model::SplitMix64& random) {
  KVANT_CHECK(choice.found(), "nothing was found: the row has logits");
  const double uniform = random.uniform();
  if (choice.drawn >= 0) return choice.drawn;
  candidates_.clear();
  for (const auto& [logit, id] : candidates) candidates_.push_back({logit, id});
  const float max = candidates_.front().logit;
  if (params.min_p > 0) {
    const float least = least_of_min_p(params, max);
    std::erase_if(candidates_, [least](const Candidate& c) { return c.logit < least; });
    std::ranges::sort(candidates_, {}, &Candidate::id);
  }
  return draw_left(params, choice.total, max, uniform);
}

double RowSampler::weigh(std::span<const float> logits, float scale, float max) {
  sums_.clear();
  double total = 0;
  for (size_t begin = 0; begin < logits.size(); begin += kBlock) {
    const size_t count = std::min(kBlock, logits.size() - begin);
    sums_.push_back(exponentials(logits.subspan(begin, count), scale, max, &weights_[begin]));
    total += sums_.back();
  }
  return total;
}

int32_t RowSampler::draw_any(std::span<const float> logits, float scale, float max,
                             double uniform) {
  double target = uniform * weigh(logits, scale, max);
  size_t block = 0;
  while (block + 1 < sums_.size() && target >= sums_[block]) target -= sums_[block++];
  int32_t last = -1;  // with any weight: rounding may leave the target just above the sum
  for (size_t i = block * kBlock; i < std::min((block + 1) * kBlock, vocab_size_); ++i) {
    if (weights_[i] == 0) continue;
    last = static_cast<int32_t>(i);
    target -= static_cast<double>(weights_[i]);
    if (target < 0) return last;
  }
  if (last >= 0) return last;
  return static_cast<int32_t>(std::find(logits.begin(), logits.end(), max) - logits.begin());
}

float RowSampler::top_k_bound(std::span<const float> logits, int k) {
  // The k-th greatest of the maxima of disjoint blocks is at most the k-th greatest of all.
  size_t block = logits.size() / (4 * static_cast<size_t>(k));
  block = std::clamp<size_t>(block / kLanes * kLanes, kLanes, kBlock);
  maxima_.clear();
  for (size_t begin = 0; begin < logits.size(); begin += block) {
    maxima_.push_back(greatest(logits.subspan(begin, std::min(block, logits.size() - begin))));
  }
  if (maxima_.size() < static_cast<size_t>(k)) return std::numeric_limits<float>::lowest();
  std::nth_element(maxima_.begin(), maxima_.begin() + (k - 1), maxima_.end(), std::greater<>());
  return std::max(maxima_[k - 1], std::numeric_limits<float>::lowest());
}

void RowSampler::gather(std::span<const float> logits, float least) {
  candidates_.clear();
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] >= least) candidates_.push_back({logits[i], static_cast<int32_t>(i)});
  }
}

// The same order whatever was gathered, and with every library.
void RowSampler::keep_top_k(size_t k) {
  if (candidates_.size() > k) {
    std::nth_element(candidates_.begin(), candidates_.begin() + (k - 1), candidates_.end(), before);
    candidates_.resize(k);
  }
  if (!std::ranges::is_sorted(candidates_, before)) std::ranges::sort(candidates_, before);
}

// Also leaves the candidates' weights.
void RowSampler::keep_top_p(double mass, float scale, float max) {
  size_t sorted = 0;
  if (std::ranges::is_sorted(candidates_, before)) {
    sorted = candidates_.size();
    weigh_candidates(0, sorted, scale, max);
  }
  double held = 0;
  for (size_t i = 0; i < candidates_.size(); ++i) {
    if (i >= sorted) {  // mostly few stay: sort no more than that takes
      const size_t next = std::min(4 * sorted + 64, candidates_.size());
      std::nth_element(candidates_.begin() + sorted, candidates_.begin() + (next - 1),
                       candidates_.end(), before);
      std::sort(candidates_.begin() + sorted, candidates_.begin() + next, before);
      weigh_candidates(sorted, next, scale, max);
      sorted = next;
    }
    held += static_cast<double>(weights_[i]);
    if (held >= mass) {
      candidates_.resize(i + 1);
      return;
    }
  }
}

void RowSampler::weigh_candidates(size_t begin, size_t end, float scale, float max) {
  for (size_t i = begin; i < end; ++i) {  // two loops, as in exponentials()
    weights_[i] = std::max(kLeastExponent, (candidates_[i].logit - max) * scale);
  }
  for (size_t i = begin; i < end; ++i) weights_[i] = exp_of_negative(weights_[i]);
}

double RowSampler::weight_of_candidates() const {
  double sum = 0;
  for (size_t i = 0; i < candidates_.size(); ++i) sum += static_cast<double>(weights_[i]);
  return sum;
}

int32_t RowSampler::draw_candidate(double uniform) const {
  double target = uniform * weight_of_candidates();
  for (size_t i = 0; i < candidates_.size(); ++i) {
    target -= static_cast<double>(weights_[i]);
    if (target < 0) return candidates_[i].id;
  }
  return candidates_.back().id;
}

SampledToken RowSampler::score(std::span<const float> logits, int32_t id, int num_top) {
  const float max = greatest(logits);
  const float log_sum = static_cast<float>(std::log(weigh(logits, 1, max)));
  SampledToken token;
  token.id = id;
  token.logprob = logits[id] - max - log_sum;
  const size_t count = std::min(static_cast<size_t>(num_top), vocab_size_);
  if (count == 0) return token;
  gather(logits, top_k_bound(logits, static_cast<int>(count)));
  const size_t found = std::min(count, candidates_.size());
  std::partial_sort(candidates_.begin(), candidates_.begin() + found, candidates_.end(), before);
  token.top.reserve(found);
  for (size_t i = 0; i < found; ++i) {
    token.top.emplace_back(candidates_[i].id, candidates_[i].logit - max - log_sum);
  }
  return token;
}

}  // namespace kvant::serve
