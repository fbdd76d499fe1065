// `kvant run` on a real model: what it says, and that formats, threads and sampling keep their
// promises.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/support/program.h"

namespace kvant::testing {
namespace {

using nlohmann::json;

class Run : public ::testing::Test {
 protected:
  void SetUp() override {
    model_ = model_path("smollm2");
    if (model_.empty()) GTEST_SKIP() << "fetch the model: scripts/fetch_model.sh smollm2";
  }
  ProgramResult run(std::vector<std::string> arguments, const ProgramOptions& options = {}) const {
    arguments.insert(arguments.begin(), {"run", model_});
    return run_kvant(arguments, options);
  }
  json run_json(std::vector<std::string> arguments) const {
    arguments.insert(arguments.end(), {"--json", "--quiet"});
    const ProgramResult result = run(std::move(arguments));
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return json::parse(result.out, nullptr, false);
  }
  std::string model_;
};

TEST_F(Run, GreedyTextOfSmolLm2) {
  const ProgramResult result = run(
      {"-p", "def fibonacci(n):\n", "--raw", "--temp", "0", "-n", "24", "--kv", "bf16", "-t", "2"});
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(result.out,
            "\ndef fibonacci(n):\n    if n <= 1:\n        return n\n    else:\n        return "
            "fibonacci\n");
  EXPECT_NE(result.err.find("tokens/s"), std::string::npos) << result.err;
  EXPECT_NE(result.err.find("bits/value"), std::string::npos) << result.err;
}

TEST_F(Run, AnswersAQuestionInTheDefaultFormat) {
  const json answer = run_json({"-p", "What is the capital of France?", "--temp", "0", "-n", "40"});
  EXPECT_NE(answer["text"].get<std::string>().find("Paris"), std::string::npos) << answer;
  EXPECT_EQ(answer["kv"], "4bit");
  EXPECT_EQ(answer["kv_resolved"], "k=int4:channel,v=nvfp4+46+sink");
  EXPECT_EQ(answer["stats"]["stop_reason"], "end");
  EXPECT_EQ(answer["stats"]["prompt_tokens"], answer["prompt_ids"].size());
}

TEST_F(Run, ThreadsDoNotChangeTokensAndSeedsDo) {
  const std::vector<std::string> base = {"-p", "Once upon a time", "--raw", "-n", "30"};
  const auto ids = [&](std::vector<std::string> more) {
    more.insert(more.begin(), base.begin(), base.end());
    return run_json(more)["token_ids"];
  };
  const json one = ids({"--seed", "5", "-t", "1"});
  EXPECT_EQ(one.size(), 30u);
  EXPECT_EQ(ids({"--seed", "5", "-t", "3"}), one);
  EXPECT_NE(ids({"--seed", "6", "-t", "1"}), one);
}

TEST_F(Run, ChatsUntilTheContextIsFull) {
  ProgramOptions options;
  options.input = "Hello!\nTell me a very long story about a fox.\nGo on.\n";
  const ProgramResult full = run({"-i", "-c", "96", "--temp", "0", "-n", "200"}, options);
  EXPECT_EQ(full.exit_code, 75) << full.err;
  EXPECT_NE(full.err.find("--context-shift"), std::string::npos) << full.err;
  const ProgramResult shifted =
      run({"-i", "-c", "96", "--temp", "0", "-n", "60", "--context-shift"}, options);
  EXPECT_EQ(shifted.exit_code, 0) << shifted.err;
}

TEST_F(Run, AMissingPromptOrTwoAreUsageErrors) {
  EXPECT_EQ(run({}).exit_code, 64);
  EXPECT_EQ(run({"-p", "a", "-i"}).exit_code, 64);
  EXPECT_EQ(run({"-p", "a", "--temp", "-1"}).exit_code, 64);
  EXPECT_EQ(run({"-p", "a", "-c", "100000000"}).exit_code, 64);
  EXPECT_EQ(run({"-f", "/nonexistent"}).exit_code, 66);
}

TEST_F(Run, InterruptionEndsCleanly) {
  ProgramOptions options;
  options.interrupt_after_ms = 1500;
  // Greedy stories of small models go round in circles and never end.
  const ProgramResult result =
      run({"-p", "Once upon a time", "--raw", "-n", "8000", "--temp", "0"}, options);
  EXPECT_EQ(result.exit_code, 130) << result.err;
  EXPECT_NE(result.err.find("interrupted"), std::string::npos) << result.err;
}

}  // namespace
}  // namespace kvant::testing
