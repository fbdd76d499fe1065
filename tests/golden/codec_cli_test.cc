// `kvant codec` as users run it: its bytes are those of the library, which the golden files verify.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <iterator>
#include <limits>
#include <vector>

#include "kvant/formats/codec.h"
#include "tests/support/program.h"

namespace kvant {
namespace {

using formats::Codec;
using formats::FormatInfo;
using formats::SideFormat;
using testing::ProgramResult;
using testing::run_kvant;

std::string to_bytes(const std::vector<float>& x) {
  return std::string(reinterpret_cast<const char*>(x.data()), x.size() * sizeof(float));
}

std::vector<float> values(int n) {
  std::vector<float> x(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) {
    x[static_cast<size_t>(i)] =
        std::sin(static_cast<float>(i) * 1.7f) * (i % 29 == 0 ? 40.0f : 1.0f);
  }
  return x;
}

std::vector<std::string> arguments(const std::string& action, const std::string& kv, int head_dim,
                                   const std::string& g) {
  return {"codec", action, "--kv", kv, "--head-dim", std::to_string(head_dim), "--global-scale", g};
}

testing::ProgramOptions with_input(std::string input) {
  testing::ProgramOptions options;
  options.input = std::move(input);
  return options;
}

TEST(CodecProgram, EncodesAndDecodesLikeTheLibrary) {
  constexpr int kRows = 40;
  for (const FormatInfo& info : formats::all_formats()) {
    if (!info.for_values) continue;
    for (const std::string option : {"", "+rot", "+46"}) {
      const SideFormat side = {
          .base = info.id, .rotate = option == "+rot", .four_over_six = option == "+46"};
      const std::string kv = std::string(info.name) + option;
      for (const int head_dim : {64, 80}) {
        const Result<Codec> codec = Codec::create(side, head_dim);
        const std::vector<float> x = values(kRows * head_dim);
        const ProgramResult encoded =
            run_kvant(arguments("encode", kv, head_dim, "0.03125"), with_input(to_bytes(x)));
        if (!codec) {
          EXPECT_EQ(encoded.exit_code, 64) << kv;
          continue;
        }
        ASSERT_EQ(encoded.exit_code, 0) << kv << encoded.err;
        std::vector<uint8_t> codes(static_cast<size_t>(kRows * codec->row_code_bytes()));
        std::vector<uint8_t> scales(static_cast<size_t>(kRows * codec->row_scale_bytes()));
        codec->encode_rows(x.data(), kRows, 0.03125f, codes.data(), scales.data());
        std::string expected(codes.begin(), codes.end());
        expected.append(scales.begin(), scales.end());
        EXPECT_TRUE(encoded.out == expected) << kv;
        const ProgramResult decoded =
            run_kvant(arguments("decode", kv, head_dim, "0.03125"), with_input(encoded.out));
        ASSERT_EQ(decoded.exit_code, 0) << kv << decoded.err;
        std::vector<float> back(x.size());
        codec->decode_rows(codes.data(), scales.data(), kRows, 0.03125f, back.data());
        EXPECT_TRUE(decoded.out == to_bytes(back)) << kv;
      }
    }
  }
}

TEST(CodecProgram, EveryLevelGivesTheSameBytes) {
  const std::string input = to_bytes(values(100 * 96));
  for (const std::string kv : {"nvfp4+46", "int8+rot", "mxfp4"}) {
    const ProgramResult best = run_kvant(arguments("encode", kv, 96, "1"), with_input(input));
    testing::ProgramOptions options = with_input(input);
    options.environment = {"KVANT_CPU_LEVEL=scalar"};
    const ProgramResult scalar = run_kvant(arguments("encode", kv, 96, "1"), options);
    ASSERT_EQ(scalar.exit_code, 0) << scalar.err;
    EXPECT_TRUE(best.out == scalar.out) << kv;
  }
}

TEST(CodecProgram, RefusesWhatItCannotDo) {
  for (const std::string kv : {"4bit", "nvfp4+mean", "k=int8,v=int8", "int4:channel", "int8+sink",
                               "int8+46", "nvfp5", ""}) {
    EXPECT_EQ(run_kvant(arguments("encode", kv, 64, "1")).exit_code, 64) << kv;
  }
  for (const std::string g : {"0", "-1", "nan", "inf", "x"}) {
    EXPECT_EQ(run_kvant(arguments("encode", "nvfp4", 64, g)).exit_code, 64) << g;
  }
  EXPECT_EQ(run_kvant(arguments("encode", "nvfp4", 0, "1")).exit_code, 64);
  EXPECT_EQ(run_kvant({"codec"}).exit_code, 64);
  const ProgramResult partial = run_kvant(arguments("encode", "int8", 64, "1"), with_input("abc"));
  EXPECT_EQ(partial.exit_code, 65);
  EXPECT_NE(partial.err.find("3 bytes"), std::string::npos) << partial.err;
  EXPECT_EQ(run_kvant(arguments("decode", "int8", 64, "1"), with_input("abc")).exit_code, 65);
  testing::ProgramOptions full_disk = with_input(to_bytes(values(640)));
  full_disk.stdout_to = "/dev/full";
  EXPECT_EQ(run_kvant(arguments("encode", "int8", 64, "1"), full_disk).exit_code, 74);
}

TEST(CodecProgram, EmptyInputGivesEmptyOutput) {
  const ProgramResult result = run_kvant(arguments("encode", "nvfp4", 64, "1"));
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_EQ(result.out, "");
}

TEST(CodecProgram, WarnsAboutValuesThatAreNotFinite) {
  std::vector<float> x(64, 1.0f);
  x[7] = std::numeric_limits<float>::quiet_NaN();
  const ProgramResult result =
      run_kvant(arguments("encode", "nvfp4", 64, "1"), with_input(to_bytes(x)));
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_EQ(result.out.size(), 32u + 4u);
  EXPECT_NE(result.err.find("1 of 64 values are not finite"), std::string::npos) << result.err;
}

TEST(CodecProgram, ListIsTheOneInTheDocumentation) {
  const ProgramResult result = run_kvant({"codec", "list"});
  EXPECT_EQ(result.exit_code, 0);
  std::ifstream file(KVANT_FORMATS_PAGE);
  const std::string page((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  EXPECT_NE(page.find(result.out), std::string::npos)
      << "docs/formats/README.md must contain what `kvant codec list` prints:\n"
      << result.out;
  for (const FormatInfo& info : formats::all_formats()) {
    EXPECT_NE(result.out.find("| `" + std::string(info.name) + "` |"), std::string::npos);
  }
}

}  // namespace
}  // namespace kvant
