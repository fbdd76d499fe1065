// The `kvant` program: finds the command, parses its options, runs it, turns its Error into a
// message and an exit code. The only place that catches InternalError.
#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstdio>
#include <new>
#include <string>
#include <vector>

#include "kvant/base/check.h"
#include "kvant/base/cpu_level.h"
#include "tools/command.h"
#include "tools/command_app.h"
#include "tools/json_output.h"

namespace kvant::tools {
namespace {

constexpr std::string_view kIntroduction =
    "kvant runs language models with a key/value cache of 2 to 8 bits.\n";

std::string version_line() {
#if defined(__clang__)
  const std::string compiler = fmt::format("clang {}", __clang_version__);
#else
  const std::string compiler = fmt::format("g++ {}", __VERSION__);
#endif
  const Result<CpuLevel> level = choose_cpu_level();
  return fmt::format("kvant {} (cpu level {}, {})\n", KVANT_VERSION,
                     level ? cpu_level_name(*level) : "unknown", compiler);
}

std::string help_page() {
  std::string text(kIntroduction);
  text += "\nUsage: kvant COMMAND [OPTIONS]\n\nCommands:\n";
  size_t width = 0;
  for (const Command* command : commands()) width = std::max(width, command->name.size());
  for (const Command* command : commands()) {
    if (!command->listed) continue;
    text += fmt::format("  {:<{}}  {}\n", command->name, width, command->summary);
  }
  text += "\nExamples:\n";
  for (const Command* command : commands()) {
    if (!command->listed) continue;
    const std::string_view examples = command->examples;
    text += fmt::format("  {}\n", examples.substr(0, examples.find('\n')));
  }
  text +=
      "\n`kvant COMMAND --help` explains a command; `kvant --version` names the build."
      "\nResults go to standard output, messages to standard error; exit codes are in "
      "docs/cli.md.\n";
  return text;
}

void print_error(std::string_view name, const Error& error) {
  std::string text = fmt::format("kvant: error: {}\n", error.message());
  if (error.code() == ErrorCode::kInvalidArgument) {
    text += name.empty()
                ? std::string("kvant: hint: `kvant --help` lists the commands\n")
                : fmt::format("kvant: hint: `kvant {} --help` shows the options and an example\n",
                              name);
  } else if (error.code() == ErrorCode::kInternal) {
    text +=
        "kvant: hint: this is a bug in kvant; please report it with the command line that led to "
        "it\n";
  }
  std::fputs(text.c_str(), stderr);
}

// Prints the error where users and programs look for it; returns the exit code.
int report(Console& console, std::string_view name, const Error& error) {
  if (console.reader_gone()) return kExitOk;  // `kvant ... | head` has got what it wanted
  if (console.json() && error.code() != ErrorCode::kIoError) {
    if (Status written = print_json(console, json_error(name, error)); !written) {
      print_error(name, written.error());
    }
  }
  print_error(name, error);
  if (error.code() == ErrorCode::kCancelled && Console::stop_signal() != 0) {
    return 128 + Console::stop_signal();
  }
  return exit_code(error.code());
}

// Runs the body; whatever it throws becomes an Error. What it printed is shown also if it failed.
Status run_body(const CommandBody& body, Console& console) {
  try {
    Status status = body(console);
    const Status flushed = console.flush();
    return status ? flushed : status;
  } catch (const std::bad_alloc&) {
    return Error(ErrorCode::kResourceExhausted,
                 "out of memory; use a smaller context, fewer sequences or a smaller cache format");
  } catch (const std::exception& exception) {
    return Error(ErrorCode::kInternal, exception.what());
  }
}

int print_and_exit(std::string_view text) {
  Console console;
  Status written = console.print(text);
  if (written) written = console.flush();
  return written ? kExitOk : report(console, "", written.error());
}

int run_command(const Command& command, std::vector<std::string> arguments) {
  ParsedCommand parsed(command);
  // CLI11 sets flags only when all arguments are right, but their errors follow --json as well.
  parsed.options.json = command.json == JsonOutput::kOffered &&
                        std::find(arguments.begin(), arguments.end(), "--json") != arguments.end();
  std::reverse(arguments.begin(), arguments.end());  // CLI11 takes them last first
  try {
    parsed.app.parse(std::move(arguments));
  } catch (const CLI::CallForHelp&) {
    return print_and_exit(parsed.app.help());
  } catch (const CLI::CallForAllHelp&) {
    return print_and_exit(parsed.app.help("", CLI::AppFormatMode::All));
  } catch (const CLI::ParseError& error) {
    Console console(parsed.options);
    return report(console, command.name, Error(ErrorCode::kInvalidArgument, error.what()));
  }
  Console console(parsed.options);
  const Status status = run_body(parsed.body, console);
  return status ? kExitOk : report(console, command.name, status.error());
}

int run(std::vector<std::string> arguments) {
  if (arguments.empty()) {
    std::fputs(help_page().c_str(), stderr);
    return kExitUsage;
  }
  const std::string name = arguments.front();
  arguments.erase(arguments.begin());
  if (name == "--version" || name == "version") return print_and_exit(version_line());
  if (name == "--help" || name == "-h" || (name == "help" && arguments.empty())) {
    return print_and_exit(help_page());
  }
  if (name == "help") {  // kvant help COMMAND
    arguments.push_back("--help");
    return run(std::move(arguments));
  }
  const Command* command = find_command(name);
  if (command == nullptr) {
    Console console;
    return report(console, "",
                  Error(ErrorCode::kInvalidArgument,
                        fmt::format("unknown command '{}'{}", name, suggest_command(name))));
  }
  return run_command(*command, std::move(arguments));
}

}  // namespace
}  // namespace kvant::tools

int main(int argc, char** argv) {
  kvant::tools::Console::install_signal_handlers();
  try {
    return kvant::tools::run(std::vector<std::string>(argv + 1, argv + argc));
  } catch (
      const std::exception& exception) {  // outside a command: no memory for its options, or a bug
    std::fprintf(stderr, "kvant: error: %s\n", exception.what());
    return kvant::tools::kExitSoftware;
  }
}
