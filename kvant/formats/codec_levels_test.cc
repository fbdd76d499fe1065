// Every level gives the bits of the scalar code: random and edge values, every format and option,
// every page size, odd lengths.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "kvant/formats/codec.h"
#include "kvant/formats/sections.h"

namespace kvant::formats {
namespace {

std::vector<CpuLevel> simd_levels() {
  std::vector<CpuLevel> levels;
  for (CpuLevel level : {CpuLevel::kAvx2, CpuLevel::kAvx512}) {
    if (level <= detect_cpu_level()) levels.push_back(level);
  }
  return levels;
}

// What the values look like; each kind reaches other branches.
enum class Kind {
  kNormal,
  kOutliers,
  kTiny,
  kHuge,
  kZeros,
  kTies,
  kRandomBits,
  kNonFinite,
  kCount
};

class Generator {
 public:
  explicit Generator(uint64_t seed) : random_(seed) {}

  std::vector<float> values(size_t n, Kind kind) {
    std::vector<float> x(n);
    for (float& value : x) value = next(kind);
    return x;
  }
  float uniform(float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(random_);
  }

 private:
  float next(Kind kind) {
    const float normal = normal_(random_);
    const uint32_t bits = static_cast<uint32_t>(random_());
    switch (kind) {
      case Kind::kNormal: return normal;
      case Kind::kOutliers: return bits % 37 == 0 ? normal * 300.0f : normal;
      case Kind::kTiny:
        return std::bit_cast<float>(bits & 0x807fffffu) * (bits % 5 == 0 ? 1e4f : 1.0f);
      case Kind::kHuge: return normal * (bits % 3 == 0 ? 1e38f : 1e5f);
      case Kind::kZeros: return bits % 3 == 0 ? normal : bits % 3 == 1 ? 0.0f : -0.0f;
      case Kind::kTies: return static_cast<float>(static_cast<int>(bits % 257) - 128) * 0.125f;
      case Kind::kRandomBits: {
        const float x = std::bit_cast<float>(bits);
        return std::isfinite(x) ? x : 1.0f;
      }
      default:
        return bits % 61 == 0
                   ? std::bit_cast<float>(0x7f800000u | (bits & 0x80000000u) | (bits % 2))
                   : normal;
    }
  }
  std::mt19937_64 random_;
  std::normal_distribution<float> normal_{0.0f, 1.0f};
};

// Bits, except that any NaN equals any NaN (only never-stored codes decode to one).
testing::AssertionResult same_floats(const std::vector<float>& a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isnan(a[i]) && std::isnan(b[i])) continue;
    if (std::bit_cast<uint32_t>(a[i]) != std::bit_cast<uint32_t>(b[i])) {
      return testing::AssertionFailure() << "value " << i << ": " << a[i] << " and " << b[i];
    }
  }
  return testing::AssertionSuccess();
}

template <typename T>
testing::AssertionResult same_codes(const std::vector<T>& a, const std::vector<T>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i]) {
      return testing::AssertionFailure() << "at " << i << ": " << int{a[i]} << " and " << int{b[i]};
    }
  }
  return testing::AssertionSuccess();
}

std::string label(const SideFormat& side, CpuLevel level, int dim, int kind) {
  CacheFormat format;
  format.k = side;
  return canonical_name(format) + " " + std::string(cpu_level_name(level)) + " head_dim " +
         std::to_string(dim) + " kind " + std::to_string(kind);
}

void compare_rows(const SideFormat& side, int dim, int rows, Kind kind, float g,
                  Generator& generator) {
  const Codec scalar = *Codec::create(side, dim);
  const std::vector<float> x = generator.values(static_cast<size_t>(rows * dim), kind);
  std::vector<uint8_t> codes(static_cast<size_t>(rows * scalar.row_code_bytes()) + 1, 0xaa);
  std::vector<uint8_t> scales(static_cast<size_t>(rows * scalar.row_scale_bytes()) + 1, 0xaa);
  std::vector<float> decoded(x.size() + 1, 7.0f);
  const EncodeStats stats = scalar.encode_rows(x.data(), rows, g, codes.data(), scales.data());
  scalar.decode_rows(codes.data(), scales.data(), rows, g, decoded.data());
  for (CpuLevel level : simd_levels()) {
    const Codec codec = *Codec::create(side, dim, level);
    std::vector<uint8_t> codes2(codes.size(), 0xaa), scales2(scales.size(), 0xaa);
    std::vector<float> decoded2(decoded.size(), 7.0f);
    const EncodeStats stats2 = codec.encode_rows(x.data(), rows, g, codes2.data(), scales2.data());
    codec.decode_rows(codes.data(), scales.data(), rows, g, decoded2.data());
    const std::string where = label(side, level, dim, static_cast<int>(kind));
    ASSERT_TRUE(same_codes(scales, scales2)) << where;
    ASSERT_TRUE(same_codes(codes, codes2)) << where;
    ASSERT_TRUE(same_floats(decoded, decoded2)) << where;
    ASSERT_EQ(stats.non_finite, stats2.non_finite) << where;
    ASSERT_EQ(stats.saturated, stats2.saturated) << where;
  }
}

TEST(CodecLevels, RowsOfEveryFormatAndLength) {
  Generator generator(1);
  for (const FormatInfo& format : all_formats()) {
    if (format.axis == BlockAxis::kToken) continue;
    for (const bool rotate : {false, true}) {
      for (const bool four_over_six : {false, true}) {
        const SideFormat side = {
            .base = format.id, .rotate = rotate, .four_over_six = four_over_six};
        for (const int dim : {1, 7, 16, 20, 33, 48, 64, 72, 80, 96, 128, 192, 256, 512}) {
          if (!Codec::create(side, dim)) continue;
          for (int kind = 0; kind < static_cast<int>(Kind::kCount); ++kind) {
            const float g = kind % 2 == 0 ? 1.0f : std::exp2(generator.uniform(-12.0f, 6.0f));
            compare_rows(side, dim, 1 + dim % 5 + kind * 3, static_cast<Kind>(kind), g, generator);
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

TEST(CodecLevels, ManyValuesOfTheGlobalScale) {
  Generator generator(2);
  for (const FormatInfo& format : all_formats()) {
    if (format.global_scale == GlobalScale::kNone) continue;
    for (const bool four_over_six : {false, true}) {
      const SideFormat side = {.base = format.id, .four_over_six = four_over_six};
      if (!Codec::create(side, 64)) continue;
      for (int exponent = -149; exponent <= 127; ++exponent) {
        for (const float mantissa : {1.0f, 1.3f, 1.9999999f}) {
          const float g = std::ldexp(mantissa, exponent);
          if (g == 0.0f || !std::isfinite(g)) continue;
          for (const Kind kind : {Kind::kNormal, Kind::kTiny, Kind::kRandomBits, Kind::kHuge}) {
            compare_rows(side, 64, 3, kind, g, generator);
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

TEST(CodecLevels, EveryCodeAndScaleDecodesAlike) {
  // All pairs of code and scale byte, also those that encoders never store.
  Generator generator(3);
  for (const FormatInfo& format : all_formats()) {
    if (format.axis == BlockAxis::kToken) continue;
    const Codec scalar = *Codec::create({.base = format.id}, 256);
    const int rows = 256;
    std::vector<uint8_t> codes(static_cast<size_t>(rows * scalar.row_code_bytes()));
    std::vector<uint8_t> scales(static_cast<size_t>(rows * scalar.row_scale_bytes()));
    for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(i * 167 + i / 256);
    for (size_t i = 0; i < scales.size(); ++i) scales[i] = static_cast<uint8_t>(i * 59 + i / 256);
    for (const float g : {1.0f, 0.37f, 1e-40f}) {
      std::vector<float> x(static_cast<size_t>(rows) * 256);
      scalar.decode_rows(codes.data(), scales.data(), rows, g, x.data());
      for (CpuLevel level : simd_levels()) {
        const Codec codec = *Codec::create({.base = format.id}, 256, level);
        std::vector<float> x2(x.size());
        codec.decode_rows(codes.data(), scales.data(), rows, g, x2.data());
        ASSERT_TRUE(same_floats(x, x2)) << format.name << " " << cpu_level_name(level);
      }
    }
  }
}

struct Page {
  std::vector<uint8_t> codes, scales;
  std::vector<uint16_t> mean;
  std::vector<float> plain, stored;
  EncodeStats stats;
};

Page run_page(const Codec& codec, const std::vector<float>& x, int tokens,
              const SideParams& params) {
  const SideBytes bytes = side_bytes(codec.side(), tokens, codec.head_dim());
  Page page;
  page.codes.assign(static_cast<size_t>(bytes.codes), 0xaa);
  page.scales.assign(static_cast<size_t>(bytes.scales), 0xaa);
  page.mean.assign(static_cast<size_t>(codec.head_dim()), 0xaaaa);
  page.plain.resize(x.size());
  page.stored.resize(x.size());
  page.stats = codec.encode_page(x.data(), tokens, params,
                                 {page.codes.data(), page.scales.data(), page.mean.data()});
  const ConstPlanarSide in = {page.codes.data(), page.scales.data(), page.mean.data()};
  codec.decode_page(in, tokens, params, Codec::Frame::kPlain, page.plain.data());
  codec.decode_page(in, tokens, params, Codec::Frame::kStored, page.stored.data());
  return page;
}

void compare_pages(const SideFormat& side, int dim, int tokens, Kind kind, Generator& generator) {
  SideParams params;
  params.global_scale = std::exp2(generator.uniform(-9.0f, 1.0f));
  const std::vector<float> bias = generator.values(static_cast<size_t>(dim), Kind::kOutliers);
  std::vector<float> smooth(static_cast<size_t>(dim));
  for (float& value : smooth) value = generator.uniform(0.1f, 4.0f);
  params.bias = bias.data();
  params.smooth = smooth.data();
  const std::vector<float> x = generator.values(static_cast<size_t>(tokens * dim), kind);
  const Page expected = run_page(*Codec::create(side, dim), x, tokens, params);
  for (CpuLevel level : simd_levels()) {
    const Page page = run_page(*Codec::create(side, dim, level), x, tokens, params);
    const std::string where = label(side, level, dim, static_cast<int>(kind));
    ASSERT_TRUE(same_codes(expected.mean, page.mean)) << where;
    ASSERT_TRUE(same_codes(expected.scales, page.scales)) << where;
    ASSERT_TRUE(same_codes(expected.codes, page.codes)) << where;
    ASSERT_TRUE(same_floats(expected.plain, page.plain)) << where;
    ASSERT_TRUE(same_floats(expected.stored, page.stored)) << where;
    ASSERT_EQ(expected.stats.non_finite, page.stats.non_finite) << where;
    ASSERT_EQ(expected.stats.saturated, page.stats.saturated) << where;
  }
}

TEST(CodecLevels, PagesOfEveryFormatAndOption) {
  Generator generator(4);
  for (const FormatInfo& format : all_formats()) {
    for (int bits = 0; bits < 32; ++bits) {
      const SideFormat side = {.base = format.id,
                               .mean = (bits & 1) != 0,
                               .bias = (bits & 2) != 0,
                               .smooth = (bits & 4) != 0,
                               .rotate = (bits & 8) != 0,
                               .four_over_six = (bits & 16) != 0};
      if (!Codec::create(side, 64)) continue;
      for (const int dim : {16, 64, 80, 128}) {
        for (const int tokens : {16, 64}) {
          const Kind kind =
              static_cast<Kind>((bits + dim / 16 + tokens / 16) % static_cast<int>(Kind::kCount));
          compare_pages(side, dim, tokens, kind, generator);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST(CodecLevels, ChannelPagesOfEveryKindAndSize) {
  Generator generator(5);
  for (const FormatId id :
       {FormatId::kInt4Channel, FormatId::kInt3Channel, FormatId::kInt2Channel}) {
    for (const int tokens : {16, 32, 64, 128}) {
      for (const int dim : {16, 48, 80, 256}) {
        for (int kind = 0; kind < static_cast<int>(Kind::kCount); ++kind) {
          compare_pages({.base = id}, dim, tokens, static_cast<Kind>(kind), generator);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

}  // namespace
}  // namespace kvant::formats
