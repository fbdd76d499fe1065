#include "kvant/formats/spec.h"

#include <gtest/gtest.h>

namespace kvant::formats {
namespace {

std::string resolved(std::string_view spec) {
  const Result<CacheFormat> format = parse_cache_format(spec);
  return format ? canonical_name(*format) : "error: " + format.error().message();
}

std::string error_of(std::string_view spec) {
  const Result<CacheFormat> format = parse_cache_format(spec);
  if (format) return "";
  EXPECT_EQ(format.error().code(), ErrorCode::kInvalidArgument);
  return format.error().message();
}

void expect_error(std::string_view spec, std::initializer_list<std::string_view> parts) {
  const std::string message = error_of(spec);
  EXPECT_FALSE(message.empty()) << spec << " was accepted";
  for (std::string_view part : parts) {
    EXPECT_NE(message.find(part), std::string::npos) << spec << ": " << message;
  }
}

TEST(Spec, Presets) {
  EXPECT_EQ(resolved("8bit"), "k=int8+mean,v=int8+sink");
  EXPECT_EQ(resolved("6bit"), "k=fp8+mean,v=nvfp4+46+sink");
  EXPECT_EQ(resolved("4bit"), "k=int4:channel,v=nvfp4+46+sink");
  EXPECT_EQ(resolved("3bit"), "k=int3:channel,v=int4+sink");
  EXPECT_EQ(resolved(kDefaultFormat), resolved("4bit"));
}

TEST(Spec, PresetsTakeOptions) {
  EXPECT_EQ(resolved("4bit+recent128"), "k=int4:channel,v=nvfp4+46+sink+recent128");
  EXPECT_EQ(resolved("8bit+rot"), "k=int8+mean+rot,v=int8+rot+sink");
  EXPECT_EQ(resolved("4bit+mean"), "k=int4:channel+mean,v=nvfp4+46+sink");
  expect_error("4bit+sink", {"+sink", "already part of 4bit", "k=int4:channel,v=nvfp4+46+sink"});
  expect_error("8bit+mean", {"+mean", "already part of 8bit"});
  expect_error("4bit+strict", {"+strict", "int4:channel"});
  expect_error("k=4bit,v=nvfp4", {"preset 4bit", "both sides"});
}

TEST(Spec, OneBaseForBothSides) {
  EXPECT_EQ(resolved("bf16"), "k=bf16,v=bf16");
  EXPECT_EQ(resolved("fp8:token"), "k=fp8:token,v=fp8:token");
  // Options that only K knows apply to K.
  EXPECT_EQ(resolved("nvfp4+46+mean"), "k=nvfp4+mean+46,v=nvfp4+46");
  EXPECT_EQ(resolved("int8+prerope+smooth+bias+rot"),
            "k=int8+bias+smooth+rot+prerope,v=int8+bias+rot");
  EXPECT_EQ(resolved("mxfp4+sink+recent64"), "k=mxfp4,v=mxfp4+sink+recent64");
  EXPECT_EQ(resolved("nvfp4+strict+sink"), "k=nvfp4,v=nvfp4+sink+strict");
}

TEST(Spec, TwoSides) {
  EXPECT_EQ(resolved("k=int4:channel,v=nvfp4+46+sink"), "k=int4:channel,v=nvfp4+46+sink");
  EXPECT_EQ(resolved("k=fp8+mean+rot,v=int4+rot"), "k=fp8+mean+rot,v=int4+rot");
  EXPECT_EQ(resolved("k=bf16+prerope,v=nvfp4"), "k=bf16+prerope,v=nvfp4");
}

TEST(Spec, EveryFormatParsesAsItsName) {
  for (const FormatInfo& format : all_formats()) {
    const std::string name(format.name);
    if (format.for_keys && format.for_values) {
      EXPECT_EQ(resolved(name), "k=" + name + ",v=" + name);
    } else {
      expect_error(name, {name, "keys only", "v=nvfp4"});
      EXPECT_EQ(resolved("k=" + name + ",v=fp8"), "k=" + name + ",v=fp8");
      expect_error("k=fp8,v=" + name, {name, "keys only"});
    }
  }
}

TEST(Spec, OptionsOnTheWrongSide) {
  for (std::string_view option : {"+mean", "+smooth", "+prerope"}) {
    expect_error("k=int8,v=int8" + std::string(option), {option, "option of keys"});
  }
  for (std::string_view option : {"+sink", "+strict", "+recent64"}) {
    expect_error("k=int8" + std::string(option) + ",v=int8", {option, "after the v part"});
  }
}

TEST(Spec, OptionsThatABaseCannotHave) {
  expect_error("int8+46", {"+46", "nvfp4", "int8"});
  expect_error("mxfp4+46", {"+46", "nvfp4"});
  expect_error("k=nvfp4,v=int8+46", {"+46"});
  EXPECT_EQ(resolved("k=int4:channel,v=nvfp4+46"), "k=int4:channel,v=nvfp4+46");
  for (std::string_view option : {"+mean", "+bias", "+smooth", "+rot"}) {
    expect_error("bf16" + std::string(option), {option, "bf16"});
  }
  expect_error("int8+mean+bias", {"+mean and +bias"});
  expect_error("k=int2:channel,v=int4+strict", {"+strict", "one token", "int2:channel"});
  expect_error("int8+mean+strict", {"+strict", "int8+mean"});
}

TEST(Spec, DuplicatesAndUnknown) {
  expect_error("nvfp4+46+46", {"+46", "twice"});
  expect_error("k=int8+mean+mean,v=int8", {"+mean", "twice"});
  expect_error("int8+sink+sink", {"+sink", "twice"});
  expect_error("int8+recent64+recent128", {"twice"});
  expect_error("int8+maen", {"'+maen'", "did you mean '+mean'", "+prerope", "+recentN"});
  expect_error("int8+snik", {"did you mean '+sink'"});
  expect_error("int8+", {"unknown option '+'"});
  expect_error("int8++mean", {"unknown option"});
  expect_error("nvpf4", {"did you mean 'nvfp4'", "presets: 8bit, 6bit, 4bit, 3bit"});
  expect_error("4bti", {"did you mean '4bit'"});
  expect_error("INT8", {"did you mean 'int8'"});
  expect_error("", {"empty", "4bit"});
  expect_error("k=int8", {"k=FORMAT,v=FORMAT"});
  expect_error("v=int8,k=int8", {"k=FORMAT,v=FORMAT"});
  expect_error("int8,int8", {"k=FORMAT,v=FORMAT"});
  expect_error("k=int8,v=int8,v=int8", {"k=FORMAT,v=FORMAT"});
  expect_error("k=,v=int8", {"unknown format or preset ''"});
  expect_error(std::string_view("int8\n\0x", 7), {"int8??x"});
  expect_error(std::string(1000, 'a'), {"1000 characters"});
}

TEST(Spec, RecentTokens) {
  EXPECT_EQ(parse_cache_format("int8+recent1")->recent_tokens, 1);
  for (std::string_view bad : {"+recent", "+recent0", "+recent064", "+recent-1", "+recent1k",
                               "+recent99999999999999999999", "+recent 64"}) {
    expect_error("int8" + std::string(bad), {"+recentN takes a number"});
  }
}

TEST(Spec, CanonicalNamesParseToThemselves) {
  int count = 0;
  for (const FormatInfo& k : all_formats()) {
    for (const FormatInfo& v : all_formats()) {
      for (int bits = 0; bits < 512; ++bits) {
        CacheFormat format;
        format.k = {k.id,
                    (bits & 1) != 0,
                    (bits & 2) != 0,
                    (bits & 4) != 0,
                    (bits & 8) != 0,
                    (bits & 16) != 0,
                    (bits & 32) != 0};
        format.v = {.base = v.id, .bias = (bits & 2) != 0, .rotate = (bits & 8) != 0};
        format.sink = (bits & 64) != 0;
        format.recent_tokens = (bits & 128) != 0 ? 96 : 0;
        format.strict = (bits & 256) != 0;
        const Result<CacheFormat> parsed = parse_cache_format(canonical_name(format));
        ASSERT_EQ(bool(check_cache_format(format)), bool(parsed)) << canonical_name(format);
        if (!parsed) continue;
        ASSERT_EQ(*parsed, format) << canonical_name(format);
        ++count;
      }
    }
  }
  EXPECT_GT(count, 1000);
}

TEST(Spec, Lists) {
  using List = std::vector<std::string>;
  EXPECT_EQ(split_format_list("bf16,8bit,4bit"), (List{"bf16", "8bit", "4bit"}));
  EXPECT_EQ(split_format_list("bf16,k=int8,v=int4+sink,nvfp4"),
            (List{"bf16", "k=int8,v=int4+sink", "nvfp4"}));
  EXPECT_EQ(split_format_list("k=int8,v=int4,k=fp8,v=fp8"), (List{"k=int8,v=int4", "k=fp8,v=fp8"}));
  EXPECT_EQ(split_format_list("k=int8,nvfp4,v=int8"), (List{"k=int8", "nvfp4", "v=int8"}));
  EXPECT_EQ(split_format_list("4bit"), (List{"4bit"}));
  EXPECT_EQ(split_format_list("4bit,"), (List{"4bit", ""}));
}

TEST(Spec, FileNames) {
  EXPECT_EQ(file_name_form("k=int8+mean,v=nuq4-1%+sink"), "k=int8.mean,v=nuq4-1p.sink");
}

TEST(Spec, AsymptoticBits) {
  const auto bits = [](std::string_view spec) {
    return asymptotic_bits_per_value(*parse_cache_format(spec), 128, 64);
  };
  EXPECT_DOUBLE_EQ(bits("bf16"), 16.0);
  EXPECT_DOUBLE_EQ(bits("fp8"), 8.0);
  EXPECT_DOUBLE_EQ(bits("fp8:token"), 8.25);
  EXPECT_DOUBLE_EQ(bits("mxfp8"), 8.25);
  EXPECT_DOUBLE_EQ(bits("int8"), 8.5);
  EXPECT_DOUBLE_EQ(bits("int4"), 5.0);
  EXPECT_DOUBLE_EQ(bits("nvfp4"), 4.5);
  EXPECT_DOUBLE_EQ(bits("mxfp4"), 4.25);
  EXPECT_DOUBLE_EQ(bits("4bit"), 4.5);
  EXPECT_DOUBLE_EQ(bits("3bit"), 4.25);
  EXPECT_DOUBLE_EQ(bits("k=int2:channel,v=nvfp4"), 3.5);
  EXPECT_DOUBLE_EQ(bits("nvfp4+46+mean+sink"), 4.625);
}

}  // namespace
}  // namespace kvant::formats
