// The values of JSON schema's `format` that restrict strings, as regular expressions.
#pragma once

#include <string>
#include <string_view>

namespace kvant::serve::grammar {

// Empty if the format is not known.
std::string_view format_regex(std::string_view format);
// "date, time, ...": all that are known.
std::string format_names();

}  // namespace kvant::serve::grammar
