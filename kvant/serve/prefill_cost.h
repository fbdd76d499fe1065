// What it costs to compute tokens, from the steps that were made: against it loading pages is
// judged (research/serving.md 4.2). Single-thread.
#pragma once

#include <cstdint>

#include "kvant/cache/eviction_policy.h"

namespace kvant::serve {

// seconds = a tokens + g tokens (context + tokens / 2), fitted by least squares over about the last
// hundred steps.
class PrefillCost {
 public:
  // A step's prompt tokens; `pairs`: for each, the tokens before it, added up.
  void observe(double tokens, double pairs, double seconds);
  // False until there was a step.
  bool known() const { return tokens_squared_ > 0; }
  double token_seconds() const;
  double token_context_seconds() const;

 private:
  struct Fit {
    double token = 0, pair = 0;
  };
  Fit fit() const;
  // Sums of products, older ones faded.
  double tokens_squared_ = 0, tokens_pairs_ = 0, pairs_squared_ = 0;
  double tokens_seconds_ = 0, pairs_seconds_ = 0;
};

}  // namespace kvant::serve
