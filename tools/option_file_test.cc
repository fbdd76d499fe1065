#include "tools/option_file.h"

#include <gtest/gtest.h>
#include <CLI/CLI.hpp>

namespace kvant::tools {
namespace {

struct Options {
  std::string model;
  int port = 8000;
  std::vector<std::string> names;
  bool quiet = false;
};

// What the options are after `arguments` and then `yaml`.
Result<Options> read(std::string_view yaml, std::vector<std::string> arguments = {}) {
  Options options;
  CLI::App app;
  app.add_option("MODEL", options.model);
  app.add_option("-p,--port", options.port)->check(CLI::Range(0, 65535));
  app.add_option("--served-model-name", options.names);
  app.add_flag("--no-log", options.quiet);
  app.add_option("--config");
  app.parse(std::move(arguments));
  KVANT_ASSIGN(const std::vector<FileOption> given, parse_option_file(yaml));
  KVANT_TRY(apply_option_file(app, given, "f.yaml"));
  return options;
}

std::string message_of(std::string_view yaml) {
  const Result<Options> options = read(yaml);
  EXPECT_FALSE(options) << yaml;
  return options ? std::string() : options.error().message();
}

TEST(OptionFile, SetsOptionsThatWereNotGiven) {
  const Result<Options> options =
      read("# comment\nmodel: a b.gguf\nport: 9000\nserved_model_name: [x, y]\nno-log: true\n");
  ASSERT_TRUE(options) << options.error().message();
  EXPECT_EQ(options->model, "a b.gguf");
  EXPECT_EQ(options->port, 9000);
  EXPECT_EQ(options->names, (std::vector<std::string>{"x", "y"}));
  EXPECT_TRUE(options->quiet);
  const Result<Options> both = read("port: 9000\nno-log: false\n", {"--port=1"});
  ASSERT_TRUE(both);
  EXPECT_EQ(both->port, 1);
  EXPECT_FALSE(both->quiet);
  EXPECT_EQ(read("")->port, 8000);
}

TEST(OptionFile, NamesTheNearestOption) {
  EXPECT_EQ(message_of("model: x\nprt: 1\n"),
            "f.yaml: line 2: there is no option 'prt' (did you mean 'port'?)");
  EXPECT_NE(message_of("config: x\n").find("no option"), std::string::npos);
}

TEST(OptionFile, SaysWhatIsWrongAndWhere) {
  EXPECT_NE(message_of("\nport: many\n").find("f.yaml: line 2: port"), std::string::npos);
  EXPECT_NE(message_of("port: 70000\n").find("port"), std::string::npos);
  EXPECT_NE(message_of("port: [1, 2]\n").find("port"), std::string::npos);
  EXPECT_NE(message_of("no-log: 3\n").find("true or false"), std::string::npos);
  for (const char* yaml :
       {"- a\n", "just text", "port: {a: 1}", "port:", "port: 1\nport: 2\n", "port: [[1]]",
        "{[a]: 1}", "a: b: c", "port: \"", "served-model-name: []"}) {
    message_of(yaml);
  }
}

}  // namespace
}  // namespace kvant::tools
