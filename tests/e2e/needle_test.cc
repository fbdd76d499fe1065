// `kvant needle` on a tiny random model: what it prints, and that nothing but the seed decides it.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kvant/model/testing/tiny_models.h"
#include "tests/support/program.h"

namespace kvant::testing {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

class NeedleCommand : public ::testing::Test {
 protected:
  void SetUp() override {
    path_ = (fs::temp_directory_path() / "kvant_e2e_needle.gguf").string();
    const std::vector<std::byte> bytes =
        model::testing::tiny_model("llama", {.vocab = 100, .context = 1600, .tokenizer = true});
    std::ofstream(path_, std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
  }
  void TearDown() override { fs::remove(path_); }

  ProgramResult run(std::vector<std::string> arguments) const {
    arguments.insert(arguments.begin(), {"needle", path_});
    return run_kvant(arguments);
  }
  json run_json(std::vector<std::string> arguments) const {
    arguments.insert(arguments.end(), {"--json", "--quiet"});
    const ProgramResult result = run(std::move(arguments));
    EXPECT_EQ(result.exit_code, 0) << result.err;
    EXPECT_EQ(result.err, "");
    return json::parse(result.out, nullptr, false);
  }

  std::string path_;
};

TEST_F(NeedleCommand, ScoresEachFormatLengthAndTask) {
  const json result = run_json(
      {"--kv", "bf16,nvfp4,bf16", "--lengths", "1500,1200", "--samples", "3", "--seed", "5"});
  EXPECT_EQ(result["command"], "needle");
  EXPECT_EQ(result["text"], "bundled");
  EXPECT_EQ(result["samples"], 3);
  EXPECT_EQ(result["base"], "bf16");
  const json& cells = result["results"];
  ASSERT_EQ(cells.size(), 2u * 3 * 3);
  for (size_t i = 0; i < cells.size(); i += 3) {
    EXPECT_EQ(cells[i]["length"], i < 9 ? 1200 : 1500);
    EXPECT_EQ(cells[i], cells[i + 2]);  // the same format twice
    EXPECT_EQ(cells[i]["delta_nll"], 0);
    EXPECT_NE(cells[i + 1]["delta_nll"], 0);
    EXPECT_EQ(cells[i + 1]["kv_resolved"], "k=nvfp4,v=nvfp4");
    EXPECT_LT(cells[i + 1]["bits_per_value"], 6);
    EXPECT_GE(cells[i]["accuracy"], 0);
    EXPECT_LE(cells[i]["accuracy"], 1);
    EXPECT_GT(cells[i]["nll"], 8);  // eight characters of about 100
    EXPECT_LE(cells[i + 1]["delta_nll_low"], cells[i + 1]["delta_nll"]);
    EXPECT_GE(cells[i + 1]["delta_nll_high"], cells[i + 1]["delta_nll"]);
  }
  EXPECT_EQ(cells[0]["task"], "single");
  EXPECT_EQ(cells[3]["task"], "multi-key");
  EXPECT_EQ(cells[6]["task"], "multi-value");
}

TEST_F(NeedleCommand, DependsOnTheSeedOnly) {
  const std::vector<std::string> arguments = {"--kv",      "4bit,8bit", "--lengths",
                                              "1200",      "--tasks",   "multi-key",
                                              "--samples", "2",         "--threads"};
  const auto with = [&](const std::string& threads, const std::string& seed) {
    auto all = arguments;
    all.insert(all.end(), {threads, "--seed", seed});
    return run_json(all)["results"];
  };
  const json first = with("1", "1");
  EXPECT_EQ(first.size(), 2u);
  EXPECT_EQ(with("2", "1"), first);
  EXPECT_NE(with("1", "2"), first);
}

TEST_F(NeedleCommand, HasATableAndDefaults) {
  const ProgramResult result = run({"--samples", "1", "--tasks", "single"});
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_NE(result.out.find("single"), std::string::npos) << result.out;
  EXPECT_EQ(result.out.find("multi-key"), std::string::npos);
  EXPECT_NE(result.out.find("1024"), std::string::npos);  // the default that the model can have
  EXPECT_EQ(result.out.find("4096"), std::string::npos);
  EXPECT_NE(result.err.find("8 candidates"), std::string::npos) << result.err;
}

TEST_F(NeedleCommand, SaysWhatIsWrong) {
  const auto expect = [&](std::vector<std::string> arguments, int code, const std::string& word) {
    const ProgramResult result = run(std::move(arguments));
    EXPECT_EQ(result.exit_code, code) << result.err;
    EXPECT_NE(result.err.find(word), std::string::npos) << result.err;
  };
  expect({"--lengths", "2000"}, 64, "1600");
  expect({"--lengths", "x"}, 64, "--lengths");
  expect({"--lengths", "300", "--samples", "1"}, 64, "too few");
  expect({"--tasks", "double"}, 64, "multi-value");
  expect({"--kv", "nvfp9"}, 64, "nvfp9");
  expect({"--text", "/nonexistent.txt"}, 66, "/nonexistent.txt");
  expect({"--text", "/dev/null"}, 64, "sentences");
}

}  // namespace
}  // namespace kvant::testing
