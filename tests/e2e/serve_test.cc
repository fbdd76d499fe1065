// `kvant serve` from the command line: options, the option file, its end. What clients see is in
// openai_suite.py and kvant/serve/openai/service_test.cc.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kvant/serve/http/server.h"
#include "tests/support/program.h"

namespace kvant::testing {
namespace {

using nlohmann::json;

class Serve : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::temp_directory_path() /
              (std::string("kvant_e2e_") +
               ::testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string write(const std::string& name, const std::string& text) const {
    std::ofstream(folder_ / name) << text;
    return (folder_ / name).string();
  }
  static void expect_error(std::vector<std::string> arguments, int code, const std::string& words) {
    arguments.insert(arguments.begin(), "serve");
    const ProgramResult result = run_kvant(arguments);
    EXPECT_EQ(result.exit_code, code) << result.err;
    EXPECT_NE(result.err.find(words), std::string::npos) << result.err;
  }

  std::filesystem::path folder_;
};

TEST_F(Serve, HelpHasGroups) {
  const ProgramResult help = run_kvant({"serve", "--help"});
  EXPECT_EQ(help.exit_code, 0);
  for (const char* group : {"Model:", "Cache:", "Scheduler:", "Network:", "Access:", "Log:",
                            "--max-model-len", "--api-key-file", "Examples:"}) {
    EXPECT_NE(help.out.find(group), std::string::npos) << group;
  }
}

TEST_F(Serve, WrongOptionsAreUsageErrors) {
  expect_error({}, 64, "MODEL is required");
  expect_error({"/nonexistent.gguf"}, 66, "/nonexistent.gguf");
  expect_error({"--config", "/nonexistent.yaml"}, 66, "/nonexistent.yaml");
  expect_error({"--config", write("a.yaml", "model: x\nmax-num-sequences: 3\n")}, 64,
               "line 2: there is no option 'max-num-sequences'");
  expect_error({"--config", write("b.yaml", "prot: 3\n")}, 64, "did you mean 'port'?");
  expect_error({"--config", write("c.yaml", "port: x\n")}, 64, "c.yaml: line 1: port");
  expect_error({"--config", write("d.yaml", "a: [b\n")}, 64, "not YAML");
  expect_error({"x", "--api-key-file", write("keys", "a b c d\n")}, 64, "keys: line 1");
  expect_error({"x", "--port", "65536"}, 64, "--port");
  expect_error({"x", "--max-body", "much"}, 64, "much");
}

class ServeModel : public Serve {
 protected:
  void SetUp() override {
    model_ = model_path("smollm2");
    if (model_.empty()) GTEST_SKIP() << "fetch the model: scripts/fetch_model.sh smollm2";
    Serve::SetUp();
  }
  std::string model_;
};

TEST_F(ServeModel, SaysWhereItIsAndEndsOnASignal) {
  ProgramOptions options;
  options.interrupt_after_ms = 4000;
  const std::string config =
      write("serve.yaml", "model: " + model_ + "\nport: 0\nmax-model-len: 512\nkv: 8bit\n" +
                              "served_model_name: [small, smollm2]\n");
  const ProgramResult result =
      run_kvant({"serve", "--config", config, "--kv", "nvfp4", "--json", "-t", "1"}, options);
  EXPECT_EQ(result.exit_code, 0) << result.err;
  const json ready = json::parse(result.out, nullptr, false);
  ASSERT_TRUE(ready.is_object()) << result.out;
  EXPECT_EQ(ready["models"], (json{"small", "smollm2"}));
  EXPECT_EQ(ready["kv"], "nvfp4");  // the command line wins
  EXPECT_EQ(ready["max_model_len"], 512);
  EXPECT_GT(ready["port"].get<int>(), 0);
  EXPECT_GE(ready["cache_tokens"].get<int64_t>(), 512);
}

TEST_F(ServeModel, ATakenPortIsAnError) {
  auto taken = serve::http::Server::start({.port = 0}, [](auto, auto) {});
  ASSERT_TRUE(taken);
  const ProgramResult result = run_kvant(
      {"serve", model_, "--port", std::to_string((*taken)->port()), "--max-model-len", "256"});
  EXPECT_EQ(result.exit_code, 74) << result.err;
  EXPECT_NE(result.err.find("choose another port"), std::string::npos) << result.err;
}

TEST_F(ServeModel, AnImpossibleBudgetIsAnError) {
  const ProgramResult result =
      run_kvant({"serve", model_, "--port", "0", "--cache-memory", "1KiB"});
  EXPECT_EQ(result.exit_code, 75) << result.err;
}

}  // namespace
}  // namespace kvant::testing
