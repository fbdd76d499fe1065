// Chooses the next token from logits.
//
// The steps and their order are llama.cpp's: repeat penalty, top-k, top-p, min-p, temperature,
// draw. The same options, seed and logits give the same tokens. Thread-compatible.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kvant/backend/backend.h"
#include "kvant/base/result.h"
#include "kvant/model/random.h"

namespace kvant::model {

struct SamplerOptions {
  float temperature = 0.8f;     // 0: the most probable token, ties to the lowest id
  int top_k = 40;               // the k most probable stay; 0: all
  float top_p = 0.95f;          // the fewest that hold this probability stay; 1: all
  float min_p = 0.05f;          // those below this fraction of the best's probability go; 0: none
  float repeat_penalty = 1.0f;  // divides positive and multiplies negative logits of recent tokens
  int repeat_last = 64;         // how many tokens are recent
  uint64_t seed = 0;
};

// kInvalidArgument names the first option out of range.
Status check_sampler_options(const SamplerOptions& options);
// Whether every choice is the token with the greatest logit, whatever the history.
bool takes_greatest(const SamplerOptions& options);
// What candidates do in place of the logits, for every token; nothing if it takes the logits.
std::optional<backend::RowQuery> row_query(const SamplerOptions& options, int vocab_size);

class Sampler {
 public:
  Sampler(const SamplerOptions& options, int vocab_size);

  // `logits` [vocab_size], finite; `history`: all tokens so far, the last `repeat_last` count.
  int32_t sample(std::span<const float> logits, std::span<const int32_t> history);
  // The same token from what row_query() asked for: the top_k candidates, in order.
  int32_t sample(std::span<const backend::RowMaximum> candidates);

 private:
  struct Candidate {
    float logit;
    int32_t id;
  };
  static bool before(const Candidate& a, const Candidate& b);

  void penalize(std::span<const int32_t> history);
  int32_t best() const;
  int32_t choose();
  void keep_top_k();
  void keep_top_p();
  void keep_min_p();
  int32_t draw();
  void sort_front(size_t count);

  const SamplerOptions options_;
  SplitMix64 random_;
  std::vector<Candidate> candidates_;  // of this token, most probable first once sorted
  size_t num_sorted_ = 0;              // so many of them are in order
  std::vector<double> weights_;
  const size_t vocab_size_;
};

}  // namespace kvant::model
