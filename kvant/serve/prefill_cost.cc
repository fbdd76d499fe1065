#include "kvant/serve/prefill_cost.h"

#include <algorithm>

namespace kvant::serve {

void PrefillCost::observe(double tokens, double pairs, double seconds) {
  constexpr double kFade = 0.99;
  const auto add = [](double& sum, double product) { sum = kFade * sum + product; };
  add(tokens_squared_, tokens * tokens);
  add(tokens_pairs_, tokens * pairs);
  add(pairs_squared_, pairs * pairs);
  add(tokens_seconds_, tokens * seconds);
  add(pairs_seconds_, pairs * seconds);
}

PrefillCost::Fit PrefillCost::fit() const {
  if (!known()) return {};
  const Fit without_context{.token = std::max(0.0, tokens_seconds_ / tokens_squared_), .pair = 0};
  const double determinant = tokens_squared_ * pairs_squared_ - tokens_pairs_ * tokens_pairs_;
  // Steps that are all alike do not tell the two apart.
  if (determinant <= 1e-6 * tokens_squared_ * pairs_squared_) return without_context;
  const Fit both{
      .token = (tokens_seconds_ * pairs_squared_ - pairs_seconds_ * tokens_pairs_) / determinant,
      .pair = (pairs_seconds_ * tokens_squared_ - tokens_seconds_ * tokens_pairs_) / determinant};
  return both.token > 0 && both.pair >= 0 ? both : without_context;
}

double PrefillCost::token_seconds() const {
  return fit().token;
}
double PrefillCost::token_context_seconds() const {
  return fit().pair;
}

}  // namespace kvant::serve
