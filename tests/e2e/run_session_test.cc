// `kvant run --save-session`, `--restore-session`: the answer is the same, only sooner.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvant/model/testing/tiny_models.h"
#include "tests/e2e/model_fixture.h"

namespace kvant::testing {
namespace {

using nlohmann::json;

class RunSession : public ModelCommands {
 protected:
  void SetUp() override {
    make_folder();
    setenv("XDG_CACHE_HOME", folder_.c_str(), 1);  // for the hash of the weights
    use_tiny("llama");
    file_ = path("chat.session");
  }
  void use_tiny(const std::string& architecture, uint32_t seed = 1) {
    const std::vector<std::byte> bytes =
        model::testing::tiny_model(architecture, {.vocab = 100, .seed = seed, .tokenizer = true});
    model_ = write(architecture + std::to_string(seed) + ".gguf",
                   {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
  }
  // Tokens of one character each.
  static std::string letters(size_t count) {
    std::string text;
    for (size_t i = 0; i < count; ++i) text += static_cast<char>('a' + (i * i + i / 7) % 26);
    return text;
  }
  json answer(const std::string& prompt, std::vector<std::string> more = {}) const {
    more.insert(more.end(), {"-p", prompt, "--temp", "0", "-n", "20", "--page-tokens", "16"});
    return run_json("run", more);
  }
  std::string file_;
};

TEST_F(RunSession, TheAnswerIsTheSameAndComputesTheRestOnly) {
  const std::string prompt = letters(200);
  for (const char* kv : {"4bit", "8bit", "bf16", "k=fp8,v=nvfp4"}) {
    SCOPED_TRACE(kv);
    const json cold = answer(prompt, {"--kv", kv, "--save-session", file_});
    const int64_t full = cold["stats"]["context_tokens"].get<int64_t>() / 16 * 16;
    EXPECT_EQ(cold["session"]["saved_tokens"], full);
    EXPECT_EQ(cold["session"]["restored_tokens"], nullptr);
    const json warm = answer(prompt, {"--kv", kv, "--restore-session", file_});
    EXPECT_EQ(warm["token_ids"], cold["token_ids"]);
    EXPECT_EQ(warm["session"]["restored_tokens"], full);
    EXPECT_EQ(warm["session"]["saved_tokens"], nullptr);
    EXPECT_EQ(warm["session"]["reused_tokens"], 192);
    EXPECT_EQ(warm["stats"]["reused_tokens"], 192);
    EXPECT_EQ(warm["stats"]["prefill_tokens"], 8);
    // Prompts that go on from there, that branch off, and that have nothing to do with it. Pages
    // that are not quantised are shared to the token, others as a whole.
    const bool plain_pages = std::string_view(kv) == "bf16";
    const std::string longer = prompt + cold["text"].get<std::string>() + "and so on";
    const std::string branch = prompt.substr(0, 100) + "@other end of the same beginning";
    for (const auto& [next, reused] : {std::pair<std::string, int64_t>{longer, full},
                                       {branch, plain_pages ? 100 : 96},
                                       {"XYZ", 0}}) {
      const json plain = answer(next, {"--kv", kv});
      const json restored = answer(next, {"--kv", kv, "--restore-session", file_});
      EXPECT_EQ(restored["token_ids"], plain["token_ids"]);
      EXPECT_EQ(restored["session"]["reused_tokens"], reused);
      EXPECT_FALSE(plain.contains("session"));
    }
  }
}

TEST_F(RunSession, WindowsAreRestoredWhereThePromptGoesOn) {
  use_tiny("gemma3");
  const std::string prompt = letters(300);
  const json cold = answer(prompt, {"--save-session", file_});
  const std::string longer = prompt + cold["text"].get<std::string>() + "and so on";
  const json plain = answer(longer);
  const json warm = answer(longer, {"--restore-session", file_, "--save-session", file_});
  EXPECT_EQ(warm["token_ids"], plain["token_ids"]);
  EXPECT_GT(warm["session"]["reused_tokens"], 280);
  // What the beginning needs has left the window: all is computed, and right.
  const json again = answer(prompt, {"--restore-session", file_});
  EXPECT_EQ(again["token_ids"], cold["token_ids"]);
  EXPECT_EQ(again["session"]["reused_tokens"], 0);
}

TEST_F(RunSession, FilesOfOthersAndDamagedOnesAreRefused) {
  const std::string prompt = letters(100);
  answer(prompt, {"--save-session", file_});
  const std::string first_model = model_;
  const auto restore = [&](const std::string& file, std::vector<std::string> more = {}) {
    more.insert(more.end(), {"--restore-session", file});
    std::vector<std::string> arguments = {"run", model_, "-p", prompt, "-n", "2"};
    if (std::find(more.begin(), more.end(), "--page-tokens") == more.end())
      more.insert(more.end(), {"--page-tokens", "16"});
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  };
  expect_error(restore(path("none")), 66, {"none"});
  expect_error(restore(file_, {"--kv", "8bit"}), 64, {file_, "cache format"});
  expect_error(restore(file_, {"--page-tokens", "32"}), 64, {file_, "page size"});
  expect_error(restore(file_, {"-c", "64"}), 75, {file_, "64", "raise the context"});
  expect_error(restore(file_, {"--kv", "nvfp4+recent20"}), 69, {"+recentN"});
  use_tiny("llama", 2);  // the same geometry
  expect_error(restore(file_), 64, {file_, "other weights"});
  model_ = first_model;
  expect_error(restore(model_), 65, {model_});
  std::ifstream in(file_, std::ios::binary);
  std::string bytes((std::istreambuf_iterator<char>(in)), {});
  expect_error(restore(write("cut", bytes.substr(0, bytes.size() - 1))), 65, {"cut"});
  bytes[bytes.size() / 2] = static_cast<char>(bytes[bytes.size() / 2] ^ 4);
  expect_error(restore(write("flipped", bytes)), 65, {"flipped", "checksum"});
}

TEST_F(RunSession, WhatCannotBeSavedIsSaid) {
  const std::vector<std::string> run = {"run", model_, "-p", letters(100), "-n", "2"};
  const auto save = [&](const std::string& file, std::vector<std::string> more = {}) {
    more.insert(more.begin(), run.begin(), run.end());
    more.insert(more.end(), {"--save-session", file});
    return more;
  };
  expect_error(save(path("no/folder")), 66, {"there is no folder"});
  expect_error(save(folder_.string()), 64, {"that is a folder"});
  expect_error(save(file_, {"--page-tokens", "128"}), 64, {"no closed page yet"});
  EXPECT_FALSE(std::filesystem::exists(file_));
}

TEST_F(RunSession, ChatsGoOnFromAFile) {
  model_ = model_path("smollm2");
  if (model_.empty()) GTEST_SKIP() << "fetch the model: scripts/fetch_model.sh smollm2";
  const std::string system =
      "You answer in one short sentence, and you never use a word of more than three syllables "
      "unless it is the name of a place. If a question has no answer you say that it has none, and "
      "if it has several you give the best one first and leave all of the others out, as those who "
      "ask you have little time and want to read no more than they must.";
  const auto chat = [&](std::vector<std::string> more) {
    ProgramOptions options;
    options.input = "What is the capital of France?\nAnd of Italy?\n";
    more.insert(more.begin(),
                {"run", model_, "-i", "--system", system, "--temp", "0", "-n", "24", "-c", "512"});
    return run_kvant(more, options);
  };
  const ProgramResult cold = chat({"--save-session", file_});
  ASSERT_EQ(cold.exit_code, 0) << cold.err;
  EXPECT_NE(cold.err.find("are in " + file_), std::string::npos) << cold.err;
  const ProgramResult warm = chat({"--restore-session", file_});
  ASSERT_EQ(warm.exit_code, 0) << warm.err;
  EXPECT_EQ(warm.out, cold.out);
  const size_t note = warm.err.find(" tokens come from " + file_);
  ASSERT_NE(note, std::string::npos) << warm.err;
  const size_t line = warm.err.rfind('\n', note) + 1;
  EXPECT_EQ(warm.err.compare(line, 12, "session  64 "), 0) << warm.err;
  EXPECT_EQ(warm.err.find(" tokens come from ", note + 1), std::string::npos) << "said once";
}

}  // namespace
}  // namespace kvant::testing
