// What a quantisation plan is computed from: statistics of the keys, values and queries of one
// layer over the pages that a cache format would encode. Internal to calib/.
//
// Two passes over the same text: ChannelStatistics (means, ranges) give the bias and the factors,
// and with these encoded_range sees what is encoded. Values count as the open page holds them, in
// BF16. Sums are fp64 in order of the tokens, so the same rows give the same bits. Single-thread.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kvant/formats/codec.h"
#include "kvant/formats/spec.h"

namespace kvant::calib {

// One head's part of a page: `tokens` rows of head_dim values, `stride` values apart.
struct HeadPage {
  const float* x = nullptr;
  int64_t stride = 0;
  int tokens = 0;
  int head_dim = 0;

  const float* row(int token) const { return x + token * stride; }
};

// Of one side of one KV head.
class ChannelStatistics {
 public:
  explicit ChannelStatistics(int head_dim);

  // With `page_mean` the range is that of the values less their page's mean (+mean).
  enum class Centre { kNone, kPageMean };
  void add(const HeadPage& page, Centre centre);

  int64_t num_tokens() const { return num_tokens_; }
  std::vector<double> mean() const;  // [head_dim]; num_tokens() > 0
  // Largest magnitude of each channel less `offset` (null: 0). [head_dim]
  std::vector<double> largest(const double* offset) const;

 private:
  int64_t num_tokens_ = 0;
  std::vector<double> sum_;
  std::vector<float> min_, max_;  // less the page's mean if centred
};

// +smooth: factors of one KV head from the largest magnitudes of its keys' and queries' channels,
// k^alpha / q^(1 - alpha) (SmoothQuant, arXiv 2211.10438, equation 4, with queries in place of
// weights), scaled so that their geometric mean is 1. Channels that are nearly unused count as the
// 1024th part of the largest one.
std::vector<float> smooth_factors(std::span<const double> k_largest,
                                  std::span<const double> q_largest, double alpha);

// +bias: the mean in the frame that is encoded, R(mean / smooth). `smooth` may be null.
std::vector<float> bias_of(std::span<const double> mean, const formats::SideFormat& side,
                           const float* smooth);

// Largest magnitude of what `side` encodes of one page (order of codecs.md section 3, in fp32 as
// the codec computes it).
float encoded_range(const HeadPage& page, const formats::SideFormat& side,
                    const formats::SideParams& params);

}  // namespace kvant::calib
