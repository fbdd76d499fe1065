// How well one set of predictions matches another: per-token scores and what is reported of them.
//
// Row-wise functions are pure; TokenScores is a plain growing container (single-thread). All
// logarithms are natural.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace kvant::model {

// The softmax of one row of logits, as far as scores need it.
struct RowSoftmax {
  double log_sum_exp = 0;
  int32_t top = 0;      // the most likely token; the first of equals
  float top_logit = 0;  // its logit
};
RowSoftmax row_softmax(std::span<const float> logits);

// KL(p || q) in nats of p = softmax(base) and q = softmax(logits), given their log_sum_exp. Tokens
// with log p <= `floor` are left out (a base read from a file does not know them: logits_file.h).
double row_kl(std::span<const float> base, double base_log_sum_exp, std::span<const float> logits,
              double log_sum_exp, float floor);

// Scores of the tokens of one cache format, in text order.
struct TokenScores {
  std::vector<double> nll;        // -log q(token)
  std::vector<double> delta_nll;  // that minus the base's
  std::vector<float> kl;          // KL(base || q) at its position
  std::vector<uint8_t> same_top;  // 1: base and q agree on the most likely token
};

struct EvalSummary {
  int64_t num_tokens = 0;
  double nll = 0;  // mean
  double ppl = 0;  // exp(nll)
  double kl_mean = 0, kl_median = 0, kl_p99 = 0;
  double top1 = 0;  // share of tokens with same_top
  // Mean of nll - base nll, with its 95 % interval.
  double delta_nll = 0, delta_nll_low = 0, delta_nll_high = 0;
};

// `tokens_per_chunk` divides the tokens into chunks,
// which are independent; the interval comes from a paired bootstrap (percentiles of 2,000
// resamples, fixed seed): of whole chunks if there are 30 or more, else of blocks of at most 64
// consecutive tokens, which keeps the correlation of neighbouring tokens.
EvalSummary summarize(const TokenScores& scores, int64_t tokens_per_chunk);

// Linear interpolation between order statistics; `fraction` in [0, 1]. Reorders `values`.
double quantile(std::span<float> values, double fraction);
double quantile(std::span<double> values, double fraction);

}  // namespace kvant::model
