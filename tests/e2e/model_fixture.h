// SmolLM2, a scratch folder and helpers for the end-to-end tests of commands that run a model.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "tests/support/program.h"

namespace kvant::testing {

class ModelCommands : public ::testing::Test {
 protected:
  void SetUp() override {
    model_ = model_path("smollm2");
    if (model_.empty()) GTEST_SKIP() << "fetch the model: scripts/fetch_model.sh smollm2";
    make_folder();
  }
  void TearDown() override {
    if (!folder_.empty()) std::filesystem::remove_all(folder_);
  }

  void make_folder() {
    folder_ = std::filesystem::temp_directory_path() /
              (std::string("kvant_e2e_") +
               ::testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  std::string path(const std::string& name) const { return (folder_ / name).string(); }
  std::string write(const std::string& name, const std::string& bytes) const {
    std::ofstream(folder_ / name, std::ios::binary) << bytes;
    return path(name);
  }

  // Runs `command` with the model and --json; expects success and one object.
  nlohmann::json run_json(const std::string& command, std::vector<std::string> arguments) const {
    arguments.insert(arguments.begin(), {command, model_, "--json", "--quiet"});
    const ProgramResult result = run_kvant(arguments);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    EXPECT_EQ(result.err, "");
    const nlohmann::json object = nlohmann::json::parse(result.out, nullptr, false);
    EXPECT_TRUE(object.is_object()) << result.out;
    EXPECT_EQ(object.value("schema_version", 0), 1);
    EXPECT_EQ(object.value("command", ""), command);
    return object;
  }

  // Expects that the command fails with `code` and a message that contains each of `words`.
  static void expect_error(const std::vector<std::string>& arguments, int code,
                           const std::vector<std::string>& words = {},
                           const ProgramOptions& options = {}) {
    std::ostringstream line;
    for (const std::string& argument : arguments) line << argument << ' ';
    const ProgramResult result = run_kvant(arguments, options);
    EXPECT_EQ(result.exit_code, code) << line.str() << "\n" << result.err;
    EXPECT_NE(result.err.find("kvant: error: "), std::string::npos) << line.str() << result.err;
    for (const std::string& word : words) {
      EXPECT_NE(result.err.find(word), std::string::npos) << line.str() << "\n" << result.err;
    }
  }

  std::string text_ = std::string(KVANT_SOURCE_DIR) + "/examples/data/caches.txt";
  std::string model_;
  std::filesystem::path folder_;
};

}  // namespace kvant::testing
