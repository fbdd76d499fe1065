#include "tools/command.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

namespace kvant::tools {

std::span<const Command* const> commands() {
  // clang-format off
  static const std::vector<const Command*> table = {
      &tokenize_command,
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

namespace {

// Levenshtein distance; names are a dozen bytes.
size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substitute = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substitute});
    }
  }
  return row[b.size()];
}

}  // namespace

std::string suggest_command(std::string_view name) {
  for (const Command* command : commands()) {
    if (edit_distance(name, command->name) <= 2) {
      return "; did you mean '" + std::string(command->name) + "'?";
    }
  }
  return "";
}

}  // namespace kvant::tools
