// What every command promises: help with an example, exit codes, errors that say what to do. The
// commands are read from the help page, so that a new one is tested without a change here.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/support/program.h"

namespace kvant::testing {
namespace {

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST(Cli, VersionNamesTheBuild) {
  const ProgramResult result = run_kvant({"--version"});
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_TRUE(contains(result.out, "kvant ")) << result.out;
  EXPECT_TRUE(contains(result.out, "cpu level")) << result.out;
}

TEST(Cli, WithoutArgumentsShowsHelpAndFails) {
  const ProgramResult result = run_kvant({});
  EXPECT_EQ(result.exit_code, 64);
  EXPECT_EQ(result.out, "");
  EXPECT_TRUE(contains(result.err, "Usage:"));
}

TEST(Cli, HelpListsCommands) {
  EXPECT_FALSE(command_names(run_kvant({"--help"}).out).empty());
  EXPECT_EQ(run_kvant({"help"}).out, run_kvant({"--help"}).out);
}

TEST(Cli, EveryCommandExplainsItselfWithAnExample) {
  for (const std::string& name : command_names(run_kvant({"--help"}).out)) {
    const ProgramResult result = run_kvant({name, "--help"});
    EXPECT_EQ(result.exit_code, 0) << name;
    EXPECT_TRUE(contains(result.out, "Examples:")) << name;
    EXPECT_TRUE(contains(result.out, "kvant " + name)) << name;
    EXPECT_EQ(result.err, "") << name;
    EXPECT_EQ(run_kvant({"help", name}).out, result.out) << name;
  }
}

TEST(Cli, UnknownCommandSuggestsOne) {
  const ProgramResult result = run_kvant({"tokenise"});
  EXPECT_EQ(result.exit_code, 64);
  EXPECT_TRUE(contains(result.err, "unknown command 'tokenise'")) << result.err;
  EXPECT_TRUE(contains(result.err, "did you mean 'tokenize'?")) << result.err;
  EXPECT_TRUE(contains(result.err, "hint:")) << result.err;
}

TEST(Cli, UnknownOptionIsAUsageErrorOfEveryCommand) {
  for (const std::string& name : command_names(run_kvant({"--help"}).out)) {
    const ProgramResult result = run_kvant({name, "--no-such-option"});
    EXPECT_EQ(result.exit_code, 64) << name << ": " << result.err;
    EXPECT_EQ(result.out, "") << name;
    EXPECT_TRUE(contains(result.err, "kvant: error: ")) << name << ": " << result.err;
    EXPECT_TRUE(contains(result.err, "kvant " + name + " --help")) << name << ": " << result.err;
  }
}

TEST(Cli, FullDiskIsAnIoError) {
  ProgramOptions options;
  options.stdout_to = "/dev/full";
  const ProgramResult result = run_kvant({"--help"}, options);
  EXPECT_EQ(result.exit_code, 74);
  EXPECT_TRUE(contains(result.err, "No space left on device")) << result.err;
}

TEST(Cli, ClosedPipeEndsQuietly) {
  ProgramOptions options;
  options.close_stdout_after = 0;
  const ProgramResult result = run_kvant({"--help"}, options);
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_EQ(result.err, "");
}

TEST(Cli, MissingModelFileIsNoInput) {
  const ProgramResult result = run_kvant({"tokenize", "/no/such/model.gguf"});
  EXPECT_EQ(result.exit_code, 66);
  EXPECT_TRUE(contains(result.err, "/no/such/model.gguf")) << result.err;
}

TEST(Cli, JsonErrorsAreOneObject) {
  const ProgramResult result = run_kvant({"eval", "/no/such/model.gguf", "--text", "x", "--json"});
  EXPECT_EQ(result.exit_code, 66);
  const nlohmann::json object = nlohmann::json::parse(result.out);
  EXPECT_EQ(object["schema_version"], 1);
  EXPECT_EQ(object["command"], "eval");
  EXPECT_EQ(object["error"]["code"], "not_found");
}

TEST(Cli, InterruptedReadOfStdinExitsWith130) {
  const std::string model = model_path("smollm2");
  if (model.empty()) GTEST_SKIP() << "fetch the model: scripts/fetch_model.sh smollm2";
  ProgramOptions options;
  options.interrupt_after_ms = 1500;
  const ProgramResult result = run_kvant({"tokenize", model}, options);
  EXPECT_EQ(result.exit_code, 130) << result.err;
}

}  // namespace
}  // namespace kvant::testing
