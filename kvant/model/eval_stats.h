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

// `more` after `scores`.
void append(TokenScores& scores, const TokenScores& more);
// Those of tokens [first, first + count).
TokenScores part(const TokenScores& scores, int64_t first, int64_t count);

struct EvalSummary {
  int64_t num_tokens = 0;
  double nll = 0;  // mean
  double ppl = 0;  // exp(nll)
  double kl_mean = 0, kl_median = 0, kl_p99 = 0;
  double kl_low = 0, kl_high = 0;  // 95 % interval of kl_mean
  double top1 = 0;                 // share of tokens with same_top
  // Mean of nll - base nll, with its 95 % interval.
  double delta_nll = 0, delta_nll_low = 0, delta_nll_high = 0;
};

// `tokens_per_chunk` divides the tokens into chunks, which are independent; intervals come from a
// bootstrap (percentiles of 2,000 resamples, fixed seed): of whole chunks if there are 30 or more,
// else of blocks of at most 64 consecutive tokens, which keeps the correlation of neighbouring
// tokens.
EvalSummary summarize(const TokenScores& scores, int64_t tokens_per_chunk);

// What two formats cost on the same tokens.
struct KlDifference {
  double mean = 0;           // of kl(a) - kl(b)
  double low = 0, high = 0;  // its 95 % interval, as above: each token's two values stay together
  // Of the mean's sign, both sides: at least 2 / 2,001, as many as are resampled, and 2 / 2^n of n
  // resampled blocks.
  double p = 1;
};
KlDifference compare_kl(const TokenScores& a, const TokenScores& b, int64_t tokens_per_chunk);

// The tokens of neighbouring positions in the context, of all chunks.
struct PositionBin {
  int64_t first = 0, last = 0;  // positions whose predictions are in it
  int64_t num_tokens = 0;
  double kl_mean = 0;
  double delta_nll = 0;
};
// At most `num_bins` bins of equal length (the last may be shorter); the first score of each chunk
// is of position `first_position`.
std::vector<PositionBin> by_position(const TokenScores& scores, int64_t tokens_per_chunk,
                                     int64_t first_position, int num_bins);

// Linear interpolation between order statistics; `fraction` in [0, 1]. Reorders `values`.
double quantile(std::span<float> values, double fraction);
double quantile(std::span<double> values, double fraction);

}  // namespace kvant::model
