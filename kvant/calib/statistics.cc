#include "kvant/calib/statistics.h"

#include <algorithm>
#include <cmath>

#include "kvant/base/check.h"
#include "kvant/base/small_floats.h"

namespace kvant::calib {
namespace {

// A factor is at most this far below the largest of its head: a channel that the text did not use
// must not become the loudest one on another text.
constexpr double kSmallestShare = 1.0 / 1024.0;

// The values that closing a page reads.
std::vector<float> bf16_page(const HeadPage& page) {
  std::vector<float> values;
  values.reserve(static_cast<size_t>(page.tokens) * static_cast<size_t>(page.head_dim));
  for (int token = 0; token < page.tokens; ++token) {
    const float* row = page.row(token);
    for (int c = 0; c < page.head_dim; ++c) values.push_back(from_bf16(to_bf16(row[c])));
  }
  return values;
}

// +mean: fp32 sum in order of the tokens, mean in BF16; subtracted in place.
void subtract_mean(std::vector<float>& values, int head_dim) {
  const size_t dim = static_cast<size_t>(head_dim);
  const size_t tokens = values.size() / dim;
  for (size_t c = 0; c < dim; ++c) {
    float sum = 0.0f;
    for (size_t token = 0; token < tokens; ++token) sum += values[token * dim + c];
    const float mean = from_bf16(to_bf16(sum / static_cast<float>(tokens)));
    for (size_t token = 0; token < tokens; ++token) values[token * dim + c] -= mean;
  }
}

double floored(double value, double largest) {
  const double least = largest * kSmallestShare;
  return std::max(value, least > 0 ? least : 1.0);
}

}  // namespace

ChannelStatistics::ChannelStatistics(int head_dim)
    : sum_(static_cast<size_t>(head_dim)),
      min_(static_cast<size_t>(head_dim)),
      max_(static_cast<size_t>(head_dim)) {}

void ChannelStatistics::add(const HeadPage& page, Centre centre) {
  const size_t dim = sum_.size();
  KVANT_CHECK(dim == static_cast<size_t>(page.head_dim), "pages of the head's dimension");
  std::vector<float> values = bf16_page(page);
  for (size_t i = 0; i < values.size(); ++i) sum_[i % dim] += static_cast<double>(values[i]);
  if (centre == Centre::kPageMean) subtract_mean(values, page.head_dim);
  if (num_tokens_ == 0) {
    std::copy_n(values.begin(), dim, min_.begin());
    std::copy_n(values.begin(), dim, max_.begin());
  }
  for (size_t i = 0; i < values.size(); ++i) {
    min_[i % dim] = std::min(min_[i % dim], values[i]);
    max_[i % dim] = std::max(max_[i % dim], values[i]);
  }
  num_tokens_ += page.tokens;
}

std::vector<double> ChannelStatistics::mean() const {
  KVANT_CHECK(num_tokens_ > 0, "a mean needs values");
  std::vector<double> mean = sum_;
  for (double& value : mean) value /= static_cast<double>(num_tokens_);
  return mean;
}

std::vector<double> ChannelStatistics::largest(const double* offset) const {
  std::vector<double> largest(sum_.size());
  for (size_t c = 0; c < largest.size(); ++c) {
    const double centre = offset != nullptr ? offset[c] : 0.0;
    largest[c] = std::max(std::abs(static_cast<double>(max_[c]) - centre),
                          std::abs(static_cast<double>(min_[c]) - centre));
  }
  return largest;
}

std::vector<float> smooth_factors(std::span<const double> k_largest,
                                  std::span<const double> q_largest, double alpha) {
  KVANT_CHECK(k_largest.size() == q_largest.size() && !k_largest.empty(), "one value a channel");
  const double k_head = *std::ranges::max_element(k_largest);
  const double q_head = *std::ranges::max_element(q_largest);
  std::vector<double> logs;
  double sum = 0;
  for (size_t c = 0; c < k_largest.size(); ++c) {
    logs.push_back(alpha * std::log(floored(k_largest[c], k_head)) -
                   (1 - alpha) * std::log(floored(q_largest[c], q_head)));
    sum += logs.back();
  }
  std::vector<float> factors;
  for (const double log : logs) {
    factors.push_back(static_cast<float>(std::exp(log - sum / static_cast<double>(logs.size()))));
  }
  return factors;
}

std::vector<float> bias_of(std::span<const double> mean, const formats::SideFormat& side,
                           const float* smooth) {
  std::vector<float> bias;
  for (size_t c = 0; c < mean.size(); ++c) {
    const bool divides = side.smooth && smooth != nullptr;
    bias.push_back(
        static_cast<float>(divides ? mean[c] / static_cast<double>(smooth[c]) : mean[c]));
  }
  if (side.rotate) formats::rotate_row(bias.data(), static_cast<int>(bias.size()));
  return bias;
}

float encoded_range(const HeadPage& page, const formats::SideFormat& side,
                    const formats::SideParams& params) {
  std::vector<float> values = bf16_page(page);
  const size_t dim = static_cast<size_t>(page.head_dim);
  const float* smooth = side.smooth ? params.smooth : nullptr;
  const float* bias = side.bias ? params.bias : nullptr;
  for (size_t i = 0; i < values.size() && smooth != nullptr; ++i) values[i] /= smooth[i % dim];
  for (size_t first = 0; first < values.size() && side.rotate; first += dim) {
    formats::rotate_row(values.data() + first, page.head_dim);
  }
  for (size_t i = 0; i < values.size() && bias != nullptr; ++i) values[i] -= bias[i % dim];
  if (side.mean) subtract_mean(values, page.head_dim);
  float largest = 0.0f;
  for (const float value : values) largest = std::max(largest, std::fabs(value));
  return largest;
}

}  // namespace kvant::calib
