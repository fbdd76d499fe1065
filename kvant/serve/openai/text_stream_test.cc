#include "kvant/serve/openai/text_stream.h"

#include <gtest/gtest.h>

#include <random>

#include "kvant/model/gguf.h"
#include "kvant/model/testing/gguf_builder.h"

namespace kvant::serve::openai {
namespace {

using model::GgufValueType;
using model::Tokenizer;
using model::testing::GgufBuilder;

// One token a byte (id 3 + byte), <unk>, <s>, </s>.
Tokenizer byte_tokenizer() {
  std::vector<std::string> tokens = {"<unk>", "<s>", "</s>"};
  std::vector<int32_t> types = {2, 3, 3};
  for (int byte = 0; byte < 256; ++byte) {
    char name[8];
    std::snprintf(name, sizeof(name), "<0x%02X>", byte);
    tokens.emplace_back(name);
    types.push_back(6);
  }
  GgufBuilder builder;
  builder.string("tokenizer.ggml.model", "llama")
      .strings("tokenizer.ggml.tokens", tokens)
      .array("tokenizer.ggml.scores", GgufValueType::kF32, std::vector<float>(tokens.size(), 0.0f))
      .array("tokenizer.ggml.token_type", GgufValueType::kI32, types)
      .u32("tokenizer.ggml.eos_token_id", 2);
  const std::vector<std::byte> file = builder.build();
  const auto gguf = model::Gguf::parse(file, "test");
  return std::move(Tokenizer::create(*gguf)).value();
}

int32_t id_of(char byte) {
  return 3 + static_cast<unsigned char>(byte);
}

TEST(StopStrings, CutAtTheFirstAndHoldBackWhatCouldBeOne) {
  StopStrings stops({"END", "\n\n"}, false);
  EXPECT_EQ(stops.push("text E"), "text ");
  EXPECT_EQ(stops.push("N"), "");
  EXPECT_EQ(stops.push("X\n"), "ENX");
  EXPECT_EQ(stops.push("y"), "\ny");
  EXPECT_EQ(stops.push("zEN"), "z");
  EXPECT_EQ(stops.push("D more"), "");
  EXPECT_EQ(stops.found(), "END");
  EXPECT_EQ(stops.push("more"), "");
  EXPECT_EQ(stops.finish(), "");
}

TEST(StopStrings, TheFirstCompleteOneWinsAndMayBeShown) {
  StopStrings stops({"b", "abc"}, true);
  EXPECT_EQ(stops.push("xxabc"), "xxab");
  EXPECT_EQ(stops.found(), "b");
  StopStrings other({"b", "ab"}, false);
  EXPECT_EQ(other.push("xxab"), "xx");
  EXPECT_EQ(other.found(), "ab");
}

TEST(StopStrings, WhatWasHeldComesAtTheEnd) {
  StopStrings stops({"aab", ""}, false);
  EXPECT_EQ(stops.push("caa"), "c");
  EXPECT_EQ(stops.push("a"), "a");
  EXPECT_EQ(stops.finish(), "aa");
  EXPECT_EQ(stops.found(), std::nullopt);
}

TEST(StopStrings, AnyCutOfTheTextGivesTheSame) {
  std::mt19937 random(5);
  for (int round = 0; round < 500; ++round) {
    std::string text;
    for (int i = 0; i < 40; ++i) text += static_cast<char>('a' + random() % 2);
    const std::vector<std::string> stops = {text.substr(random() % 30, 1 + random() % 6), "bbbb"};
    size_t first = std::string::npos;  // where the one begins that ends first
    size_t end = std::string::npos;
    for (const std::string& stop : stops) {
      const size_t at = text.find(stop);
      if (at == std::string::npos || at + stop.size() > end) continue;
      if (at + stop.size() < end || at < first) first = at;
      end = at + stop.size();
    }
    StopStrings stream(stops, false);
    std::string shown;
    for (size_t at = 0; at < text.size();) {
      const size_t size = std::min<size_t>(1 + random() % 4, text.size() - at);
      shown += stream.push(text.substr(at, size));
      at += size;
    }
    shown += stream.finish();
    EXPECT_EQ(shown, text.substr(0, first)) << text << " " << stops[0];
    EXPECT_EQ(stream.found().has_value(), first != std::string::npos);
  }
}

TEST(TextStream, HoldsBackPartsOfCharacters) {
  const Tokenizer tokenizer = byte_tokenizer();
  TextStream stream(tokenizer, {});
  EXPECT_EQ(stream.push(id_of('\xe2')), "");
  EXPECT_EQ(stream.push(id_of('\x82')), "");
  EXPECT_EQ(stream.push(id_of('\xac')), "\xe2\x82\xac");
  EXPECT_EQ(stream.push(2), "");  // </s> is no text
  EXPECT_EQ(stream.push(id_of('\xe2')), "");
  EXPECT_EQ(stream.finish(), "\xe2");
}

TEST(TextStream, StopsOnlyBeyondTheFewestTokens) {
  const Tokenizer tokenizer = byte_tokenizer();
  TextStream stream(tokenizer, {.stop = {"x"}, .min_tokens = 2});
  EXPECT_EQ(stream.push(id_of('x')), "x");
  EXPECT_EQ(stream.push(id_of('x')), "x");
  EXPECT_FALSE(stream.stopped());
  EXPECT_EQ(stream.push(id_of('x')), "");
  EXPECT_TRUE(stream.stopped());
  EXPECT_EQ(stream.finish(), "");
}

TEST(TextStream, CountsCharacters) {
  EXPECT_EQ(count_characters("a\xc3\xa9\xe2\x82\xac"), 3);
}

}  // namespace
}  // namespace kvant::serve::openai
