// Text of errors about names: quoting what was given, naming what is close to it.
#pragma once

#include <span>
#include <string>
#include <string_view>

namespace kvant::formats {

// 'text' with unprintable bytes as '?', cut to a length that fits a message.
std::string quote_name(std::string_view text);

// The name that `given` is probably a misspelling of; empty if none is close.
std::string_view closest_name(std::string_view given, std::span<const std::string_view> names);

// " (did you mean 'name'?)", or nothing for an empty name.
std::string did_you_mean(std::string_view name);

}  // namespace kvant::formats
