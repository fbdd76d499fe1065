// What `kvant inspect` says about each kind of file. A report is facts in order, with their JSON.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "kvant/base/result.h"
#include "tools/json_output.h"

namespace kvant::tools {

struct InspectOptions {
  std::string path;
  bool metadata = false;  // every key of a model file
  bool tensors = false;   // every tensor of a model file
};

struct Report {
  std::string title;  // "FILE: what it is"
  std::vector<std::pair<std::string, std::string>> lines;
  Json json;  // without schema_version and command

  // A line for people and the same fact for programs.
  void add(std::string name, std::string text) {
    lines.emplace_back(std::move(name), std::move(text));
  }
};

// kCorruptData, kUnsupported, ... with the path.
Result<Report> inspect_model(const InspectOptions& options);
Result<Report> inspect_plan(const InspectOptions& options);
Result<Report> inspect_page(const InspectOptions& options);

}  // namespace kvant::tools
