#include "tools/command.h"

#include <string>
#include <vector>

#include "kvant/formats/suggest.h"

namespace kvant::tools {

std::span<const Command* const> commands() {
  // clang-format off
  static const std::vector<const Command*> table = {
      &run_command,
      &serve_command,
      &eval_command,
      &compare_command,
      &needle_command,
      &calibrate_command,
      &plan_command,
      &bench_command,
      &tokenize_command,
      &codec_command,
      &inspect_command,
      &completion_command,
      &man_command,
  };
  // clang-format on
  return table;
}

const Command* find_command(std::string_view name) {
  for (const Command* command : commands()) {
    if (command->name == name) return command;
  }
  return nullptr;
}

std::string suggest_command(std::string_view name) {
  std::vector<std::string_view> names;
  for (const Command* command : commands()) names.push_back(command->name);
  return formats::did_you_mean(formats::closest_name(name, names));
}

}  // namespace kvant::tools
