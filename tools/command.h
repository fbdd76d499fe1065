// What a subcommand of the `kvant` program is. One file `cmd_<name>.cc` defines each; the table in
// command.cc lists them.
//
// To add one: write `tools/cmd_<name>.cc` with `const Command <name>_command = {...}`, declare it
// below, add a row to the table in command.cc and the file to tools/CMakeLists.txt.
#pragma once

#include <functional>
#include <span>
#include <string_view>

#include "kvant/base/result.h"
#include "tools/cli_support.h"

namespace CLI {
class App;
}

namespace kvant::tools {

// Whether the frame offers `--json`: one object on stdout, everything else on stderr.
enum class JsonOutput { kOffered, kNone };

// The work of a command; runs after its options have been parsed. Writes results with
// console.print(), everything else with console.note(); returns an Error instead of printing one.
using CommandBody = std::function<Status(Console& console)>;

struct Command {
  std::string_view name;
  std::string_view summary;   // one line, no full stop
  std::string_view examples;  // whole command lines, one a line; shown by --help
  JsonOutput json = JsonOutput::kOffered;
  bool listed = true;  // by --help, completions and the manual page
  // Adds positionals, options and nested subcommands to `app` and returns the body, which owns the
  // variables that the options are bound to. The frame adds --help, --quiet and --json. Do not use
  // CLI::ExistingFile: a missing file is not a usage error (its exit code is 66, not 64).
  CommandBody (*define)(CLI::App& app);
};

// One declaration per command, in the order of the table.
extern const Command run_command;
extern const Command serve_command;
extern const Command eval_command;
extern const Command compare_command;
extern const Command needle_command;
extern const Command calibrate_command;
extern const Command plan_command;
extern const Command bench_command;
extern const Command tokenize_command;
extern const Command codec_command;
extern const Command inspect_command;
extern const Command completion_command;
extern const Command man_command;

// All commands, in the order of the help page.
std::span<const Command* const> commands();

// nullptr if there is none of that name.
const Command* find_command(std::string_view name);

// "; did you mean 'run'?" for a name close to that of a command, else an empty string.
std::string suggest_command(std::string_view name);

}  // namespace kvant::tools
