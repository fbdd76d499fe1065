// Texts that the program carries inside, so that evaluation needs no file: examples/data/README.md
// says what they are and whose. Thread-safe.
#pragma once

#include <string_view>

namespace kvant::tools {

// examples/data/registers.txt: prose, dialogue, dictionary, code and lists in turn.
std::string_view registers_text();

// examples/data/novel.txt: prose of one kind.
std::string_view novel_text();

// What --json and reports call a text that is not a file.
inline constexpr std::string_view kBundledName = "bundled";

}  // namespace kvant::tools
