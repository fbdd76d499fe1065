#include "tools/command_app.h"

#include <fmt/format.h>

#include <algorithm>
#include <string>

namespace kvant::tools {

ParsedCommand::ParsedCommand(const Command& command)
    : app(std::string(command.summary) + ".", "kvant " + std::string(command.name)) {
  body = command.define(app);
  if (command.json == JsonOutput::kOffered) {
    app.add_flag("--json", options.json, "Print one JSON object on standard output");
  }
  app.add_flag("--quiet", options.quiet, "No progress and no notes on standard error");
  std::string examples = "\nExamples:\n";
  size_t start = 0;
  while (start < command.examples.size()) {
    const size_t end = std::min(command.examples.find('\n', start), command.examples.size());
    examples += fmt::format("  {}\n", command.examples.substr(start, end - start));
    start = end + 1;
  }
  app.footer(examples);
  app.fallthrough();  // --json and --quiet may also follow a nested subcommand
  for (CLI::App* nested : app.get_subcommands([](CLI::App*) { return true; })) {
    nested->fallthrough();
    nested->footer(examples);
  }
}

}  // namespace kvant::tools
