// Regular expressions for the decimal numbers within bounds, as JSON writes them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "kvant/base/result.h"

namespace kvant::serve::grammar {

struct Bound {
  double value = 0;
  bool inclusive = true;
};

// Integers of at most 18 digits between the bounds. nullopt: there are none.
std::optional<std::string> integer_range_regex(const std::optional<Bound>& low,
                                               const std::optional<Bound>& high);

// Numbers without an exponent, at most 15 digits before and 16 behind the point (more behind it
// where the bounds have more). nullopt: none. kUnsupported for bounds of 1e15 and more.
Result<std::optional<std::string>> number_range_regex(const std::optional<Bound>& low,
                                                      const std::optional<Bound>& high);

}  // namespace kvant::serve::grammar
