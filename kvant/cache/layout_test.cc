#include "kvant/cache/layout.h"

#include <gtest/gtest.h>

#include <bit>
#include <cstring>
#include <string>
#include <vector>

#include "kvant/base/small_floats.h"
#include "kvant/cache/testing/cache_harness.h"

namespace kvant::cache {
namespace {

using formats::FormatId;
using formats::FormatInfo;
using formats::SideFormat;
using testing::next_random;

constexpr int kHeadDims[] = {64, 80, 96, 128, 192, 256};
constexpr int kPageTokens[] = {16, 32, 64, 128};

SideFormat side_of(FormatId base) {
  SideFormat side;
  side.base = base;
  return side;
}

// Calls f(shape, name) for every format, role, page size and head_dim.
template <typename F>
void for_each_shape(F&& f) {
  for (const FormatInfo& info : formats::all_formats()) {
    for (const SideRole role : {SideRole::kKeys, SideRole::kValues}) {
      if (!(role == SideRole::kKeys ? info.for_keys : info.for_values)) continue;
      for (const int page_tokens : kPageTokens) {
        for (const int head_dim : kHeadDims) {
          const SideShape shape{side_of(info.id), role, page_tokens, head_dim};
          f(shape, std::string(info.name) + (role == SideRole::kKeys ? " k" : " v") +
                       " page_tokens " + std::to_string(page_tokens) + " head_dim " +
                       std::to_string(head_dim));
        }
      }
    }
  }
}

// Marks the bits of a field; false if one is outside the section or taken already.
bool mark(std::vector<bool>& taken, const BitField& field) {
  for (int64_t bit = field.bit; bit < field.bit + field.width; ++bit) {
    if (bit < 0 || bit >= static_cast<int64_t>(taken.size()) || taken[bit]) return false;
    taken[bit] = true;
  }
  return true;
}

TEST(Layout, EveryCodeBitHasExactlyOnePlace) {
  for (const Layout layout : {Layout::kPlanar, Layout::kCpu, Layout::kSm90}) {
    for_each_shape([&](const SideShape& shape, const std::string& name) {
      const int64_t bytes =
          formats::side_bytes(shape.format, shape.page_tokens, shape.head_dim).codes;
      const int code_bits = formats::format_info(shape.format.base).code_bits;
      std::vector<bool> taken(bytes * 8, false);
      bool distinct = true;
      int64_t bits = 0;
      for (int token = 0; token < shape.page_tokens; ++token) {
        for (int channel = 0; channel < shape.head_dim; ++channel) {
          const ElementPlace place = code_place(layout, shape, token, channel);
          uint32_t element_bits = 0;
          for (int f = 0; f < place.num_fields; ++f) {
            const BitField& field = place.fields[f];
            distinct = distinct && mark(taken, field);
            element_bits |= ((1u << field.width) - 1u) << field.shift;
            bits += field.width;
          }
          distinct = distinct && element_bits == (1u << code_bits) - 1u;
        }
      }
      EXPECT_TRUE(distinct) << name;
      EXPECT_EQ(bits, bytes * 8) << name;  // so every bit of the section is taken
    });
  }
}

TEST(Layout, EveryScaleByteHasExactlyOnePlace) {
  for (const Layout layout : {Layout::kPlanar, Layout::kCpu, Layout::kSm90}) {
    for_each_shape([&](const SideShape& shape, const std::string& name) {
      const int64_t bytes =
          formats::side_bytes(shape.format, shape.page_tokens, shape.head_dim).scales;
      const ScaleGrid grid = scale_grid(shape);
      std::vector<bool> taken(bytes * 8, false);
      bool distinct = true;
      for (int row = 0; row < grid.num_rows; ++row) {
        for (int block = 0; block < grid.num_blocks; ++block) {
          for (int part = 0; part < grid.num_parts; ++part) {
            const int64_t byte = scale_place(layout, shape, row, block, part);
            distinct = distinct && mark(taken, {byte * 8, grid.part_bytes * 8, 0});
          }
        }
      }
      EXPECT_TRUE(distinct) << name;
      EXPECT_EQ(
          static_cast<int64_t>(grid.num_rows) * grid.num_blocks * grid.num_parts * grid.part_bytes,
          bytes)
          << name;
    });
  }
}

std::vector<std::byte> random_unit(const UnitShape& shape, uint64_t& seed) {
  const formats::UnitSections sections =
      formats::unit_sections(shape.k, shape.v, shape.page_tokens, shape.head_dim);
  std::vector<std::byte> unit(sections.bytes, std::byte{0});
  const auto fill = [&](int64_t offset, int64_t bytes) {
    for (int64_t i = 0; i < bytes; ++i)
      unit[offset + i] = static_cast<std::byte>(next_random(seed) >> 56);
  };
  const formats::SideBytes k = formats::side_bytes(shape.k, shape.page_tokens, shape.head_dim);
  const formats::SideBytes v = formats::side_bytes(shape.v, shape.page_tokens, shape.head_dim);
  fill(sections.k_codes, k.codes);
  fill(sections.k_scales, k.scales);
  fill(sections.k_mean, k.mean);
  fill(sections.v_codes, v.codes);
  fill(sections.v_scales, v.scales);
  return unit;
}

uint32_t element_at(const uint8_t* section, const ElementPlace& place) {
  uint32_t code = 0;
  for (int f = 0; f < place.num_fields; ++f) {
    const BitField& field = place.fields[f];
    for (int i = 0; i < field.width; ++i) {
      const int64_t bit = field.bit + i;
      code |= static_cast<uint32_t>(section[bit / 8] >> (bit % 8) & 1) << (field.shift + i);
    }
  }
  return code;
}

// Codes and scales of `unit` in `layout` equal those of `planar`, place by place.
bool same_elements(const SideShape& shape, const formats::ConstPlanarSide& planar, Layout layout,
                   const formats::ConstPlanarSide& side) {
  for (int token = 0; token < shape.page_tokens; ++token) {
    for (int channel = 0; channel < shape.head_dim; ++channel) {
      if (element_at(planar.codes, code_place(Layout::kPlanar, shape, token, channel)) !=
          element_at(side.codes, code_place(layout, shape, token, channel)))
        return false;
    }
  }
  const ScaleGrid grid = scale_grid(shape);
  for (int row = 0; row < grid.num_rows; ++row) {
    for (int block = 0; block < grid.num_blocks; ++block) {
      for (int part = 0; part < grid.num_parts; ++part) {
        if (std::memcmp(planar.scales + scale_place(Layout::kPlanar, shape, row, block, part),
                        side.scales + scale_place(layout, shape, row, block, part),
                        grid.part_bytes) != 0)
          return false;
      }
    }
  }
  return true;
}

TEST(Layout, ConvertersFollowTheDefinitionAndAreExact) {
  uint64_t seed = 1;
  for_each_shape([&](const SideShape& side, const std::string& name) {
    // The larger shapes differ from these only by more tiles.
    if (side.page_tokens * side.head_dim > 64 * 96) return;
    const bool keys = side.role == SideRole::kKeys;
    UnitShape shape{keys ? side.format : SideFormat{}, keys ? SideFormat{} : side.format,
                    side.page_tokens, side.head_dim};
    shape.k.mean = keys && side.format.base != FormatId::kBf16;
    const formats::UnitSections sections =
        formats::unit_sections(shape.k, shape.v, shape.page_tokens, shape.head_dim);
    const std::vector<std::byte> planar = random_unit(shape, seed);
    const auto convert = [&](Layout from, const std::vector<std::byte>& unit, Layout to) {
      std::vector<std::byte> result(sections.bytes, std::byte{0xcd});
      convert_unit(shape, from, unit.data(), to, result.data());
      return result;
    };
    const std::vector<std::byte> cpu = convert(Layout::kPlanar, planar, Layout::kCpu);
    const std::vector<std::byte> sm90 = convert(Layout::kPlanar, planar, Layout::kSm90);
    EXPECT_TRUE(convert(Layout::kCpu, cpu, Layout::kPlanar) == planar) << name;
    EXPECT_TRUE(convert(Layout::kSm90, sm90, Layout::kPlanar) == planar) << name;
    EXPECT_TRUE(convert(Layout::kCpu, cpu, Layout::kSm90) == sm90) << name;
    EXPECT_TRUE(convert(Layout::kSm90, sm90, Layout::kCpu) == cpu) << name;
    EXPECT_TRUE(convert(Layout::kPlanar, planar, Layout::kPlanar) == planar) << name;
    const SideShape checked = keys ? shape.keys() : shape.values();
    const auto planar_side = side_of_unit(planar.data(), sections, checked);
    EXPECT_TRUE(same_elements(checked, planar_side, Layout::kCpu,
                              side_of_unit(cpu.data(), sections, checked)))
        << name;
    EXPECT_TRUE(same_elements(checked, planar_side, Layout::kSm90,
                              side_of_unit(sm90.data(), sections, checked)))
        << name;
  });
}

// ---- the documents' own statements, pinned ----

TEST(Layout, CpuWordsAreThoseOfTheDecisionRecord) {
  const SideShape k{side_of(FormatId::kNvfp4), SideRole::kKeys, 64, 128};
  // Token 21 is lane 5 of tile 1; channels 16..23 are group 2: word (1 * 16 + 2) * 16 + 5.
  EXPECT_EQ(code_place(Layout::kCpu, k, 21, 19).fields[0].bit, ((16 + 2) * 16 + 5) * 32 + 3 * 4);
  const SideShape v{side_of(FormatId::kNvfp4), SideRole::kValues, 64, 128};
  // Channel 19 is lane 3 of group 1; token 21 is in word group 2, place 5.
  EXPECT_EQ(code_place(Layout::kCpu, v, 21, 19).fields[0].bit, ((8 + 2) * 16 + 3) * 32 + 5 * 4);
  // K scales [tile][block][16 tokens], V scales [block][tokens].
  EXPECT_EQ(scale_place(Layout::kCpu, k, 21, 3, 0), (8 + 3) * 16 + 5);
  EXPECT_EQ(scale_place(Layout::kCpu, v, 21, 3, 0), 3 * 64 + 21);
  const SideShape pairs{side_of(FormatId::kInt4), SideRole::kKeys, 64, 128};
  EXPECT_EQ(scale_place(Layout::kCpu, pairs, 21, 3, 1), ((4 + 3) * 32 + 16 + 5) * 2);
  const SideShape channel{side_of(FormatId::kInt4Channel), SideRole::kKeys, 64, 128};
  EXPECT_EQ(scale_place(Layout::kCpu, channel, 7, 0, 0), 14);
  EXPECT_EQ(scale_place(Layout::kCpu, channel, 7, 0, 1), 256 + 14);
}

// The decoding sequence that the permuted E2M1 word was made for: registers 0..3 as pairs of fp16
// with the sign at bit 15 and the three magnitude bits at 11..9.
TEST(Layout, Sm90Fp4WordsDecodeWithMasksAndMultiplies) {
  const SideShape shape{side_of(FormatId::kNvfp4), SideRole::kKeys, 16, 64};
  std::vector<uint8_t> planar(16 * 32), words(16 * 32);
  uint64_t seed = 3;
  for (uint8_t& byte : planar) byte = static_cast<uint8_t>(next_random(seed) >> 56);
  std::vector<uint8_t> scales(16 * 4), other_scales(16 * 4);
  convert_side(shape, Layout::kPlanar, {planar.data(), scales.data(), nullptr}, Layout::kSm90,
               {words.data(), other_scales.data(), nullptr});
  const auto code = [&](int token, int channel) -> uint32_t {
    return planar[token * 32 + channel / 2] >> (channel % 2 * 4) & 15;
  };
  const auto fp16 = [](uint32_t e2m1) { return (e2m1 >> 3) << 15 | (e2m1 & 7) << 9; };
  constexpr uint32_t kMask = 0x8e008e00u;
  for (int lane = 0; lane < 32; ++lane) {
    for (int step = 0; step < 4; ++step) {
      uint32_t w;
      std::memcpy(&w, words.data() + (lane * 4 + step) * 4, 4);
      const uint32_t registers[4] = {w & kMask, (w << 3) & kMask, ((w & 0x40384038u) * 66) & kMask,
                                     ((w & 0x20072007u) * 516) & kMask};
      for (int r = 0; r < 4; ++r) {
        const int token = lane / 4 + 8 * (r % 2);
        const int channel = step * 16 + 2 * (lane % 4) + 8 * (r / 2);
        EXPECT_EQ(registers[r], fp16(code(token, channel)) | fp16(code(token, channel + 1)) << 16);
      }
    }
  }
}

TEST(Layout, Sm90Int4WordsAndOperandOfScalesAreNatural) {
  const SideShape shape{side_of(FormatId::kInt4Channel), SideRole::kKeys, 16, 64};
  // Rows 0..7 under mask 000F000F, rows 8..15 under 00F000F0, columns + 8 the same after >> 8.
  EXPECT_EQ(code_place(Layout::kSm90, shape, 3, 5).fields[0].bit, ((3 * 4 + 2) * 4) * 32 + 16);
  EXPECT_EQ(code_place(Layout::kSm90, shape, 11, 4).fields[0].bit, ((3 * 4 + 2) * 4) * 32 + 4);
  EXPECT_EQ(code_place(Layout::kSm90, shape, 3, 12).fields[0].bit, ((3 * 4 + 2) * 4) * 32 + 8);
  // Zeros of channels 2t, 2t + 1, scales of the same, zeros and scales of 2t + 8, 2t + 9.
  EXPECT_EQ(scale_place(Layout::kSm90, shape, 16 + 5, 0, 1), (32 + 2 * 8 + 1) * 2);
  EXPECT_EQ(scale_place(Layout::kSm90, shape, 16 + 5, 0, 0), (32 + 2 * 8 + 3) * 2);
  EXPECT_EQ(scale_place(Layout::kSm90, shape, 16 + 12, 0, 1), (32 + 2 * 8 + 4) * 2);
}

TEST(Layout, Bf16TokensAreReadBackFromEveryLayout) {
  for (const Layout layout : {Layout::kPlanar, Layout::kCpu, Layout::kSm90}) {
    for (const int head_dim : {16, 80, 128}) {
      const int page_tokens = 32;
      std::vector<std::byte> unit(formats::unit_sections({}, {}, page_tokens, head_dim).bytes);
      uint64_t seed = 5;
      std::vector<float> k(page_tokens * head_dim), v(page_tokens * head_dim);
      for (size_t i = 0; i < k.size(); ++i) {
        k[i] = static_cast<float>(next_random(seed) % 512);
        v[i] = -static_cast<float>(next_random(seed) % 512) / 256.0f;
      }
      for (int token = page_tokens - 1; token >= 0; --token)
        write_f32_token(layout, page_tokens, head_dim, unit.data(), token,
                        k.data() + token * head_dim, v.data() + token * head_dim);
      for (const int num_tokens : {1, 15, 16, 27, page_tokens}) {
        const size_t n = static_cast<size_t>(num_tokens * head_dim);
        std::vector<float> read(n + 1, 7.0f);
        read_bf16_side(layout, page_tokens, head_dim, unit.data(), SideRole::kKeys, num_tokens,
                       read.data());
        for (size_t i = 0; i < n; ++i) ASSERT_EQ(read[i], from_bf16(to_bf16(k[i]))) << i;
        read_bf16_side(layout, page_tokens, head_dim, unit.data(), SideRole::kValues, num_tokens,
                       read.data());
        for (size_t i = 0; i < n; ++i) ASSERT_EQ(read[i], from_bf16(to_bf16(v[i]))) << i;
        ASSERT_EQ(read[n], 7.0f);
      }
    }
  }
}

// Rounding, overflow, NaN and signed zeros are those of to_bf16 in every layout.
TEST(Layout, RowsAreRoundedLikeSingleValues) {
  constexpr int kHeadDim = 256, kTokens = 16;
  std::vector<float> k(kHeadDim), v(kHeadDim);
  for (uint32_t i = 0; i < kHeadDim; ++i) {
    k[i] = std::bit_cast<float>(i << 24 | (i % 4 * 0x4000u + i % 3 + 0x3fffu));
    v[i] = std::bit_cast<float>(i << 24 | 0x00ff8000u | i % 2 << 16);
  }
  v[1] = std::bit_cast<float>(0x7f800001u);
  v[2] = std::bit_cast<float>(0xff800000u);
  v[3] = -0.0f;
  for (const Layout layout : {Layout::kPlanar, Layout::kCpu, Layout::kSm90}) {
    std::vector<std::byte> unit(formats::unit_sections({}, {}, kTokens, kHeadDim).bytes);
    write_f32_token(layout, kTokens, kHeadDim, unit.data(), 5, k.data(), v.data());
    std::vector<float> read(kTokens * kHeadDim);
    for (const SideRole role : {SideRole::kKeys, SideRole::kValues}) {
      const std::vector<float>& x = role == SideRole::kKeys ? k : v;
      read_bf16_side(layout, kTokens, kHeadDim, unit.data(), role, kTokens, read.data());
      for (int c = 0; c < kHeadDim; ++c) {
        ASSERT_EQ(std::bit_cast<uint32_t>(read[5 * kHeadDim + c]),
                  std::bit_cast<uint32_t>(from_bf16(to_bf16(x[c]))))
            << c;
      }
    }
  }
}

// The inline offsets of layout.h are the definition's.
TEST(Layout, Bf16OffsetsOfTheCpuLayoutAgreeWithTheDefinition) {
  const SideShape k{{}, SideRole::kKeys, 64, 80};
  const SideShape v{{}, SideRole::kValues, 64, 80};
  for (int token = 0; token < 64; ++token) {
    for (int channel = 0; channel < 80; ++channel) {
      ASSERT_EQ(cpu_bf16_key_offset(80, token, channel) * 8,
                code_place(Layout::kCpu, k, token, channel).fields[0].bit);
      ASSERT_EQ(cpu_bf16_value_offset(64, token, channel) * 8,
                code_place(Layout::kCpu, v, token, channel).fields[0].bit);
    }
  }
}

}  // namespace
}  // namespace kvant::cache
