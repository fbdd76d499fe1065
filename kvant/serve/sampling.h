// Chooses the next token of one row of logits as the server's API promises, and reports
// log-probabilities.
//
// The steps and their order are vLLM's, which is not that of kvant/model/sampler.h (llama.cpp's):
//   1. the constraint's bitmask, allowed_token_ids, bad_token_ids, min_tokens;
//   2. logit_bias; repetition penalty (tokens of prompt and output; divides positive logits,
//      multiplies negative ones), frequency and presence penalty (tokens of the output);
//   3. greedy: the greatest, ties to the lowest id; otherwise divide by the temperature;
//   4. min_p, then top_k, then top_p of what is left; draw, by ids or, after top_k or top_p, in the
//      order of probability.
// Because the temperature comes first, min_p and top_p act on the tempered distribution: at 0.5 the
// same top_p keeps fewer tokens than llama.cpp does, at 1.5 more. At 1 both agree, but for top_p
// with min_p. Exactly top_k tokens stay, of equals those with the lowest ids (vLLM: all equals).
// The choice is a function of row, parameters and random state alone: not of the machine, the batch
// or what the object did before, nor of whether the row's logits are read or what a device found in
// them (row_query).
//
// Log-probabilities are those of the logits as they came, before step 1 (`raw_logprobs`).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "kvant/backend/backend.h"
#include "kvant/base/result.h"
#include "kvant/model/random.h"
#include "kvant/serve/sampling_params.h"

namespace kvant::serve {

struct SampledToken {
  int32_t id = -1;
  float logprob = 0;                           // 0 unless log-probabilities were asked for
  std::vector<std::pair<int32_t, float>> top;  // the most probable, best first; ties to lower ids
};

struct SamplingRow {
  std::span<const float> logits;  // [vocab]
  const SamplingParams* params = nullptr;
  std::span<const int32_t> tokens;      // all so far: the prompt's, then the output's
  size_t num_prompt_tokens = 0;         // at most tokens.size()
  std::span<const uint32_t> bitmask;    // of TokenConstraint::allowed(); empty: no constraint
  model::SplitMix64* random = nullptr;  // of this choice; advanced by one draw unless greedy
};

// Whether the choice is the token with the greatest logit, the lowest of equals: the row itself is
// not needed. `num_output`: tokens of the output so far; more of them change no yes to a no.
bool takes_greatest(const SamplingParams& params, bool constrained, size_t num_output);

// What sample() would need of the row's logits, of a row whose logits nothing changes and nobody
// else wants; nothing if it takes the row itself, or only its greatest. `random` as sample() would
// get it; left where sample() would.
std::optional<backend::RowQuery> row_query(const SamplingParams& params, bool constrained,
                                           size_t num_output, int vocab_size,
                                           model::SplitMix64& random);

// The random state of choice `index` of a request with `seed`.
model::SplitMix64 choice_random(uint64_t seed, int index);

// Holds the memory that a row needs on the way, 12 bytes a token of the vocabulary at least; one
// for all rows of a thread. Single-thread. Allocates nothing per token after the first ones unless
// log-probabilities are asked for.
class RowSampler {
 public:
  // `end_tokens`: the model's end-of-generation tokens, which min_tokens bars.
  RowSampler(int vocab_size, std::span<const int32_t> end_tokens);

  // kInvalidArgument if the request's own fields leave no token (min_tokens gives way first);
  // kNumericError if the greatest logit is not finite.
  Result<SampledToken> sample(const SamplingRow& row);

  // The token of sample(), from what row_query() found; `choice.found()`.
  int32_t choose(const backend::RowChoice& choice, std::span<const backend::RowMaximum> candidates,
                 const SamplingParams& params, model::SplitMix64& random);

  // The log-probability of `id` in `logits` [vocab] and the `num_top` most probable: what
  // prompt_logprobs reports.
  SampledToken score(std::span<const float> logits, int32_t id, int num_top);

 private:
  struct Candidate {
    float logit;
    int32_t id;
  };
  enum class MinTokens { kObey, kLift };

  // The row with steps 1 and 2 applied: `row.logits` itself where there is nothing to do.
  std::span<const float> adjust(const SamplingRow& row, MinTokens min_tokens);
  void mask(const SamplingRow& row, MinTokens min_tokens);
  void penalize(const SamplingRow& row);
  int32_t draw(std::span<const float> logits, const SamplingRow& row, float max);
  int32_t draw_any(std::span<const float> logits, float scale, float max, double uniform);
  int32_t draw_left(const SamplingParams& p, double total, float max, double uniform);
  int32_t draw_candidate(double uniform) const;
  static bool before(const Candidate& a, const Candidate& b);  // more probable; ties: lower id
  void weigh_candidates(size_t begin, size_t end, float scale, float max);
  double weight_of_candidates() const;
  void gather(std::span<const float> logits, float least);
  float top_k_bound(std::span<const float> logits, int k);
  void keep_top_k(size_t k);
  void keep_top_p(double mass, float scale, float max);
  double weigh(std::span<const float> logits, float scale, float max);

  const size_t vocab_size_;
  const std::vector<int32_t> end_tokens_;
  std::vector<float> adjusted_;        // [vocab]
  std::vector<float> weights_;         // [vocab], exp of logits less the greatest, or of candidates
  std::vector<double> sums_;           // of blocks of weights_
  std::vector<float> maxima_;          // of blocks of logits
  std::vector<Candidate> candidates_;  // what is left, in the order of drawing
  std::vector<uint32_t> counts_;       // [vocab], zero between calls
};

}  // namespace kvant::serve
