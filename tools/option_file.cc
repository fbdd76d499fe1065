#include "tools/option_file.h"

#include <fmt/format.h>
#include <yaml-cpp/yaml.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <set>

#include "kvant/formats/suggest.h"

namespace kvant::tools {
namespace {

constexpr size_t kMaxFileBytes = 1 << 20;

Error error_at(int line, std::string_view message) {
  return Error(ErrorCode::kInvalidArgument, fmt::format("line {}: {}", line, message));
}

// Flags have no value on the command line.
bool is_flag(const CLI::Option& option) {
  return option.get_items_expected_max() == 0;
}

// "MODEL" is an argument; everything else has its long name.
CLI::Option* find_option(CLI::App& app, const std::string& name) {
  if (name == "config" || name == "help") return nullptr;
  if (name == "model") return app.get_option_no_throw("MODEL");
  return app.get_option_no_throw("--" + name);
}

std::vector<std::string> option_names(const CLI::App& app) {
  std::vector<std::string> names = {"model"};
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) {
      if (name != "config" && name != "help") names.push_back(name);
    }
  }
  return names;
}

Status set_option(CLI::Option& option, const FileOption& given) {
  if (is_flag(option)) {
    const std::string& value = given.values.front();
    if (given.values.size() != 1 || (value != "true" && value != "false")) {
      return error_at(given.line, fmt::format("{}: expected true or false", given.name));
    }
    if (value == "false") return {};
  }
  try {
    for (const std::string& value : given.values) option.add_result(value);
    option.run_callback();
  } catch (const CLI::Error& error) {
    option.clear();
    return error_at(given.line, fmt::format("{}: {}", given.name, error.what()));
  }
  return {};
}

}  // namespace

Result<std::vector<FileOption>> parse_option_file(std::string_view yaml) {
  if (yaml.size() > kMaxFileBytes) {
    return Error(ErrorCode::kInvalidArgument, "more than 1 MiB; options take less");
  }
  std::vector<FileOption> options;
  try {
    const YAML::Node root = YAML::Load(std::string(yaml));
    if (root.IsNull()) return options;
    if (!root.IsMap()) return error_at(1, "expected lines of the form OPTION: VALUE");
    std::set<std::string> seen;
    for (const auto& entry : root) {
      FileOption option;
      option.line = entry.first.Mark().line + 1;
      if (!entry.first.IsScalar()) return error_at(option.line, "expected the name of an option");
      option.name = entry.first.Scalar();
      std::replace(option.name.begin(), option.name.end(), '_', '-');
      const std::string name = formats::quote_name(option.name);
      if (!seen.insert(option.name).second) {
        return error_at(option.line, fmt::format("{} is there already", name));
      }
      const YAML::Node& value = entry.second;
      if (value.IsScalar()) {
        option.values.push_back(value.Scalar());
      } else if (value.IsSequence() && value.size() > 0) {
        for (const YAML::Node& item : value) {
          if (!item.IsScalar()) return error_at(option.line, name + ": expected a flat list");
          option.values.push_back(item.Scalar());
        }
      } else {
        return error_at(option.line, name + ": expected a value or a list of values");
      }
      options.push_back(std::move(option));
    }
  } catch (const YAML::Exception& exception) {
    return error_at(exception.mark.line + 1, "not YAML: " + exception.msg);
  }
  return options;
}

Status apply_option_file(CLI::App& app, std::span<const FileOption> options,
                         const std::string& path) {
  for (const FileOption& given : options) {
    CLI::Option* option = find_option(app, given.name);
    if (option == nullptr) {
      const std::vector<std::string> names = option_names(app);
      const std::vector<std::string_view> views(names.begin(), names.end());
      return error_at(given.line,
                      fmt::format("there is no option {}{}", formats::quote_name(given.name),
                                  formats::did_you_mean(formats::closest_name(given.name, views))))
          .with_context(path);
    }
    if (option->count() > 0) continue;  // the command line wins
    if (Status status = set_option(*option, given); !status) {
      return status.error().with_context(path);
    }
  }
  return {};
}

}  // namespace kvant::tools
