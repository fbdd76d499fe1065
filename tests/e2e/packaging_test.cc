// What packages install beside the program: completions and the manual page know every option, the
// service is one that systemd accepts, the image has the libraries that the program needs.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "tests/support/program.h"

namespace kvant::testing {
namespace {

namespace fs = std::filesystem;

struct Output {
  int status = -1;
  std::string text;
};

Output shell(const std::string& command) {
  FILE* pipe = popen(("exec 2>&1; " + command).c_str(), "r");
  Output output;
  if (pipe == nullptr) return output;
  for (char buffer[4096]; size_t count = fread(buffer, 1, sizeof(buffer), pipe);) {
    output.text.append(buffer, count);
  }
  output.status = pclose(pipe);
  return output;
}

bool installed(const std::string& program) {
  return shell("command -v " + program).status == 0;
}

std::string read(const fs::path& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

class Packaging : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / "kvant_packaging_test";
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string write(const std::string& name, const std::string& text) {
    std::ofstream(folder_ / name) << text;
    return (folder_ / name).string();
  }
  std::string page(const std::vector<std::string>& arguments) {
    const ProgramResult result = run_kvant(arguments);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return result.out;
  }
  // What bash offers for a line that ends where the cursor is.
  std::set<std::string> completions(const std::vector<std::string>& words) {
    const std::string script = write("kvant.bash", page({"completion", "bash"}));
    std::string line = "source " + script + "; COMP_WORDS=(kvant";
    for (const std::string& word : words) line += " '" + word + "'";
    line += "); COMP_CWORD=" + std::to_string(words.size()) +
            "; _kvant; printf '%s\\n' \"${COMPREPLY[@]}\"";
    std::istringstream lines(shell("bash -c \"" + escaped(line) + "\"").text);
    std::set<std::string> found;
    for (std::string one; std::getline(lines, one);) found.insert(one);
    return found;
  }
  static std::string escaped(const std::string& text) {
    std::string result;
    for (const char c : text) {
      if (c == '"' || c == '$' || c == '\\') result += '\\';
      result += c;
    }
    return result;
  }
  // Long options in a command's --help.
  static std::set<std::string> options_of(const std::string& help) {
    static const std::regex pattern("^  (?:-[a-zA-Z],)?(--[a-z][a-z0-9-]*)");
    std::set<std::string> options;
    std::istringstream lines(help);
    for (std::string line; std::getline(lines, line);) {
      std::smatch match;
      if (std::regex_search(line, match, pattern)) options.insert(match[1]);
    }
    return options;
  }
  fs::path folder_;
};

TEST_F(Packaging, CompletionsKnowCommandsAndOptions) {
  EXPECT_EQ(completions({"ru"}), (std::set<std::string>{"run"}));
  EXPECT_TRUE(completions({""}).contains("eval"));
  EXPECT_TRUE(completions({"bench", ""}).contains("model"));
  EXPECT_TRUE(completions({"run", "m.gguf", "--kv", ""}).contains("4bit"));
  EXPECT_EQ(completions({"run", "m.gguf", "--device", "cu"}), (std::set<std::string>{"cuda"}));
  for (const std::string& command : command_names(page({"--help"}))) {
    const std::set<std::string> offered = completions({command, "--"});
    const std::set<std::string> options = options_of(page({command, "--help"}));
    EXPECT_GT(options.size(), 0u) << command;
    for (const std::string& option : options) {
      EXPECT_TRUE(offered.contains(option)) << command << " " << option;
    }
  }
}

TEST_F(Packaging, CompletionsAreWellFormed) {
  const std::string bash = write("kvant.bash", page({"completion", "bash"}));
  EXPECT_EQ(shell("bash -n " + bash).text, "");
  if (installed("shellcheck")) {
    // Names are words on purpose, and so are lists of words.
    EXPECT_EQ(shell("shellcheck -s bash -S warning " + bash).text, "");
  }
  const std::string zsh = page({"completion", "zsh"});
  EXPECT_TRUE(zsh.starts_with("#compdef kvant\n"));
  if (installed("zsh")) {
    EXPECT_EQ(shell("zsh -n " + write("_kvant", zsh)).text, "");
  }
  EXPECT_EQ(run_kvant({"completion", "fish"}).exit_code, 64);
}

TEST_F(Packaging, ManualPageIsCompleteAndWellFormed) {
  const std::string source = page({"man"});
  std::string plain = std::regex_replace(source, std::regex("\\\\-"), "-");
  for (const std::string& command : command_names(page({"--help"}))) {
    EXPECT_NE(plain.find(".SS \"kvant " + command + "\""), std::string::npos) << command;
    for (const std::string& option : options_of(page({command, "--help"}))) {
      EXPECT_NE(plain.find(option + "\\fR"), std::string::npos) << command << " " << option;
    }
  }
  if (!installed("groff")) GTEST_SKIP() << "needs groff";
  EXPECT_EQ(shell("groff -man -ww -z " + write("kvant.1", source)).text, "");
}

TEST_F(Packaging, HiddenCommandsAreNotListed) {
  const std::string help = page({"--help"});
  EXPECT_EQ(help.find("completion"), std::string::npos);
  EXPECT_NE(page({"completion", "--help"}).find("Examples:"), std::string::npos);
}

TEST_F(Packaging, SystemdAcceptsTheService) {
  if (!installed("systemd-analyze")) GTEST_SKIP() << "needs systemd";
  std::string unit = read(KVANT_SOURCE_DIR "/packaging/kvant.service.in");
  unit = std::regex_replace(unit, std::regex("@CMAKE_INSTALL_FULL_BINDIR@/kvant"), KVANT_PROGRAM);
  const std::string path = write("kvant.service", unit);
  const Output verified = shell("systemd-analyze verify --man=no " + path);
  EXPECT_EQ(verified.status, 0) << verified.text;
  EXPECT_EQ(verified.text.find("kvant.service:"), std::string::npos) << verified.text;
  // 0 is shut tight, 10 is open.
  const Output exposure = shell("systemd-analyze security --offline=true --threshold=25 " + path);
  EXPECT_EQ(exposure.status, 0) << exposure.text.substr(exposure.text.size() / 4 * 3);
}

// A library that the program gains must be in the image too.
TEST_F(Packaging, ImageHasTheLibrariesOfTheProgram) {
  if (!installed("dpkg-query") || !installed("ldd")) GTEST_SKIP() << "needs Debian";
  std::string dockerfile = read(KVANT_SOURCE_DIR "/packaging/Dockerfile");
  std::istringstream libraries(shell(std::string("ldd ") + KVANT_PROGRAM).text);
  int known = 0;
  for (std::string line; std::getline(libraries, line);) {
    const size_t arrow = line.find(" => /");
    if (arrow == std::string::npos) continue;
    std::string path;
    std::istringstream(line.substr(arrow + 4)) >> path;
    if (path.find("san.so") != std::string::npos) continue;  // of instrumented builds
    // /lib is /usr/lib, and packages name either.
    Output owner = shell("dpkg-query -S " + path);
    if (owner.status != 0) owner = shell("dpkg-query -S /usr" + path);
    if (owner.status != 0) continue;  // not a package's
    const std::string package = owner.text.substr(0, owner.text.find(':'));
    // Always there, or needed by what is named.
    static const std::set<std::string> base = {
        "libc6",       "libgcc-s1",       "libsodium23",      "libpgm-5.3-0", "libnorm1",
        "libbsd0",     "libmd0",          "libgssapi-krb5-2", "libkrb5-3",    "libk5crypto3",
        "libcom-err2", "libkrb5support0", "libkeyutils1",     "libxml2",      "zlib1g",
        "liblzma5",    "libicu72",        "libgomp1"};
    if (base.contains(package)) continue;
    EXPECT_NE(dockerfile.find(" " + package + " "), std::string::npos)
        << package << " for " << path;
    ++known;
  }
  EXPECT_GT(known, 3);
}

}  // namespace
}  // namespace kvant::testing
