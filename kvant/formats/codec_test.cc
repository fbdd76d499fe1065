#include "kvant/formats/codec.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kvant/base/small_floats.h"
#include "kvant/formats/sections.h"
#include "kvant/formats/transform.h"

namespace kvant::formats {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> random_values(size_t n, uint32_t seed, float scale = 1.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> x(n);
  for (float& value : x) value = normal(random);
  return x;
}

struct EncodedRows {
  std::vector<uint8_t> codes, scales;
  EncodeStats stats;
};

EncodedRows encode(const Codec& codec, const std::vector<float>& x, float g = 1.0f) {
  const int64_t rows = static_cast<int64_t>(x.size()) / codec.head_dim();
  EncodedRows out;
  out.codes.resize(static_cast<size_t>(rows * codec.row_code_bytes()), 0xcc);
  out.scales.resize(static_cast<size_t>(rows * codec.row_scale_bytes()), 0xcc);
  out.stats = codec.encode_rows(x.data(), rows, g, out.codes.data(), out.scales.data());
  return out;
}

TEST(Codec, Nvfp4ByHand) {
  const Codec codec = *Codec::create({.base = FormatId::kNvfp4}, 16);
  std::vector<float> x(16, 0.0f);
  x[0] = 6.0f;
  x[1] = -0.5f;
  x[2] = 0.25f;  // tie between 0 and 0.5: even
  x[15] = -6.0f;
  const EncodedRows out = encode(codec, x);
  EXPECT_EQ(out.scales[0], 0x38);  // 1.0
  EXPECT_EQ(out.codes[0], 0x97);   // element 0 in the low nibble
  EXPECT_EQ(out.codes[1], 0x00);
  EXPECT_EQ(out.codes[7], 0xf0);
  std::vector<float> back(16);
  codec.decode_rows(out.codes.data(), out.scales.data(), 1, 1.0f, back.data());
  EXPECT_EQ(back[0], 6.0f);
  EXPECT_EQ(back[1], -0.5f);
  EXPECT_EQ(back[2], 0.0f);
  EXPECT_EQ(back[15], -6.0f);
}

TEST(Codec, FourOverSixPicksTheBetterScale) {
  const Codec plain = *Codec::create({.base = FormatId::kNvfp4}, 16);
  const Codec chosen = *Codec::create({.base = FormatId::kNvfp4, .four_over_six = true}, 16);
  // All values at 1 and 0.75 of the largest: exact with 4 and 3, not with 6 and 4.5.
  std::vector<float> x(16, 3.0f);
  for (size_t i = 0; i < 8; ++i) x[i] = 4.0f;
  EXPECT_EQ(encode(plain, x).scales[0], to_e4m3(4.0f / 6.0f));
  EXPECT_EQ(encode(chosen, x).scales[0], to_e4m3(1.0f));
}

TEST(Codec, IntegersByHand) {
  const Codec int8 = *Codec::create({.base = FormatId::kInt8}, 32);
  std::vector<float> x(32, 0.0f);
  x[0] = 127.0f;
  x[1] = -63.5f;  // tie: -64
  x[2] = 0.5f;    // tie: 0
  const EncodedRows a = encode(int8, x);
  EXPECT_EQ(a.scales[0] | a.scales[1] << 8, 0x3c00);
  EXPECT_EQ(static_cast<int8_t>(a.codes[0]), 127);
  EXPECT_EQ(static_cast<int8_t>(a.codes[1]), -64);
  EXPECT_EQ(static_cast<int8_t>(a.codes[2]), 0);

  const Codec int4 = *Codec::create({.base = FormatId::kInt4}, 32);
  for (size_t i = 0; i < 32; ++i) x[i] = static_cast<float>(i % 16) - 8.0f;
  const EncodedRows b = encode(int4, x);
  EXPECT_EQ(b.scales[0] | b.scales[1] << 8, 0x3c00);  // scale 1
  EXPECT_EQ(b.scales[2] | b.scales[3] << 8, 0xc800);  // zero -8
  EXPECT_EQ(b.codes[0], 0x10);
  EXPECT_EQ(b.codes[15], 0xfe);
}

TEST(Codec, ThreeBitStreamAlongTokens) {
  const Codec codec = *Codec::create({.base = FormatId::kInt3Channel}, 16);
  std::vector<float> x(16 * 16);
  for (int t = 0; t < 16; ++t) {
    for (int c = 0; c < 16; ++c) x[static_cast<size_t>(t * 16 + c)] = static_cast<float>(t % 8);
  }
  std::vector<uint8_t> codes(16 * 6), scales(16 * 4);
  codec.encode_page(x.data(), 16, {}, {codes.data(), scales.data(), nullptr});
  uint64_t stream = 0;
  for (int i = 0; i < 6; ++i)
    stream |= static_cast<uint64_t>(codes[static_cast<size_t>(6 + i)]) << (8 * i);
  for (int t = 0; t < 16; ++t) EXPECT_EQ(stream >> (3 * t) & 7, static_cast<uint64_t>(t % 8));
}

TEST(Codec, NonFiniteInputIsStoredFiniteAndCounted) {
  for (const FormatInfo& format : all_formats()) {
    if (format.axis == BlockAxis::kToken) continue;
    const Codec codec = *Codec::create({.base = format.id}, 64);
    std::vector<float> x = random_values(64, 7);
    x[3] = kInf;
    x[17] = -kInf;
    x[40] = kNan;
    const EncodedRows out = encode(codec, x);
    EXPECT_EQ(out.stats.non_finite, 3) << format.name;
    EXPECT_EQ(out.stats.saturated, 0) << format.name;
    std::vector<float> back(64);
    codec.decode_rows(out.codes.data(), out.scales.data(), 1, 1.0f, back.data());
    // Inf takes the largest code of its sign: nothing in its block is larger.
    const size_t block = format.block_size > 0 ? static_cast<size_t>(format.block_size) : 64;
    for (size_t i = 0; i < 64; ++i) {
      ASSERT_TRUE(std::isfinite(back[i])) << format.name;
      if (i / block == 3 / block) {
        EXPECT_LE(back[i], back[3]) << format.name;
      }
      if (i / block == 17 / block) {
        EXPECT_GE(back[i], back[17]) << format.name;
      }
    }
  }
}

TEST(Codec, SaturationIsCounted) {
  const Codec fp8 = *Codec::create({.base = FormatId::kFp8}, 16);
  std::vector<float> x(16, 1.0f);
  x[0] = 449.0f;
  x[1] = -1e30f;
  EXPECT_EQ(encode(fp8, x).stats.saturated, 2);
  EXPECT_EQ(encode(fp8, x, 4.0f).stats.saturated, 1);
}

TEST(Codec, RoundTripErrorIsBounded) {
  const struct {
    FormatId id;
    double bound;  // relative L2 on normal values
  } cases[] = {{FormatId::kBf16, 0.003},    {FormatId::kF16, 0.0004},   {FormatId::kFp8, 0.03},
               {FormatId::kFp8Token, 0.03}, {FormatId::kFp8E5m2, 0.06}, {FormatId::kMxfp8, 0.03},
               {FormatId::kInt8, 0.007},    {FormatId::kInt4, 0.1},     {FormatId::kNvfp4, 0.11},
               {FormatId::kMxfp4, 0.13}};
  const std::vector<float> x = random_values(128 * 64, 3);
  for (const auto& c : cases) {
    for (bool rotate : {false, true}) {
      if (rotate && c.id == FormatId::kBf16) continue;
      const Codec codec = *Codec::create({.base = c.id, .rotate = rotate}, 128);
      const EncodedRows out = encode(codec, x);
      std::vector<float> back(x.size());
      codec.decode_rows(out.codes.data(), out.scales.data(), 64, 1.0f, back.data());
      double error = 0, sum = 0;
      for (size_t i = 0; i < x.size(); ++i) {
        error += (x[i] - back[i]) * (x[i] - back[i]);
        sum += x[i] * x[i];
      }
      EXPECT_LT(std::sqrt(error / sum), c.bound) << format_info(c.id).name;
    }
  }
}

TEST(Codec, PageTermsUndoThemselves) {
  constexpr int kTokens = 64;
  constexpr int kDim = 96;
  std::vector<float> x = random_values(kTokens * kDim, 5);
  std::vector<float> bias(kDim), smooth(kDim);
  for (int c = 0; c < kDim; ++c) {
    bias[static_cast<size_t>(c)] = 0.1f * static_cast<float>(c);
    smooth[static_cast<size_t>(c)] = 0.5f + 0.01f * static_cast<float>(c);
    for (int t = 0; t < kTokens; ++t)
      x[static_cast<size_t>(t * kDim + c)] += static_cast<float>(c % 7);
  }
  SideParams params;
  params.bias = bias.data();
  params.smooth = smooth.data();
  for (int bits = 0; bits < 16; ++bits) {
    const SideFormat side = {.base = FormatId::kInt8,
                             .mean = (bits & 1) != 0,
                             .bias = (bits & 2) != 0,
                             .smooth = (bits & 4) != 0,
                             .rotate = (bits & 8) != 0};
    const Result<Codec> codec = Codec::create(side, kDim);
    ASSERT_EQ(bool(codec), !(side.mean && side.bias));
    if (!codec) continue;
    const SideBytes bytes = side_bytes(side, kTokens, kDim);
    std::vector<uint8_t> codes(static_cast<size_t>(bytes.codes)),
        scales(static_cast<size_t>(bytes.scales));
    std::vector<uint16_t> mean(kDim);
    codec->encode_page(x.data(), kTokens, params, {codes.data(), scales.data(), mean.data()});
    const ConstPlanarSide in = {codes.data(), scales.data(), mean.data()};
    std::vector<float> plain(x.size()), stored(x.size());
    codec->decode_page(in, kTokens, params, Codec::Frame::kPlain, plain.data());
    codec->decode_page(in, kTokens, params, Codec::Frame::kStored, stored.data());
    const std::vector<float> q = random_values(kDim, 9);
    std::vector<float> tq(kDim);
    transform_query(side, params, kDim, q.data(), tq.data());
    const float offset = query_offset(side, params, kDim, mean.data(), tq.data());
    for (int t = 0; t < kTokens; ++t) {
      double direct = 0, folded = offset;
      for (int c = 0; c < kDim; ++c) {
        const size_t i = static_cast<size_t>(t * kDim + c);
        ASSERT_NEAR(plain[i], x[i], 0.4f) << bits;
        direct += q[static_cast<size_t>(c)] * plain[i];
        folded += tq[static_cast<size_t>(c)] * stored[i];
      }
      EXPECT_NEAR(direct, folded, 1e-3) << bits;
    }
  }
}

TEST(Codec, OutputTransformFoldsRotationAndBias) {
  constexpr int kDim = 64;
  const SideFormat side = {.base = FormatId::kInt8, .bias = true, .rotate = true};
  const Codec codec = *Codec::create(side, kDim);
  const std::vector<float> x = random_values(16 * kDim, 11), bias = random_values(kDim, 12);
  SideParams params;
  params.bias = bias.data();
  std::vector<uint8_t> codes(16 * kDim), scales(16 * 2 * 2);
  codec.encode_page(x.data(), 16, params, {codes.data(), scales.data(), nullptr});
  std::vector<float> plain(x.size()), stored(x.size()), direct(kDim), folded(kDim);
  codec.decode_page({codes.data(), scales.data(), nullptr}, 16, params, Codec::Frame::kPlain,
                    plain.data());
  codec.decode_page({codes.data(), scales.data(), nullptr}, 16, params, Codec::Frame::kStored,
                    stored.data());
  float weight_sum = 0;
  for (int t = 0; t < 16; ++t) {
    const float weight = 0.01f * static_cast<float>(t + 1);
    weight_sum += weight;
    for (int c = 0; c < kDim; ++c) {
      direct[static_cast<size_t>(c)] += weight * plain[static_cast<size_t>(t * kDim + c)];
      folded[static_cast<size_t>(c)] += weight * stored[static_cast<size_t>(t * kDim + c)];
    }
  }
  transform_output(side, params, kDim, weight_sum, folded.data());
  for (size_t c = 0; c < kDim; ++c) EXPECT_NEAR(direct[c], folded[c], 1e-4);
}

TEST(Codec, RotationScaleIsTheCorrectlyRoundedRoot) {
  EXPECT_EQ(rotation_block(80), 16);
  EXPECT_EQ(rotation_block(96), 32);
  EXPECT_EQ(rotation_block(128), 128);
  EXPECT_EQ(rotation_scale(64), 0.125f);
  // fl(1 / fl(sqrt(2))) and fl(1 / sqrt(2)) are the same number, and so for all odd powers.
  for (int block = 2; block <= 512; block *= 2) {
    EXPECT_EQ(rotation_scale(block), 1.0f / std::sqrt(static_cast<float>(block)));
  }
}

TEST(Codec, RefusesWhatDoesNotFit) {
  EXPECT_EQ(Codec::create({.base = FormatId::kInt8, .four_over_six = true}, 64).error().code(),
            ErrorCode::kInvalidArgument);
  EXPECT_EQ(Codec::create({.base = FormatId::kInt8}, 0).error().code(),
            ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvant::formats
