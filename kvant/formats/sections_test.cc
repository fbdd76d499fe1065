#include "kvant/formats/sections.h"

#include <gtest/gtest.h>

namespace kvant::formats {
namespace {

TEST(Sections, SizesOfKnownFormats) {
  const struct {
    FormatId id;
    int64_t codes, scales;
  } cases[] = {
      {FormatId::kBf16, 64 * 80 * 2, 0},         {FormatId::kFp8, 64 * 80, 0},
      {FormatId::kFp8Token, 64 * 80, 64 * 4},    {FormatId::kMxfp8, 64 * 80, 64 * 3},
      {FormatId::kInt8, 64 * 80, 64 * 3 * 2},    {FormatId::kInt4, 64 * 40, 64 * 3 * 4},
      {FormatId::kInt4Channel, 64 * 40, 80 * 4}, {FormatId::kInt3Channel, 64 * 30, 80 * 4},
      {FormatId::kInt2Channel, 64 * 20, 80 * 4}, {FormatId::kNvfp4, 64 * 40, 64 * 5},
      {FormatId::kMxfp4, 64 * 40, 64 * 3},
  };
  for (const auto& c : cases) {
    const SideBytes bytes = side_bytes({.base = c.id}, 64, 80);
    EXPECT_EQ(bytes.codes, c.codes) << format_info(c.id).name;
    EXPECT_EQ(bytes.scales, c.scales) << format_info(c.id).name;
    EXPECT_EQ(bytes.mean, 0);
  }
  EXPECT_EQ(side_bytes({.base = FormatId::kInt8, .mean = true}, 64, 80).mean, 160);
}

TEST(Sections, UnitsAreAlignedForEveryPair) {
  for (const FormatInfo& k : all_formats()) {
    for (const FormatInfo& v : all_formats()) {
      for (int page_tokens : {16, 32, 64, 128}) {
        for (int head_dim : {16, 64, 80, 96, 128, 192, 256, 512}) {
          const SideFormat k_side = {.base = k.id, .mean = true};
          const SideFormat v_side = {.base = v.id};
          const UnitSections unit = unit_sections(k_side, v_side, page_tokens, head_dim);
          const SideBytes k_bytes = side_bytes(k_side, page_tokens, head_dim);
          const SideBytes v_bytes = side_bytes(v_side, page_tokens, head_dim);
          EXPECT_EQ(unit.k_codes, 0);
          EXPECT_GE(unit.k_scales - unit.k_codes, k_bytes.codes);
          EXPECT_GE(unit.k_mean - unit.k_scales, k_bytes.scales);
          EXPECT_GE(unit.v_codes - unit.k_mean, k_bytes.mean);
          EXPECT_GE(unit.v_scales - unit.v_codes, v_bytes.codes);
          EXPECT_GE(unit.bytes - unit.v_scales, v_bytes.scales);
          const int64_t sum =
              k_bytes.codes + k_bytes.scales + k_bytes.mean + v_bytes.codes + v_bytes.scales;
          EXPECT_LT(unit.bytes, sum + 5 * kSectionAlignment);
          for (int64_t offset :
               {unit.k_scales, unit.k_mean, unit.v_codes, unit.v_scales, unit.bytes}) {
            EXPECT_EQ(offset % kSectionAlignment, 0);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace kvant::formats
