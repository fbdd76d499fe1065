// The benches of `kvant bench`. To add one: write tools/bench_<name>.cc with `const Bench
// <name>_bench = {...}`, declare it below, add a row to the table in cmd_bench.cc and the file to
// tools/CMakeLists.txt. Each prints one JSON object a line with --json (bench_json), else a table.
#pragma once

#include <string_view>
#include <vector>

#include "tools/command.h"
#include "tools/json_output.h"

namespace kvant::tools {

struct Bench {
  std::string_view name;
  std::string_view summary;  // one line, no full stop
  // Adds options to `app`, returns the body, as Command::define does.
  CommandBody (*define)(CLI::App& app);
};

extern const Bench attention_bench;
extern const Bench engine_bench;
extern const Bench model_bench;
extern const Bench serve_bench;

// {"schema_version": 1, "command": "bench", "bench": NAME}
Json bench_json(std::string_view name);

// Median and spread of repeated measurements.
struct Spread {
  double median = 0;
  double min = 0;
  double max = 0;
};
Spread spread_of(std::vector<double> values);  // at least one

}  // namespace kvant::tools
