// JSON on stdout: the object that `--json` promises. Keys keep the order in which they were added.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "tools/cli_support.h"

namespace kvant::tools {

using Json = nlohmann::ordered_json;

// Raised when a field changes its meaning or goes away; new fields do not raise it
// (docs/versioning.md).
inline constexpr int kSchemaVersion = 1;

// {"schema_version": 1, "command": NAME}; add the command's own fields to it.
Json json_object(std::string_view command);

// {"schema_version": 1, "command": NAME, "error": {"code", "message"}}
Json json_error(std::string_view command, const Error& error);

// Compact text on one line, without a newline. Bytes that are not UTF-8 become U+FFFD.
std::string json_text(const Json& value);

// Prints `value` and a newline on stdout, at once.
Status print_json(Console& console, const Json& value);

}  // namespace kvant::tools
