#include "kvant/calib/statistics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "kvant/base/small_floats.h"
#include "kvant/formats/codec.h"
#include "kvant/formats/spec.h"

namespace kvant::calib {
namespace {

constexpr int kDim = 32, kPageTokens = 16, kStride = 3 * kDim;

// Pages of three heads side by side; channels have different offsets and spreads.
std::vector<float> random_rows(int tokens, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<float> rows;
  for (int i = 0; i < tokens * kStride; ++i) {
    const float uniform = static_cast<float>(random() >> 8) * 0x1p-23f - 1.0f;
    const int channel = i % kStride;
    rows.push_back(static_cast<float>(channel % 7) - 2.5f +
                   uniform * (0.25f + static_cast<float>(channel % 5)));
  }
  return rows;
}

double rounded(float x) {
  return static_cast<double>(from_bf16(to_bf16(x)));
}

HeadPage page_of(const std::vector<float>& rows, int page, int head) {
  return {rows.data() + page * kPageTokens * kStride + head * kDim, kStride, kPageTokens, kDim};
}

TEST(ChannelStatistics, AgreesWithPlainArithmetic) {
  constexpr int kPages = 5, kHead = 1;
  const std::vector<float> rows = random_rows(kPages * kPageTokens, 3);
  ChannelStatistics plain(kDim), centred(kDim);
  for (int page = 0; page < kPages; ++page) {
    plain.add(page_of(rows, page, kHead), ChannelStatistics::Centre::kNone);
    centred.add(page_of(rows, page, kHead), ChannelStatistics::Centre::kPageMean);
  }
  EXPECT_EQ(plain.num_tokens(), kPages * kPageTokens);
  for (int c = 0; c < kDim; ++c) {
    const auto at = [&](int token) {
      return rounded(rows[static_cast<size_t>(token * kStride + kHead * kDim + c)]);
    };
    double sum = 0;
    for (int token = 0; token < kPages * kPageTokens; ++token) sum += at(token);
    const double mean = sum / (kPages * kPageTokens);
    double largest = 0, off_mean = 0, off_page_mean = 0;
    for (int page = 0; page < kPages; ++page) {
      double page_mean = 0;
      for (int i = 0; i < kPageTokens; ++i) page_mean += at(page * kPageTokens + i) / kPageTokens;
      page_mean = rounded(static_cast<float>(page_mean));
      for (int i = 0; i < kPageTokens; ++i) {
        const double value = at(page * kPageTokens + i);
        largest = std::max(largest, std::abs(value));
        off_mean = std::max(off_mean, std::abs(value - mean));
        off_page_mean = std::max(off_page_mean, std::abs(value - page_mean));
      }
    }
    const auto index = static_cast<size_t>(c);
    EXPECT_NEAR(plain.mean()[index], mean, 1e-12);
    EXPECT_EQ(plain.mean(), centred.mean());
    EXPECT_EQ(plain.largest(nullptr)[index], largest);
    EXPECT_NEAR(plain.largest(plain.mean().data())[index], off_mean, 1e-12);
    // A rounding of the page's mean in BF16 may go the other way.
    EXPECT_NEAR(centred.largest(nullptr)[index], off_page_mean, 0.02);
  }
}

TEST(SmoothFactors, FollowTheirFormula) {
  const std::vector<double> k = {8, 2, 0.5, 100, 0, 1};
  const std::vector<double> q = {1, 4, 2, 0.001, 3, 0};
  for (const double alpha : {0.0, 0.5, 0.75, 1.0}) {
    const std::vector<float> factors = smooth_factors(k, q, alpha);
    ASSERT_EQ(factors.size(), k.size());
    const auto wanted = [&](size_t c) {
      return std::pow(std::max(k[c], 100 / 1024.0), alpha) /
             std::pow(std::max(q[c], 4 / 1024.0), 1 - alpha);
    };
    double log_sum = 0;
    for (size_t c = 0; c < k.size(); ++c) {
      log_sum += std::log(static_cast<double>(factors[c]));
      EXPECT_NEAR(factors[c] / factors[0] / (wanted(c) / wanted(0)), 1.0, 1e-5)
          << alpha << " " << c;
    }
    EXPECT_NEAR(log_sum, 0, 1e-5);  // geometric mean 1
  }
  const std::vector<double> zeros(4, 0.0);
  for (const float factor : smooth_factors(zeros, zeros, 0.5)) EXPECT_EQ(factor, 1.0f);
}

TEST(BiasOf, IsTheMeanOfWhatIsEncoded) {
  const std::vector<double> mean = {4, -2, 1, 0.5};
  const float smooth[] = {2, 1, 0.5f, 0.25f};
  formats::SideFormat side;
  side.bias = true;
  EXPECT_EQ(bias_of(mean, side, nullptr), (std::vector<float>{4, -2, 1, 0.5f}));
  side.smooth = true;
  EXPECT_EQ(bias_of(mean, side, smooth), (std::vector<float>{2, -2, 2, 2}));
  side.rotate = true;
  EXPECT_EQ(bias_of(mean, side, smooth), (std::vector<float>{2, 2, -2, 2}));
}

// The scale that follows from the range makes the codec use its largest code and saturate nothing.
TEST(EncodedRange, IsWhatTheCodecEncodes) {
  const std::vector<float> rows = random_rows(kPageTokens, 5);
  std::vector<float> bias, smooth;
  for (int c = 0; c < kDim; ++c) {
    bias.push_back(0.5f * static_cast<float>(c % 6) - 1.0f);
    smooth.push_back(0.5f + 0.125f * static_cast<float>(c % 9));
  }
  for (const char* spec :
       {"fp8", "k=fp8+mean,v=fp8", "k=fp8+bias,v=fp8", "k=fp8+smooth,v=fp8", "k=fp8+rot,v=fp8",
        "k=fp8+bias+smooth,v=fp8", "k=fp8+mean+smooth+rot,v=fp8", "k=fp8+bias+smooth+rot,v=fp8"}) {
    SCOPED_TRACE(spec);
    const formats::SideFormat side = formats::parse_cache_format(spec)->k;
    const HeadPage page = page_of(rows, 0, 2);
    formats::SideParams params = {1.0f, bias.data(), smooth.data()};
    const float range = encoded_range(page, side, params);
    params.global_scale = range / 448.0f;

    std::vector<float> values;
    for (int token = 0; token < kPageTokens; ++token) {
      for (int c = 0; c < kDim; ++c) values.push_back(from_bf16(to_bf16(page.row(token)[c])));
    }
    std::vector<uint8_t> codes(values.size());
    std::vector<uint16_t> mean(kDim);
    const auto codec = formats::Codec::create(side, kDim);
    ASSERT_TRUE(codec);
    codec->encode_page(values.data(), kPageTokens, params, {codes.data(), nullptr, mean.data()});
    float largest = 0;
    for (const uint8_t code : codes) largest = std::max(largest, std::fabs(from_e4m3(code)));
    EXPECT_EQ(largest, 448.0f);

    params.global_scale = range / 430.0f;
    const auto stats = codec->encode_page(values.data(), kPageTokens, params,
                                          {codes.data(), nullptr, mean.data()});
    EXPECT_EQ(stats.saturated, 0);
    params.global_scale = range / 480.0f;
    const auto too_small = codec->encode_page(values.data(), kPageTokens, params,
                                              {codes.data(), nullptr, mean.data()});
    EXPECT_GT(too_small.saturated, 0);
  }
}

}  // namespace
}  // namespace kvant::calib
