// Filters and tests.
#include "kvant/model/jinja_builtins.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "kvant/model/jinja_syntax.h"

namespace kvant::model::jinja {
namespace {

using Filter = Result<Value> (*)(const Call& call, const Value& input);
using Test = Result<bool> (*)(const Call& call, const Value& input);

// ---- filters ----

Result<std::string> text_of(const Call& call, const Value& input) {
  return to_text(input, call.budget);
}

Result<Value> filter_trim(const Call& call, const Value& input) {
  KVANT_TRY(call.check_arguments(1, {"chars"}));
  KVANT_ASSIGN(const std::string chars, call.text_argument(0, "chars", ""));
  KVANT_ASSIGN(const std::string text, text_of(call, input));
  return Value(strip(text, Ends::kBoth, chars));
}

template <char kHow>
Result<Value> filter_case(const Call& call, const Value& input) {
  KVANT_TRY(call.check_arguments(0, {}));
  KVANT_ASSIGN(const std::string text, text_of(call, input));
  return Value(change_case(text, kHow));
}

Result<Value> filter_string(const Call& call, const Value& input) {
  KVANT_TRY(call.check_arguments(0, {}));
  KVANT_ASSIGN(std::string text, text_of(call, input));
  return Value(std::move(text));
}

Result<Value> filter_identity(const Call&, const Value& input) {
  return input;
}

Result<Value> filter_length(const Call& call, const Value& input) {
  KVANT_TRY(call.check_arguments(0, {}));
  if (const std::string* text = input.as_string()) return Value(count_characters(*text));
  if (const List* list = input.as_list()) return Value(static_cast<int64_t>(list->items.size()));
  if (const Dict* dict = input.as_dict()) return Value(static_cast<int64_t>(dict->items().size()));
  if (input.is_undefined()) return Value(int64_t{0});
  return call.invalid(fmt::format("a {} has no length", input.type_name()));
}

Result<Value> filter_default(const Call& call, const Value& input) {
  KVANT_TRY(call.check_arguments(2, {"default_value", "boolean"}));
  KVANT_ASSIGN(const bool falsy_too, call.bool_argument(1, "boolean", false));
  if (!input.is_undefined() && (!falsy_too || input.truthy())) return input;
  const Value* fallback = call.arguments.get(0, "default_value");
  return fallback == nullptr ? Value("") : *fallback;
}

Result<Value> filter_tojson(const Call& call, const Value& input) {
  KVANT_TRY(call.check_arguments(1, {"indent", "ensure_ascii"}));
  KVANT_ASSIGN(const bool ascii, call.bool_argument(1, "ensure_ascii", false));
  if (ascii) return call.unsupported("ensure_ascii");
  const Value* indent = call.arguments.get(0, "indent");
  const bool one_line = indent == nullptr || indent->is_none();
  KVANT_ASSIGN(const int64_t width,
               one_line ? Result<int64_t>(-1) : call.int_argument(0, "indent", -1));
  KVANT_ASSIGN(std::string text, to_json(input, width, call.budget));
  return Value(std::move(text));
}

Result<Value> filter_join(const Call& call, const Value& input) {
  KVANT_TRY(call.check_arguments(2, {"d", "attribute"}));
  KVANT_ASSIGN(const std::string separator, call.text_argument(0, "d", ""));
  KVANT_ASSIGN(std::vector<Value> items, iterate(input, call.line, call.budget));
  if (call.arguments.get(1, "attribute") != nullptr) {
    KVANT_ASSIGN(const std::string attribute, call.text_argument(1, "attribute", ""));
    for (Value& item : items) item = get_member(item, attribute);
  }
  return join_values(call, items, separator);
}

template <bool kFirst>
Result<Value> filter_end(const Call& call, const Value& input) {
  KVANT_TRY(call.check_arguments(0, {}));
  KVANT_ASSIGN(const std::vector<Value> items, iterate(input, call.line, call.budget));
  if (items.empty()) return Value();
  return kFirst ? items.front() : items.back();
}

Result<Value> filter_list(const Call& call, const Value& input) {
  KVANT_TRY(call.check_arguments(0, {}));
  KVANT_ASSIGN(std::vector<Value> items, iterate(input, call.line, call.budget));
  return Value(List{std::move(items), false});
}

Result<Value> filter_reverse(const Call& call, const Value& input) {
  KVANT_TRY(call.check_arguments(0, {}));
  if (const std::string* text = input.as_string()) {
    KVANT_TRY(call.budget.charge_items(text->size()));
    std::string out;
    const std::vector<std::string_view> all = characters(*text);
    for (auto it = all.rbegin(); it != all.rend(); ++it) out += *it;
    return Value(std::move(out));
  }
  KVANT_ASSIGN(std::vector<Value> items, iterate(input, call.line, call.budget));
  std::reverse(items.begin(), items.end());
  return Value(List{std::move(items), false});
}

Result<Value> filter_items(const Call& call, const Value& input) {
  if (input.is_undefined()) return Value(List());
  if (input.as_dict() == nullptr) return call.invalid("needs a dict");
  return call_method(call, input);
}

Result<Value> filter_dictsort(const Call& call, const Value& input) {
  KVANT_TRY(call.check_arguments(0, {}));
  if (input.as_dict() == nullptr) return call.invalid("needs a dict");
  KVANT_TRY(call.budget.charge_items(3 * input.as_dict()->items().size()));
  std::vector<std::pair<std::string, const Value*>> entries;  // by key in lower case
  for (const auto& [key, value] : input.as_dict()->items()) entries.emplace_back(key, &value);
  std::stable_sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) {
    return change_case(a.first, 'l') < change_case(b.first, 'l');
  });
  List out;
  for (const auto& [key, value] : entries) out.items.emplace_back(List{{Value(key), *value}, true});
  return Value(std::move(out));
}

Result<Value> filter_replace(const Call& call, const Value& input) {
  KVANT_TRY(call.check_arguments(3, {"old", "new", "count"}));
  KVANT_ASSIGN(const std::string text, text_of(call, input));
  KVANT_ASSIGN(const std::string from, call.text_argument(0, "old", ""));
  KVANT_ASSIGN(const std::string to, call.text_argument(1, "new", ""));
  KVANT_ASSIGN(const int64_t count, call.int_argument(2, "count", -1));
  return replace_text(call, text, from, to, count);
}

Result<Value> filter_int(const Call& call, const Value& input) {
  KVANT_TRY(call.check_arguments(1, {"default"}));
  KVANT_ASSIGN(const int64_t fallback, call.int_argument(0, "default", 0));
  if (input.is_bool() || input.is_int()) return Value(input.to_int());
  double number = 0;
  if (input.is_float()) {
    number = input.to_double();
  } else if (const std::string* text = input.as_string()) {
    const std::string_view digits = strip(*text, Ends::kBoth);
    int64_t integer = 0;
    const auto whole = std::from_chars(digits.data(), digits.data() + digits.size(), integer);
    if (whole.ec == std::errc() && whole.ptr == digits.data() + digits.size())
      return Value(integer);
    const auto parsed = std::from_chars(digits.data(), digits.data() + digits.size(), number);
    if (parsed.ec != std::errc() || parsed.ptr != digits.data() + digits.size()) {
      return Value(fallback);
    }
  } else {
    return Value(fallback);
  }
  if (!(std::fabs(number) < 9e18)) return Value(fallback);
  return Value(static_cast<int64_t>(number));
}

Result<Value> filter_float(const Call& call, const Value& input) {
  KVANT_TRY(call.check_arguments(0, {}));
  if (input.is_number()) return Value(input.to_double());
  double number = 0;
  if (const std::string* text = input.as_string()) {
    const std::string_view digits = strip(*text, Ends::kBoth);
    const auto parsed = std::from_chars(digits.data(), digits.data() + digits.size(), number);
    if (parsed.ec != std::errc() || parsed.ptr != digits.data() + digits.size()) number = 0;
  }
  return Value(number);
}

Result<Value> filter_abs(const Call& call, const Value& input) {
  KVANT_TRY(call.check_arguments(0, {}));
  if (input.is_float()) return Value(std::fabs(input.to_double()));
  if (!input.is_number() || input.to_int() == INT64_MIN) return call.invalid("needs a number");
  return Value(std::abs(input.to_int()));
}

Result<Value> filter_indent(const Call& call, const Value& input) {
  KVANT_TRY(call.check_arguments(3, {"width", "first", "blank"}));
  KVANT_ASSIGN(const int64_t width, call.int_argument(0, "width", 4));
  KVANT_ASSIGN(const bool first, call.bool_argument(1, "first", false));
  KVANT_ASSIGN(const bool blank, call.bool_argument(2, "blank", false));
  KVANT_ASSIGN(const std::string text, text_of(call, input));
  const std::string margin(static_cast<size_t>(std::clamp<int64_t>(width, 0, 1000)), ' ');
  std::string out;
  for (size_t at = 0, line = 0; at <= text.size(); ++line) {
    const size_t end = std::min(text.find('\n', at), text.size());
    const bool indented = (line == 0 ? first : end > at || blank);
    KVANT_TRY(call.budget.charge(static_cast<int64_t>(margin.size())));
    if (line != 0) out.push_back('\n');
    if (indented) out += margin;
    out.append(text, at, end - at);
    at = end + 1;
  }
  return Value(std::move(out));
}

template <int kSign>
Result<Value> filter_extreme(const Call& call, const Value& input) {
  KVANT_TRY(call.check_arguments(0, {}));
  KVANT_ASSIGN(const std::vector<Value> items, iterate(input, call.line, call.budget));
  if (items.empty()) return Value();
  Value best = items[0];
  for (const Value& item : items) {
    KVANT_ASSIGN(const int order, compare(item, best));
    if (order * kSign > 0) best = item;
  }
  return best;
}

// map(attribute="name", default=...) or map("filter", arguments ...)
Result<Value> filter_map(const Call& call, const Value& input) {
  KVANT_ASSIGN(const std::vector<Value> items, iterate(input, call.line, call.budget));
  List out;
  if (call.arguments.get(SIZE_MAX, "attribute") != nullptr) {
    KVANT_TRY(call.check_arguments(0, {"attribute", "default"}));
    KVANT_ASSIGN(const std::string name, call.text_argument(SIZE_MAX, "attribute", ""));
    if (name.find('.') != std::string::npos) return call.unsupported("an attribute with a dot");
    const Value* fallback = call.arguments.get(SIZE_MAX, "default");
    for (const Value& item : items) {
      Value member = get_member(item, name);
      out.items.push_back(member.is_undefined() && fallback != nullptr ? *fallback : member);
    }
    return Value(std::move(out));
  }
  KVANT_ASSIGN(const std::string filter, call.text_argument(0, "", ""));
  if (filter.empty()) return call.invalid("needs a filter or attribute=");
  Arguments rest = call.arguments;
  rest.positional.erase(rest.positional.begin());
  for (const Value& item : items) {
    KVANT_ASSIGN(Value mapped, apply_filter({filter, rest, call.line, call.budget}, item));
    out.items.push_back(std::move(mapped));
  }
  return Value(std::move(out));
}

// select, reject: by a test of the item. selectattr, rejectattr: by a test of one of its members.
template <bool kKeep, bool kMember>
Result<Value> filter_select(const Call& call, const Value& input) {
  KVANT_ASSIGN(const std::vector<Value> items, iterate(input, call.line, call.budget));
  Arguments rest = call.arguments;
  std::string member;
  if (kMember) {
    KVANT_ASSIGN(member, call.text_argument(0, "", ""));
    if (member.empty()) return call.invalid("needs the name of a member");
    rest.positional.erase(rest.positional.begin());
  }
  std::string test;
  if (!rest.positional.empty()) {
    KVANT_ASSIGN(test, call.text_argument(kMember ? 1 : 0, "", ""));
    rest.positional.erase(rest.positional.begin());
  }
  List out;
  for (const Value& item : items) {
    const Value subject = kMember ? get_member(item, member) : item;
    KVANT_ASSIGN(const bool passes,
                 test.empty() ? Result<bool>(subject.truthy())
                              : apply_test({test, rest, call.line, call.budget}, subject));
    if (passes == kKeep) out.items.push_back(item);
  }
  return Value(std::move(out));
}

// sort(reverse, case_sensitive, attribute): stable; strings without regard to case.
Result<Value> filter_sort(const Call& call, const Value& input) {
  KVANT_TRY(call.check_arguments(3, {"reverse", "case_sensitive", "attribute"}));
  KVANT_ASSIGN(const bool reverse, call.bool_argument(0, "reverse", false));
  KVANT_ASSIGN(const bool exact, call.bool_argument(1, "case_sensitive", false));
  KVANT_ASSIGN(const std::string attribute, call.text_argument(2, "attribute", ""));
  KVANT_ASSIGN(std::vector<Value> items, iterate(input, call.line, call.budget));
  KVANT_TRY(call.budget.charge_items(2 * items.size()));
  std::vector<std::pair<Value, Value>> keyed;  // what to sort by, item
  for (Value& item : items) {
    Value key = attribute.empty() ? item : get_member(item, attribute);
    if (!exact && key.is_string()) key = Value(change_case(*key.as_string(), 'l'));
    // Everything must have an order with the first: then all have with each other.
    if (!keyed.empty()) KVANT_TRY(compare(keyed[0].first, key));
    keyed.emplace_back(std::move(key), std::move(item));
  }
  std::stable_sort(keyed.begin(), keyed.end(), [reverse](const auto& a, const auto& b) {
    const int order = compare(a.first, b.first).value();
    return reverse ? order > 0 : order < 0;
  });
  List out;
  for (auto& [key, item] : keyed) out.items.push_back(std::move(item));
  return Value(std::move(out));
}

struct FilterRow {
  std::string_view name;
  Filter filter;
};

constexpr FilterRow kFilters[] = {
    {"abs", filter_abs},
    {"capitalize", filter_case<'c'>},
    {"count", filter_length},
    {"d", filter_default},
    {"default", filter_default},
    {"dictsort", filter_dictsort},
    {"first", filter_end<true>},
    {"float", filter_float},
    {"indent", filter_indent},
    {"int", filter_int},
    {"items", filter_items},
    {"join", filter_join},
    {"last", filter_end<false>},
    {"length", filter_length},
    {"list", filter_list},
    {"lower", filter_case<'l'>},
    {"map", filter_map},
    {"max", filter_extreme<1>},
    {"min", filter_extreme<-1>},
    {"reject", filter_select<false, false>},
    {"rejectattr", filter_select<false, true>},
    {"replace", filter_replace},
    {"reverse", filter_reverse},
    {"safe", filter_identity},
    {"select", filter_select<true, false>},
    {"selectattr", filter_select<true, true>},
    {"sort", filter_sort},
    {"string", filter_string},
    {"title", filter_case<'t'>},
    {"tojson", filter_tojson},
    {"trim", filter_trim},
    {"upper", filter_case<'u'>},
};

// ---- tests ----

bool is_iterable(const Value& v) {
  return v.is_string() || v.as_list() != nullptr || v.as_dict() != nullptr || v.is_undefined();
}

Result<const Value*> operand(const Call& call) {
  KVANT_TRY(call.check_arguments(1, {}));
  const Value* value = call.arguments.get(0, "");
  if (value == nullptr) return call.invalid("needs an argument");
  return value;
}

Result<bool> test_equal(const Call& call, const Value& input) {
  KVANT_ASSIGN(const Value* other, operand(call));
  return equal(input, *other, call.budget);
}

Result<bool> test_not_equal(const Call& call, const Value& input) {
  KVANT_ASSIGN(const bool same, test_equal(call, input));
  return !same;
}

template <int kSign, bool kOrEqual>
Result<bool> test_order(const Call& call, const Value& input) {
  KVANT_ASSIGN(const Value* other, operand(call));
  KVANT_ASSIGN(const int order, compare(input, *other));
  return order * kSign > 0 || (kOrEqual && order == 0);
}

Result<bool> test_in(const Call& call, const Value& input) {
  KVANT_ASSIGN(const Value* container, operand(call));
  return is_in(input, *container, call.line, call.budget);
}

Result<bool> test_divisible(const Call& call, const Value& input) {
  KVANT_ASSIGN(const int64_t by, call.int_argument(0, "num", 0));
  if (by == 0 || !input.is_int()) return call.invalid("needs two integers, the second not zero");
  return by == -1 || input.to_int() % by == 0;
}

struct TestRow {
  std::string_view name;
  Test test;
};

constexpr TestRow kTests[] = {
    {"==", test_equal},
    {"boolean", [](const Call&, const Value& v) -> Result<bool> { return v.is_bool(); }},
    {"callable",
     [](const Call&, const Value& v) -> Result<bool> {
       return v.as_macro() != nullptr || v.as_function() != nullptr;
     }},
    {"defined", [](const Call&, const Value& v) -> Result<bool> { return !v.is_undefined(); }},
    {"divisibleby", test_divisible},
    {"eq", test_equal},
    {"equalto", test_equal},
    {"even",
     [](const Call&, const Value& v) -> Result<bool> { return v.is_int() && v.to_int() % 2 == 0; }},
    {"false",
     [](const Call&, const Value& v) -> Result<bool> { return v.is_bool() && !v.truthy(); }},
    {"float", [](const Call&, const Value& v) -> Result<bool> { return v.is_float(); }},
    {"ge", test_order<1, true>},
    {"greaterthan", test_order<1, false>},
    {"gt", test_order<1, false>},
    {"in", test_in},
    {"integer", [](const Call&, const Value& v) -> Result<bool> { return v.is_int(); }},
    {"iterable", [](const Call&, const Value& v) -> Result<bool> { return is_iterable(v); }},
    {"le", test_order<-1, true>},
    {"lessthan", test_order<-1, false>},
    {"lt", test_order<-1, false>},
    {"mapping", [](const Call&, const Value& v) -> Result<bool> { return v.as_dict() != nullptr; }},
    {"ne", test_not_equal},
    {"none", [](const Call&, const Value& v) -> Result<bool> { return v.is_none(); }},
    {"number", [](const Call&, const Value& v) -> Result<bool> { return v.is_number(); }},
    {"odd",
     [](const Call&, const Value& v) -> Result<bool> { return v.is_int() && v.to_int() % 2 != 0; }},
    {"sequence", [](const Call&, const Value& v) -> Result<bool> { return is_iterable(v); }},
    {"string", [](const Call&, const Value& v) -> Result<bool> { return v.is_string(); }},
    {"true", [](const Call&, const Value& v) -> Result<bool> { return v.is_bool() && v.truthy(); }},
    {"undefined", [](const Call&, const Value& v) -> Result<bool> { return v.is_undefined(); }},
};

}  // namespace

const Value* Arguments::get(size_t index, std::string_view name) const {
  if (index < positional.size()) return &positional[index];
  for (const auto& [key, value] : named) {
    if (key == name) return &value;
  }
  return nullptr;
}

Error Call::invalid(std::string_view what) const {
  return invalid_at(line, fmt::format("{}: {}", name, what));
}

Error Call::unsupported(std::string_view what) const {
  return unsupported_at(line, fmt::format("{}: {}", name, what));
}

Result<int64_t> Call::int_argument(size_t index, std::string_view key, int64_t fallback) const {
  const Value* value = arguments.get(index, key);
  if (value == nullptr) return fallback;
  if (!value->is_int() && !value->is_bool()) return invalid("needs an integer");
  return value->to_int();
}

Result<std::string> Call::text_argument(size_t index, std::string_view key,
                                        std::string_view fallback) const {
  const Value* value = arguments.get(index, key);
  if (value == nullptr) return std::string(fallback);
  if (!value->is_string()) return invalid("needs a string");
  return *value->as_string();
}

Result<bool> Call::bool_argument(size_t index, std::string_view key, bool fallback) const {
  const Value* value = arguments.get(index, key);
  return value == nullptr ? fallback : value->truthy();
}

Status Call::check_arguments(size_t max, std::initializer_list<std::string_view> names) const {
  if (arguments.positional.size() > max) return invalid("too many arguments");
  for (const auto& [key, value] : arguments.named) {
    if (std::find(names.begin(), names.end(), key) == names.end()) {
      return unsupported(fmt::format("the argument {}", key));
    }
  }
  return {};
}

Result<Value> apply_filter(const Call& call, const Value& input) {
  for (const FilterRow& row : kFilters) {
    if (row.name == call.name) return row.filter(call, input);
  }
  return unsupported_at(call.line, fmt::format("the filter \"{}\"", call.name));
}

Result<bool> apply_test(const Call& call, const Value& input) {
  for (const TestRow& row : kTests) {
    if (row.name == call.name) return row.test(call, input);
  }
  return unsupported_at(call.line, fmt::format("the test \"{}\"", call.name));
}

Result<std::vector<Value>> iterate(const Value& value, int line, Budget& budget) {
  std::vector<Value> out;
  if (const List* list = value.as_list()) {
    KVANT_TRY(budget.charge_items(list->items.size()));
    out = list->items;
  } else if (const Dict* dict = value.as_dict()) {
    KVANT_TRY(budget.charge_items(dict->items().size()));
    for (const auto& [key, item] : dict->items()) out.emplace_back(key);
  } else if (const std::string* text = value.as_string()) {
    KVANT_TRY(budget.charge_items(text->size()));
    for (const std::string_view c : characters(*text)) out.emplace_back(c);
  } else if (!value.is_undefined()) {
    return invalid_at(line, fmt::format("a {} cannot be iterated over", value.type_name()));
  }
  return out;
}

Result<bool> is_in(const Value& item, const Value& container, int line, Budget& budget) {
  if (const std::string* text = container.as_string()) {
    if (!item.is_string()) return invalid_at(line, "only a string can be in a string");
    return text->find(*item.as_string()) != std::string::npos;
  }
  if (const Dict* dict = container.as_dict()) {
    return item.is_string() && dict->find(*item.as_string()) != nullptr;
  }
  if (container.is_undefined()) return false;
  const List* list = container.as_list();
  if (list == nullptr) {
    return invalid_at(line, fmt::format("nothing can be in a {}", container.type_name()));
  }
  for (const Value& candidate : list->items) {
    KVANT_ASSIGN(const bool same, equal(item, candidate, budget));
    if (same) return true;
  }
  return false;
}

}  // namespace kvant::model::jinja
