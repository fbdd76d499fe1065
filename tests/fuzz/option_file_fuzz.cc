// Option files of `kvant serve`: whatever parses has names and values; applying it to a command
// does not crash.
#include <CLI/CLI.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "tools/option_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvant;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto options = tools::parse_option_file(text);
  if (!options) return 0;
  for (const tools::FileOption& option : *options) {
    if (option.values.empty() || option.line < 1) std::abort();
  }
  CLI::App app;
  int port = 0;
  bool flag = false;
  std::vector<std::string> names;
  app.add_option("--port", port)->check(CLI::Range(0, 65535));
  app.add_option("--served-model-name", names);
  app.add_flag("--no-access-log", flag);
  if (const Status status = tools::apply_option_file(app, *options, "f"); status) {
    if (port < 0 || port > 65535) std::abort();
  }
  return 0;
}
