#include "kvant/base/small_floats.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>

namespace kvant {
namespace {

TEST(SmallFloats, F16RoundTripsEveryFiniteCode) {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    if ((bits & 0x7c00u) == 0x7c00u && (bits & 0x3ffu) != 0) continue;  // NaN payloads
    EXPECT_EQ(to_f16(from_f16(static_cast<uint16_t>(bits))), bits);
  }
}

TEST(SmallFloats, Bf16RoundTripsAndTiesToEven) {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    if ((bits & 0x7f80u) == 0x7f80u && (bits & 0x7fu) != 0) continue;
    EXPECT_EQ(to_bf16(from_bf16(static_cast<uint16_t>(bits))), bits);
  }
  EXPECT_EQ(to_bf16(1.0f + 0x1p-8f), 0x3f80);  // half way, even below
  EXPECT_EQ(to_bf16(1.0f + 3 * 0x1p-8f), 0x3f82);
}

TEST(SmallFloats, F16MatchesTheHardwareTypeOnAWalkOverFp32) {
  for (uint64_t u = 0; u < 0x7f800000u; u += 4099) {
    const float x = std::bit_cast<float>(static_cast<uint32_t>(u));
    const _Float16 h = static_cast<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &h, 2);
    ASSERT_EQ(to_f16(x), bits) << x;
  }
}

TEST(SmallFloats, E2m1DecisionPoints) {
  const struct {
    float x;
    uint8_t code;
  } cases[] = {{0.25f, 0}, {0.2500001f, 1}, {0.75f, 2},
               {1.25f, 2}, {1.2500001f, 3}, {1.75f, 4},
               {2.5f, 4},  {2.5000002f, 5}, {3.5f, 6},
               {5.0f, 6},  {5.0000005f, 7}, {1e30f, 7},
               {-0.0f, 8}, {-3.0f, 13},     {std::numeric_limits<float>::infinity(), 7}};
  for (const auto& c : cases) EXPECT_EQ(to_e2m1(c.x), c.code) << c.x;
}

TEST(SmallFloats, E4m3SaturatesAndKeepsSubnormals) {
  EXPECT_EQ(to_e4m3(464.0f), 0x7e);
  EXPECT_EQ(to_e4m3(1e9f), 0x7e);
  EXPECT_EQ(to_e4m3(-1e9f), 0xfe);
  EXPECT_EQ(to_e4m3(0x1p-9f), 1);
  EXPECT_EQ(to_e4m3(0x1p-10f), 0);  // half the smallest: ties to even
  EXPECT_EQ(to_e4m3(0x1.000002p-10f), 1);
  for (int code = 0; code < 256; ++code) {
    if ((code & 0x7f) == 0x7f) continue;
    EXPECT_EQ(to_e4m3(from_e4m3(static_cast<uint8_t>(code))), code);
  }
}

TEST(SmallFloats, E5m2RoundTripsAndSaturates) {
  EXPECT_EQ(to_e5m2(1e9f), 0x7b);
  for (int code = 0; code < 256; ++code) {
    if ((code & 0x7f) > 0x7b) continue;
    EXPECT_EQ(to_e5m2(from_e5m2(static_cast<uint8_t>(code))), code);
  }
}

}  // namespace
}  // namespace kvant
