// Operators of the Jinja interpreter, with Python's meaning. Internal to model/.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "kvant/base/result.h"
#include "kvant/model/jinja_value.h"

namespace kvant::model::jinja {

// + - * / // % ** ~ ; integers that leave 64 bits are an error.
Result<Value> binary_operator(std::string_view op, const Value& a, const Value& b, int line,
                              Budget& budget);
// == != < <= > >= in, not in
Result<bool> comparison_operator(std::string_view op, const Value& a, const Value& b, int line,
                                 Budget& budget);
Result<Value> negate(const Value& a, int line);

// object[index]; undefined outside of the bounds or of what has none.
Result<Value> item_at(const Value& object, int64_t index, Budget& budget);

struct SliceBounds {
  std::optional<int64_t> start, stop, step;
};
// Of a list or a string (in characters).
Result<Value> slice(const SliceBounds& bounds, const Value& object, int line, Budget& budget);

}  // namespace kvant::model::jinja
