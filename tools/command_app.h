// A command's option parser together with the options that the frame adds: what main() parses with,
// and what completions and the manual page are made from, so that they cannot differ.
#pragma once

#include <CLI/CLI.hpp>

#include "tools/command.h"

namespace kvant::tools {

struct ParsedCommand {
  explicit ParsedCommand(const Command& command);

  CLI::App app;
  CommandBody body;
  Console::Options options;
};

}  // namespace kvant::tools
