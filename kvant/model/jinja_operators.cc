#include "kvant/model/jinja_operators.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "kvant/model/jinja_builtins.h"
#include "kvant/model/jinja_syntax.h"

namespace kvant::model::jinja {
namespace {

Error wrong_types(std::string_view op, const Value& a, const Value& b, int line) {
  return invalid_at(line,
                    fmt::format("a {} {} a {} has no meaning", a.type_name(), op, b.type_name()));
}

Result<Value> float_operator(std::string_view op, double a, double b, int line) {
  if (op == "+") return Value(a + b);
  if (op == "-") return Value(a - b);
  if (op == "*") return Value(a * b);
  if (op == "**") return Value(std::pow(a, b));
  if (b == 0) return invalid_at(line, "division by zero");
  if (op == "/") return Value(a / b);
  if (op == "//") return Value(std::floor(a / b));
  double rest = std::fmod(a, b);  // with the sign of the divisor
  if (rest != 0 && (rest < 0) != (b < 0)) rest += b;
  return Value(rest);
}

// Rounds down, as Python does. b is neither 0 nor -1.
int64_t floor_divide(int64_t a, int64_t b) {
  const int64_t quotient = a / b;
  return a % b != 0 && (a < 0) != (b < 0) ? quotient - 1 : quotient;
}

bool power(int64_t base, int64_t exponent, int64_t& out) {
  out = 1;
  for (int64_t i = 0; i < exponent; ++i) {
    if (__builtin_mul_overflow(out, base, &out)) return false;
    if (base == 0 || base == 1) break;
    if (base == -1) {
      out = exponent % 2 == 0 ? 1 : -1;
      break;
    }
  }
  return true;
}

Result<Value> int_operator(std::string_view op, int64_t a, int64_t b, int line) {
  if (op == "/" || (op == "**" && b < 0)) {
    return float_operator(op, static_cast<double>(a), static_cast<double>(b), line);
  }
  int64_t out = 0;
  bool fits = true;
  if (op == "+") {
    fits = !__builtin_add_overflow(a, b, &out);
  } else if (op == "-") {
    fits = !__builtin_sub_overflow(a, b, &out);
  } else if (op == "*") {
    fits = !__builtin_mul_overflow(a, b, &out);
  } else if (op == "**") {
    fits = power(a, b, out);
  } else if (b == 0) {
    return invalid_at(line, "division by zero");
  } else if (b == -1) {
    fits = op == "%" || !__builtin_sub_overflow(int64_t{0}, a, &out);
  } else {
    const int64_t quotient = floor_divide(a, b);
    out = op == "//" ? quotient : a - quotient * b;
  }
  if (!fits) return invalid_at(line, "an integer leaves 64 bits");
  return Value(out);
}

// "ab" * 3, [x] * 3
Result<Value> repeat(const Value& what, int64_t times, Budget& budget) {
  times = std::max<int64_t>(times, 0);
  const std::string* text = what.as_string();
  const double size = text != nullptr ? static_cast<double>(text->size())
                                      : 64.0 * static_cast<double>(what.as_list()->items.size());
  const double total = size * static_cast<double>(times);
  KVANT_TRY(budget.charge(total < 1e15 ? static_cast<int64_t>(total) : int64_t{1} << 50));
  if (size == 0) times = 0;
  if (text != nullptr) {
    std::string out;
    for (int64_t i = 0; i < times; ++i) out += *text;
    return Value(std::move(out));
  }
  List out;
  out.is_tuple = what.as_list()->is_tuple;
  const std::vector<Value>& items = what.as_list()->items;
  for (int64_t i = 0; i < times; ++i) out.items.insert(out.items.end(), items.begin(), items.end());
  return Value(std::move(out));
}

Result<Value> concatenate(const List& a, const List& b, Budget& budget) {
  KVANT_TRY(budget.charge_items(a.items.size() + b.items.size()));
  List out = a;
  out.items.insert(out.items.end(), b.items.begin(), b.items.end());
  return Value(std::move(out));
}

bool is_sequence(const Value& v) {
  return v.is_string() || v.as_list() != nullptr;
}

}  // namespace

Result<Value> binary_operator(std::string_view op, const Value& a, const Value& b, int line,
                              Budget& budget) {
  if (op == "~") {
    KVANT_ASSIGN(std::string text, to_text(a, budget));
    KVANT_ASSIGN(const std::string right, to_text(b, budget));
    return Value(text += right);
  }
  if (a.is_number() && b.is_number()) {
    if (a.is_float() || b.is_float()) return float_operator(op, a.to_double(), b.to_double(), line);
    return int_operator(op, a.to_int(), b.to_int(), line);
  }
  if (op == "+" && a.is_string() && b.is_string()) {
    KVANT_TRY(budget.charge(static_cast<int64_t>(a.as_string()->size() + b.as_string()->size())));
    return Value(*a.as_string() + *b.as_string());
  }
  if (op == "+" && a.as_list() != nullptr && b.as_list() != nullptr &&
      a.as_list()->is_tuple == b.as_list()->is_tuple) {
    return concatenate(*a.as_list(), *b.as_list(), budget);
  }
  if (op == "*" && is_sequence(a) && (b.is_int() || b.is_bool())) {
    return repeat(a, b.to_int(), budget);
  }
  if (op == "*" && is_sequence(b) && (a.is_int() || a.is_bool())) {
    return repeat(b, a.to_int(), budget);
  }
  if (op == "%" && a.is_string()) return unsupported_at(line, "formatting a string with %");
  return wrong_types(op, a, b, line);
}

Result<bool> comparison_operator(std::string_view op, const Value& a, const Value& b, int line,
                                 Budget& budget) {
  if (op == "in" || op == "not in") {
    KVANT_ASSIGN(const bool found, is_in(a, b, line, budget));
    return found == (op == "in");
  }
  if (op == "==" || op == "!=") {
    KVANT_ASSIGN(const bool same, equal(a, b, budget));
    return same == (op == "==");
  }
  const Result<int> order = compare(a, b);
  if (!order) return wrong_types(op, a, b, line);
  if (op == "<") return *order < 0;
  if (op == "<=") return *order <= 0;
  if (op == ">") return *order > 0;
  return *order >= 0;
}

Result<Value> negate(const Value& a, int line) {
  if (a.is_float()) return Value(-a.to_double());
  if (!a.is_number() || a.to_int() == INT64_MIN) {
    return invalid_at(line, fmt::format("a {} cannot be negated", a.type_name()));
  }
  return Value(-a.to_int());
}

Result<Value> item_at(const Value& object, int64_t index, Budget& budget) {
  if (const List* list = object.as_list()) {
    const int64_t count = static_cast<int64_t>(list->items.size());
    if (index < 0) index += count;
    if (index < 0 || index >= count) return Value();
    return list->items[static_cast<size_t>(index)];
  }
  if (const std::string* text = object.as_string()) {
    KVANT_TRY(budget.charge_items(text->size()));
    const std::vector<std::string_view> all = characters(*text);
    const int64_t count = static_cast<int64_t>(all.size());
    if (index < 0) index += count;
    if (index < 0 || index >= count) return Value();
    return Value(all[static_cast<size_t>(index)]);
  }
  return Value();
}

Result<Value> slice(const SliceBounds& bounds, const Value& object, int line, Budget& budget) {
  const std::string* text = object.as_string();
  const List* list = object.as_list();
  if (text == nullptr && list == nullptr) {
    return invalid_at(line, fmt::format("a {} cannot be sliced", object.type_name()));
  }
  KVANT_TRY(budget.charge_items(text != nullptr ? text->size() : list->items.size()));
  std::vector<std::string_view> all;
  if (text != nullptr) all = characters(*text);
  const int64_t count = static_cast<int64_t>(text != nullptr ? all.size() : list->items.size());
  const int64_t step = bounds.step.value_or(1);
  if (step == 0) return invalid_at(line, "the step of a slice is zero");
  // A bound from the end, and into [low, high], which is where an index can be.
  const int64_t low = step > 0 ? 0 : -1;
  const int64_t high = step > 0 ? count : count - 1;
  const auto place = [&](std::optional<int64_t> bound, int64_t fallback) {
    if (!bound) return fallback;
    return std::clamp(*bound < 0 ? std::max(*bound, -count - 1) + count : *bound, low, high);
  };
  const int64_t start = place(bounds.start, step > 0 ? low : high);
  const int64_t stop = place(bounds.stop, step > 0 ? high : low);
  std::string out_text;
  List out;
  if (list != nullptr) out.is_tuple = list->is_tuple;
  for (int64_t i = start; step > 0 ? i < stop : i > stop;) {
    if (text != nullptr) {
      out_text += all[static_cast<size_t>(i)];
    } else {
      out.items.push_back(list->items[static_cast<size_t>(i)]);
    }
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  return text != nullptr ? Value(std::move(out_text)) : Value(std::move(out));
}

}  // namespace kvant::model::jinja
