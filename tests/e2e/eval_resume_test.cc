// `kvant eval --resume` on a tiny random model: interrupted anywhere, the figures are the same.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kvant/model/testing/tiny_models.h"
#include "tests/e2e/model_fixture.h"

namespace kvant::testing {
namespace {

using nlohmann::json;

class EvalResume : public ModelCommands {
 protected:
  void SetUp() override {
    make_folder();
    setenv("XDG_CACHE_HOME", folder_.c_str(), 1);  // for the hash of the weights
    const std::vector<std::byte> bytes =
        model::testing::tiny_model("llama", {.vocab = 100, .tokenizer = true});
    model_ = write("tiny.gguf", {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
    state_ = path("eval.state");
    resumable_ = arguments_;
    resumable_.insert(resumable_.end(), {"--resume", state_});
  }

  // How many lines of the state are of a kind.
  int64_t finished(const std::string& kind) const {
    std::ifstream in(state_);
    int64_t lines = 0;
    for (std::string line; std::getline(in, line);) lines += line.starts_with("{\"" + kind);
    return lines;
  }
  // Until there are `lines` lines of `kind`.
  void interrupt_at(const std::string& kind, int64_t lines) const {
    ProgramOptions options;
    options.interrupt_when = [&] { return finished(kind) >= lines; };
    auto command = resumable_;
    command.insert(command.begin(), {"eval", model_});
    const ProgramResult result = run_kvant(command, options);
    ASSERT_EQ(result.exit_code, 130) << "done before it was interrupted: " << result.err;
    EXPECT_EQ(result.out, "");
  }

  // Enough of everything that it is not done before it is interrupted.
  const std::vector<std::string> arguments_ = {
      "--kv",          "bf16,4bit", "--ctx",      "64", "--chunks", "300",
      "--page-tokens", "16",        "--by-layer", "50", "-t",       "1"};
  std::vector<std::string> resumable_;
  std::string state_;
};

TEST_F(EvalResume, EvalGoesOnWhereItWasInterrupted) {
  const json whole = run_json("eval", arguments_);
  EXPECT_GT(whole["results"][1]["kl_mean"], 0);
  EXPECT_EQ(whole["results"][1]["by_layer"].size(), 3u);
  interrupt_at("chunk", 1);
  EXPECT_GE(finished("chunk"), 1);
  EXPECT_LT(finished("chunk"), 300);
  interrupt_at("chunk", finished("chunk") + 1);
  EXPECT_EQ(finished("layer"), 0);
  const json resumed = run_json("eval", resumable_);
  EXPECT_EQ(finished("chunk"), 300);
  EXPECT_EQ(finished("layer"), 3);
  EXPECT_EQ(resumed["results"], whole["results"]);
  EXPECT_EQ(resumed["paired"], whole["paired"]);
  EXPECT_EQ(run_json("eval", resumable_)["results"], whole["results"]);  // with nothing left to do
}

TEST_F(EvalResume, AStateServesOneEvaluation) {
  auto command = resumable_;
  std::replace(command.begin(), command.end(), std::string("300"), std::string("1"));
  run_json("eval", command);
  command.insert(command.begin(), {"eval", model_});
  const auto with = [&](const std::string& from, const std::string& to) {
    auto changed = command;
    std::replace(changed.begin(), changed.end(), from, to);
    return changed;
  };
  expect_error(with("64", "128"), 64, {"another evaluation", "its ctx is 64, now it is 128"});
  expect_error(with("bf16,4bit", "bf16,8bit"), 64, {"another evaluation", "kv"});
  auto other_text = command;
  other_text.insert(other_text.end(), {"--text", text_});
  expect_error(other_text, 64, {"another evaluation", "text"});
  expect_error({"eval", model_, "--resume", text_}, 65, {text_, "no state"});
  expect_error({"eval", model_, "--resume", state_, "--save-logits", path("x")}, 64);
}

}  // namespace
}  // namespace kvant::testing
