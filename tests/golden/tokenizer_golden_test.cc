// Token ids against tests/golden/tokenizer/golden.json, which llama.cpp made (compare.py beside
// it).
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kvant/model/tokenizer.h"
#include "tests/support/program.h"

namespace kvant::model {
namespace {

const nlohmann::json& golden() {
  static const nlohmann::json file = [] {
    std::ifstream in(KVANT_GOLDEN_DIR "/tokenizer/golden.json");
    return nlohmann::json::parse(in);
  }();
  return file;
}

std::string from_hex(const std::string& hex) {
  std::string out;
  for (size_t i = 0; i + 1 < hex.size(); i += 2) {
    out.push_back(static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16)));
  }
  return out;
}

void compare_with_golden(const std::string& path) {
  const std::string file = path.substr(path.rfind('/') + 1);
  ASSERT_TRUE(golden()["models"].contains(file)) << file;
  const nlohmann::json& expected = golden()["models"][file];
  const Result<Gguf> gguf = Gguf::open(path);
  ASSERT_TRUE(gguf) << gguf.error().message();
  const Result<Tokenizer> tokenizer = Tokenizer::create(*gguf);
  ASSERT_TRUE(tokenizer) << tokenizer.error().message();
  const std::span<const TokenId> ends = tokenizer->end_of_generation();
  EXPECT_EQ(std::vector<TokenId>(ends.begin(), ends.end()),
            expected["end_of_generation"].get<std::vector<TokenId>>());

  const nlohmann::json& texts = golden()["texts"];
  ASSERT_GE(texts.size(), 600u);
  const nlohmann::json& exceptions = expected["ids_no_special"];
  for (size_t i = 0; i < texts.size(); ++i) {
    const std::string text = from_hex(texts[i]);
    const nlohmann::json& ids = expected["ids"][i];
    const Result<std::vector<TokenId>> found = tokenizer->encode(text);
    ASSERT_TRUE(found);
    EXPECT_EQ(*found, ids.get<std::vector<TokenId>>()) << i << ": " << text;
    const std::string key = std::to_string(i);
    const nlohmann::json& plain = exceptions.contains(key) ? exceptions[key] : ids;
    const Result<std::vector<TokenId>> found_plain =
        tokenizer->encode(text, {.special = SpecialInText::kIgnore});
    ASSERT_TRUE(found_plain);
    EXPECT_EQ(*found_plain, plain.get<std::vector<TokenId>>()) << i << ": " << text;
  }
}

TEST(TokenizerGolden, SmolLm2) {
  const std::string path = testing::model_path("smollm2");
  ASSERT_NE(path, "") << "run scripts/fetch_model.sh smollm2";
  compare_with_golden(path);
}

TEST(TokenizerGolden, Gemma3) {
  const std::string path = testing::model_path("gemma3");
  if (path.empty()) GTEST_SKIP() << "not fetched: scripts/fetch_model.sh gemma3";
  compare_with_golden(path);
}

TEST(TokenizerGolden, Qwen) {
  const std::string path = testing::model_path("qwen");
  if (path.empty()) GTEST_SKIP() << "not fetched: scripts/fetch_model.sh qwen";
  compare_with_golden(path);
}

}  // namespace
}  // namespace kvant::model
