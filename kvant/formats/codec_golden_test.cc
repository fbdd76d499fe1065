// The codecs of every level against files that tests/golden/codecs/make_golden.py made with
// ml_dtypes and numpy: 0 mismatches. A failure names the case; the script's own functions show the
// expected steps.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "kvant/base/small_floats.h"
#include "kvant/formats/codec.h"

namespace kvant::formats {
namespace {

std::vector<CpuLevel> levels() {
  std::vector<CpuLevel> result;
  for (CpuLevel level : {CpuLevel::kScalar, CpuLevel::kAvx2, CpuLevel::kAvx512}) {
    if (level <= detect_cpu_level()) result.push_back(level);
  }
  return result;
}

// Words of each line that is no comment.
std::vector<std::vector<std::string>> read_lines(const std::string& name) {
  std::ifstream file(std::string(KVANT_GOLDEN_DIR "/") + name);
  std::vector<std::vector<std::string>> lines;
  std::string line;
  while (std::getline(file, line)) {
    if (line.starts_with('#')) continue;
    std::istringstream words(line);
    lines.emplace_back(std::istream_iterator<std::string>(words),
                       std::istream_iterator<std::string>());
  }
  return lines;
}

uint32_t hex(const std::string& text) {
  return static_cast<uint32_t>(std::stoul(text, nullptr, 16));
}
float hex_float(const std::string& text) {
  return std::bit_cast<float>(hex(text));
}

uint32_t crc32(const void* data, size_t bytes) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> entries{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t value = i;
      for (int bit = 0; bit < 8; ++bit)
        value = (value >> 1) ^ ((value & 1u) != 0 ? 0xedb88320u : 0u);
      entries[i] = value;
    }
    return entries;
  }();
  uint32_t crc = 0xffffffffu;
  const uint8_t* p = static_cast<const uint8_t*>(data);
  for (size_t i = 0; i < bytes; ++i) crc = table[(crc ^ p[i]) & 0xffu] ^ (crc >> 8);
  return ~crc;
}

std::vector<float> all_inputs(const std::string& kind) {
  std::vector<float> x(65536);
  for (uint32_t i = 0; i < 65536; ++i) {
    x[i] =
        kind == "bf16" ? from_bf16(static_cast<uint16_t>(i)) : from_f16(static_cast<uint16_t>(i));
  }
  return x;
}

SideFormat side_of(const std::string& kv) {
  const Result<CacheFormat> format = parse_cache_format("k=" + kv + ",v=bf16");
  EXPECT_TRUE(format) << kv;
  return format->k;
}

// Encodes values of a format without blocks, or E2M1 codes (scalar only).
std::vector<uint8_t> encode_elements(const std::string& name, CpuLevel level,
                                     const std::vector<float>& x, float g) {
  std::vector<uint8_t> codes(x.size());
  if (name == "e2m1") {
    for (size_t i = 0; i < x.size(); ++i) codes[i] = std::isnan(x[i]) ? uint8_t{0} : to_e2m1(x[i]);
    return codes;
  }
  const Codec codec = *Codec::create(side_of(name), static_cast<int>(x.size()), level);
  codec.encode_rows(x.data(), 1, g, codes.data(), nullptr);
  return codes;
}

TEST(CodecGolden, Elements) {
  size_t num_encode = 0, num_decode = 0, num_midpoints = 0;
  for (const std::vector<std::string>& line : read_lines("elements.txt")) {
    if (line[0] == "decode") {
      ++num_decode;
      for (size_t code = 0; code + 2 < line.size(); ++code) {
        const uint8_t c = static_cast<uint8_t>(code);
        const float value = line[1] == "e2m1"   ? from_e2m1(c)
                            : line[1] == "e4m3" ? from_e4m3(c)
                            : line[1] == "e5m2" ? from_e5m2(c)
                                                : from_e8m0(c);
        if (line[code + 2] == "nan") {
          EXPECT_TRUE(std::isnan(value)) << line[1] << " code " << code;
        } else {
          EXPECT_EQ(std::bit_cast<uint32_t>(value), hex(line[code + 2]))
              << line[1] << " code " << code;
        }
      }
      continue;
    }
    const bool sweep = line[0] == "encode";
    const size_t first = sweep ? 4 : 3;
    const float g = hex_float(line[first - 1]);
    std::vector<float> x;
    std::vector<uint8_t> expected;
    if (sweep) {
      ++num_encode;
      x = all_inputs(line[2]);
      for (size_t i = first; i < line.size(); ++i) {
        const size_t star = line[i].find('*');
        expected.insert(expected.end(), std::stoul(line[i].substr(star + 1)),
                        static_cast<uint8_t>(hex(line[i].substr(0, star))));
      }
    } else {
      num_midpoints += line.size() - first;
      for (size_t i = first; i < line.size(); ++i) {
        x.push_back(hex_float(line[i].substr(0, 8)));
        expected.push_back(static_cast<uint8_t>(hex(line[i].substr(9))));
      }
    }
    ASSERT_EQ(x.size(), expected.size());
    for (CpuLevel level : levels()) {
      const std::vector<uint8_t> codes = encode_elements(line[1], level, x, g);
      for (size_t i = 0; i < x.size(); ++i) {
        ASSERT_EQ(int{codes[i]}, int{expected[i]})
            << line[1] << " " << cpu_level_name(level) << " g " << g << " x " << x[i] << " ("
            << std::hex << std::bit_cast<uint32_t>(x[i]) << ")";
      }
    }
  }
  EXPECT_EQ(num_decode, 4u);
  EXPECT_EQ(num_encode, 54u);
  EXPECT_GT(num_midpoints, 25000u);
}

TEST(CodecGolden, MidpointsOfSixteenBitFormats) {
  // Between codes c and c + 1 the midpoint goes to the even one, its neighbours to the nearer.
  for (const auto& [id, count] :
       {std::pair(FormatId::kBf16, 0x7f7fu), std::pair(FormatId::kF16, 0x7bffu)}) {
    std::vector<float> x;
    std::vector<uint16_t> expected;
    for (uint32_t c = 0; c < count; ++c) {
      const auto value = [&, format = id](uint32_t code) {
        const uint16_t half = static_cast<uint16_t>(code);
        return format == FormatId::kBf16 ? from_bf16(half) : from_f16(half);
      };
      const float middle = static_cast<float>((static_cast<double>(value(c)) + value(c + 1)) / 2);
      for (const float sign : {1.0f, -1.0f}) {
        const uint32_t bit = sign < 0 ? 0x8000u : 0u;
        x.insert(x.end(), {sign * std::nextafter(middle, 0.0f), sign * middle,
                           sign * std::nextafter(middle, INFINITY)});
        for (const uint32_t code : {c, c + (c & 1u), c + 1})
          expected.push_back(static_cast<uint16_t>(code | bit));
      }
    }
    for (CpuLevel level : levels()) {
      const Codec codec = *Codec::create({.base = id}, 6, level);
      std::vector<uint16_t> codes(x.size());
      codec.encode_rows(x.data(), static_cast<int64_t>(x.size() / 6), 1.0f,
                        reinterpret_cast<uint8_t*>(codes.data()), nullptr);
      for (size_t i = 0; i < x.size(); ++i) {
        ASSERT_EQ(codes[i], expected[i])
            << format_info(id).name << " " << cpu_level_name(level) << " " << x[i];
      }
    }
  }
}

TEST(CodecGolden, SweepsInBlocks) {
  constexpr int kDim = 128;
  constexpr int64_t kRows = 65536 / kDim, kSegmentRows = 4096 / kDim;
  size_t num_sweeps = 0;
  for (const std::vector<std::string>& line : read_lines("sweeps.txt")) {
    ++num_sweeps;
    ASSERT_EQ(line.size(), 4u + 16u + 1u);
    const std::vector<float> sorted = all_inputs(line[1]);
    std::vector<float> x = sorted;
    if (line[2] == "mixed") {
      for (size_t i = 0; i < x.size(); ++i) x[i] = sorted[i * 40503 % 65536];
    }
    const float g = hex_float(line[3]);
    for (CpuLevel level : levels()) {
      const Codec codec = *Codec::create(side_of(line[0]), kDim, level);
      const int64_t code_bytes = codec.row_code_bytes(), scale_bytes = codec.row_scale_bytes();
      std::vector<uint8_t> codes(static_cast<size_t>(kRows * code_bytes));
      std::vector<uint8_t> scales(static_cast<size_t>(kRows * scale_bytes));
      std::vector<float> back(x.size());
      const EncodeStats stats = codec.encode_rows(x.data(), kRows, g, codes.data(), scales.data());
      codec.decode_rows(codes.data(), scales.data(), kRows, g, back.data());
      EXPECT_EQ(stats.non_finite,
                std::count_if(x.begin(), x.end(), [](float v) { return !std::isfinite(v); }));
      const std::string where = line[0] + " " + line[1] + " " + line[2] + " g " + line[3] + " " +
                                std::string(cpu_level_name(level));
      for (int64_t segment = 0; segment < 16; ++segment) {
        const std::string& expected = line[static_cast<size_t>(4 + segment)];
        const int64_t row = segment * kSegmentRows;
        EXPECT_EQ(
            crc32(codes.data() + row * code_bytes, static_cast<size_t>(kSegmentRows * code_bytes)),
            hex(expected.substr(0, 8)))
            << "codes of inputs from " << segment * 4096 << " on: " << where;
        EXPECT_EQ(crc32(scales.data() + row * scale_bytes,
                        static_cast<size_t>(kSegmentRows * scale_bytes)),
                  hex(expected.substr(9)))
            << "scales of inputs from " << segment * 4096 << " on: " << where;
      }
      EXPECT_EQ(crc32(back.data(), back.size() * sizeof(float)), hex(line[20]))
          << "decoded: " << where;
      if (HasFailure()) return;
    }
  }
  EXPECT_EQ(num_sweeps, 288u);
}

template <typename T>
std::vector<T> take(const std::vector<char>& data, size_t& offset, size_t bytes) {
  std::vector<T> values(bytes / sizeof(T));
  if (bytes > 0) std::memcpy(values.data(), data.data() + offset, bytes);
  offset += bytes;
  return values;
}

template <typename T>
void expect_same(const std::vector<T>& actual, const std::vector<T>& expected,
                 const std::string& where) {
  ASSERT_EQ(actual.size(), expected.size()) << where;
  for (size_t i = 0; i < actual.size(); ++i) {
    ASSERT_EQ(int{actual[i]}, int{expected[i]}) << where << " at byte or element " << i;
  }
}

TEST(CodecGolden, PagesOfEveryFormatAndOption) {
  std::ifstream file(KVANT_GOLDEN_DIR "/pages.bin", std::ios::binary);
  const std::vector<char> data((std::istreambuf_iterator<char>(file)),
                               std::istreambuf_iterator<char>());
  size_t offset = 0, num_pages = 0;
  for (const std::vector<std::string>& line : read_lines("pages.txt")) {
    ++num_pages;
    ASSERT_EQ(line.size(), 13u);
    const SideFormat side = side_of(line[0]);
    const int dim = std::stoi(line[2]), tokens = std::stoi(line[3]);
    const auto size = [&](size_t i) { return static_cast<size_t>(std::stoul(line[7 + i])); };
    const std::vector<float> x = take<float>(data, offset, size(0));
    const std::vector<float> bias = take<float>(data, offset, size(1));
    const std::vector<float> smooth = take<float>(data, offset, size(2));
    const std::vector<uint8_t> codes = take<uint8_t>(data, offset, size(3));
    const std::vector<uint8_t> scales = take<uint8_t>(data, offset, size(4));
    const std::vector<uint16_t> mean = take<uint16_t>(data, offset, size(5));
    SideParams params;
    params.global_scale = hex_float(line[4]);
    params.bias = bias.empty() ? nullptr : bias.data();
    params.smooth = smooth.empty() ? nullptr : smooth.data();
    for (CpuLevel level : levels()) {
      const std::string where = line[0] + " " + line[1] + " " + std::string(cpu_level_name(level));
      const Codec codec = *Codec::create(side, dim, level);
      std::vector<uint8_t> codes2(codes.size()), scales2(scales.size());
      std::vector<uint16_t> mean2(mean.size());
      codec.encode_page(x.data(), tokens, params, {codes2.data(), scales2.data(), mean2.data()});
      expect_same(mean2, mean, where + ": mean");
      expect_same(scales2, scales, where + ": scales");
      expect_same(codes2, codes, where + ": codes");
      std::vector<float> back(x.size());
      for (const bool plain : {false, true}) {
        const std::string& expected = line[plain ? 6 : 5];
        if (expected == "none") continue;
        codec.decode_page({codes.data(), scales.data(), mean.data()}, tokens, params,
                          plain ? Codec::Frame::kPlain : Codec::Frame::kStored, back.data());
        EXPECT_EQ(crc32(back.data(), back.size() * sizeof(float)), hex(expected))
            << where << ": decoded, " << (plain ? "plain" : "as stored");
      }
      if (HasFailure()) return;
    }
  }
  EXPECT_EQ(offset, data.size());
  EXPECT_GT(num_pages, 200u);
}

}  // namespace
}  // namespace kvant::formats
