// JSON strings that may carry any bytes, for `kvant tokenize --lines`.
//
// Text that is not UTF-8 travels as Python's "surrogateescape" has it: the byte 0xNN (from 0x80) is
// the lone surrogate U+DCNN, written \udcNN. Thread-safe (pure functions).
#pragma once

#include <string>
#include <string_view>

#include "kvant/base/result.h"

namespace kvant::tools {

// The bytes of the JSON string `text`, which may have white space around it. Raw bytes that are not
// UTF-8 are taken as they are. kCorruptData says what is wrong where.
Result<std::string> parse_json_string(std::string_view text);

// `bytes` as a JSON string in quotes.
std::string write_json_string(std::string_view bytes);

}  // namespace kvant::tools
