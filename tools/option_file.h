// Options of a command in a YAML file, under their long names:
//
//   model: models/SmolLM2-135M-Instruct.Q4_1.gguf
//   port: 9000
//   served-model-name: [small, smollm2]
//   no-access-log: true
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/base/result.h"

namespace CLI {
class App;
}

namespace kvant::tools {

struct FileOption {
  std::string name;                 // without dashes in front; '_' is read as '-'
  std::vector<std::string> values;  // one, or those of a list
  int line = 0;                     // from 1
};

// kInvalidArgument with the line: not YAML, not a flat mapping, a doubled or empty option.
Result<std::vector<FileOption>> parse_option_file(std::string_view yaml);

// Sets the options of `app` that were not given on the command line, as if they had been. `path` is
// for messages. kInvalidArgument for an unknown name (with the nearest one) or a wrong value.
Status apply_option_file(CLI::App& app, std::span<const FileOption> options,
                         const std::string& path);

}  // namespace kvant::tools
