// The options of benches that send a workload.
#pragma once

#include <string_view>

#include "tools/load_workload.h"

namespace CLI {
class App;
}

namespace kvant::tools {

std::string_view workload_kind_name(WorkloadKind kind);  // as --workload names it

// Adds --workload, -n, --request-rate, lengths, prefixes, --turns, --trace, --vocab-size, --seed.
void add_workload_options(CLI::App& app, WorkloadOptions& workload);

}  // namespace kvant::tools
