// `kvant tokenize` as users run it, with SmolLM2.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/support/program.h"

namespace kvant::testing {
namespace {

class Tokenize : public ::testing::Test {
 protected:
  void SetUp() override {
    model_ = model_path("smollm2");
    ASSERT_NE(model_, "") << "run scripts/fetch_model.sh smollm2";
  }
  ProgramResult run(const std::string& input, std::vector<std::string> options = {}) const {
    options.insert(options.begin(), {"tokenize", model_});
    ProgramOptions how;
    how.input = input;
    return run_kvant(options, how);
  }
  std::string model_;
};

TEST_F(Tokenize, OneTextOnStandardInput) {
  EXPECT_EQ(run("Hello, we can use").out, "[19556,28,392,416,722]\n");
  EXPECT_EQ(run("\n").out, "[198]\n");
  EXPECT_EQ(run("").out, "[]\n");
  EXPECT_EQ(run("Hello", {"--bos"}).out, "[1,19556]\n");
  EXPECT_EQ(run("<|im_end|>").out, "[2]\n");
  EXPECT_NE(run("<|im_end|>", {"--no-special"}).out, "[2]\n");
}

TEST_F(Tokenize, LinesAndBack) {
  const std::string lines = "\"Hello\"\n\"a\\nb\"\n\"Gr\\u00fc\\u00dfe\"\n";
  const ProgramResult ids = run(lines, {"--lines"});
  EXPECT_EQ(ids.exit_code, 0);
  EXPECT_TRUE(ids.out.starts_with("[19556]\n[")) << ids.out;
  EXPECT_EQ(run(ids.out, {"--lines", "--decode"}).out, "\"Hello\"\n\"a\\nb\"\n\"Grüße\"\n");
  EXPECT_EQ(run("[19556,28,392]", {"--decode"}).out, "Hello, we");
}

TEST_F(Tokenize, BadInput) {
  EXPECT_EQ(run("nonsense", {"--decode"}).exit_code, 65);
  EXPECT_EQ(run("[1,-5]", {"--decode"}).exit_code, 65);
  const ProgramResult line = run("\"good\"\nbad\n", {"--lines"});
  EXPECT_EQ(line.exit_code, 65);
  EXPECT_NE(line.err.find("line 2: expected a JSON string"), std::string::npos) << line.err;
  EXPECT_EQ(run_kvant({"tokenize", "/no/such/file"}, {}).exit_code, 66);
}

}  // namespace
}  // namespace kvant::testing
