// `kvant inspect`: a model, plan or page file in words.
#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <memory>
#include <string>
#include <string_view>

#include "kvant/base/mapped_file.h"
#include "tools/command.h"
#include "tools/inspect_file.h"
#include "tools/json_output.h"

namespace kvant::tools {
namespace {

// The first bytes decide.
Result<Report> inspect(const InspectOptions& options) {
  std::string start;
  {
    KVANT_ASSIGN(const MappedFile file, MappedFile::open(options.path));
    const auto bytes = file.bytes().first(std::min<size_t>(9, file.bytes().size()));
    start.assign(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }
  const std::string_view head = start;
  if (head.starts_with("GGUF")) return inspect_model(options);
  if (head.starts_with("KVNTPAGE")) return inspect_page(options);
  // safetensors: eight bytes of length, then JSON.
  if (head.size() == 9 && head[8] == '{') return inspect_plan(options);
  return Error(ErrorCode::kCorruptData,
               options.path +
                   ": neither a model (GGUF), nor a quantisation plan (safetensors), nor a page "
                   "file (KVNTPAGE), by its first bytes");
}

// Strings of a file must not command the terminal.
std::string printable(std::string text) {
  for (char& c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) c = '?';
  }
  return text;
}

Status run(Console& console, const InspectOptions& options) {
  KVANT_ASSIGN(const Report report, inspect(options));
  if (console.json()) {
    Json json = json_object("inspect");
    json["file"] = options.path;
    json.update(report.json);
    return print_json(console, json);
  }
  size_t width = 0;
  for (const auto& [name, text] : report.lines) width = std::max(width, name.size());
  KVANT_TRY(console.print(report.title + "\n"));
  for (const auto& [name, text] : report.lines)
    KVANT_TRY(console.print(fmt::format("  {:<{}}  {}\n", name, width, printable(text))));
  return {};
}

CommandBody define(CLI::App& app) {
  auto options = std::make_shared<InspectOptions>();
  app.add_option("FILE", options->path, "Model (GGUF), quantisation plan or page file")->required();
  app.add_flag("--metadata", options->metadata, "Every key of a model file");
  app.add_flag("--tensors", options->tensors, "Every tensor of a model file");
  return [options](Console& console) { return run(console, *options); };
}

}  // namespace

const Command inspect_command = {
    .name = "inspect",
    .summary = "Say what a model, plan or page file holds, and what of it is supported",
    .examples =
        "kvant inspect model.gguf\n"
        "kvant inspect --tensors --json model.gguf",
    .define = define,
};

}  // namespace kvant::tools
