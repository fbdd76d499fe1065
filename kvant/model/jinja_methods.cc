// Methods of strings, dicts and lists, and what filters share with them.
#include <fmt/format.h>
#include <utf8proc.h>

#include <algorithm>

#include "kvant/model/jinja_builtins.h"
#include "kvant/model/jinja_syntax.h"
#include "kvant/model/unicode.h"

namespace kvant::model::jinja {
namespace {

using Method = Result<Value> (*)(const Call& call, const Value& object);

const std::string& self(const Value& object) {
  return *object.as_string();
}

template <Ends kEnds>
Result<Value> strip_method(const Call& call, const Value& object) {
  KVANT_ASSIGN(const std::string chars, call.text_argument(0, "chars", ""));
  return Value(strip(self(object), kEnds, chars));
}

template <char kHow>
Result<Value> case_method(const Call& call, const Value& object) {
  KVANT_TRY(call.check_arguments(0, {}));
  return Value(change_case(self(object), kHow));
}

// startswith and endswith take a string or a tuple of them.
template <bool kStart>
Result<Value> affix_method(const Call& call, const Value& object) {
  KVANT_TRY(call.check_arguments(1, {}));
  const Value* affix = call.arguments.get(0, "");
  const auto matches = [&object](const std::string& text) {
    return kStart ? self(object).starts_with(text) : self(object).ends_with(text);
  };
  if (affix != nullptr && affix->is_string()) return Value(matches(*affix->as_string()));
  if (affix == nullptr || affix->as_list() == nullptr) return call.invalid("needs a string");
  for (const Value& item : affix->as_list()->items) {
    if (!item.is_string()) return call.invalid("needs strings");
    if (matches(*item.as_string())) return Value(true);
  }
  return Value(false);
}

Value text_list(const std::vector<std::string_view>& parts) {
  List out;
  for (const std::string_view part : parts) out.items.emplace_back(part);
  return Value(std::move(out));
}

// At runs of white space, at most `max` times from the left (negative: no limit).
std::vector<std::string_view> split_at_spaces(std::string_view text, int64_t max) {
  std::vector<std::string_view> out;
  for (;;) {
    text = strip(text, Ends::kLeft);
    if (text.empty()) return out;
    if (max == 0) {
      out.push_back(text);
      return out;
    }
    --max;
    size_t end = 0;
    while (end < text.size()) {
      const size_t length = std::max<size_t>(utf8_sequence(text.substr(end)), 1);
      if (is_python_space(decode_utf8(text.substr(end, length))[0])) break;
      end += length;
    }
    out.push_back(text.substr(0, end));
    text.remove_prefix(end);
  }
}

Result<Value> split_method(const Call& call, const Value& object) {
  KVANT_TRY(call.check_arguments(2, {"sep", "maxsplit"}));
  KVANT_ASSIGN(int64_t max, call.int_argument(1, "maxsplit", -1));
  KVANT_TRY(call.budget.charge_items(self(object).size()));
  const Value* separator = call.arguments.get(0, "sep");
  std::string_view text = self(object);
  if (separator == nullptr || separator->is_none()) return text_list(split_at_spaces(text, max));
  if (!separator->is_string()) return call.invalid("the separator must be a string");
  const std::string& sep = *separator->as_string();
  if (sep.empty()) return call.invalid("the separator is empty");
  std::vector<std::string_view> parts;
  for (size_t at; max-- != 0 && (at = text.find(sep)) != std::string_view::npos;) {
    parts.push_back(text.substr(0, at));
    text.remove_prefix(at + sep.size());
  }
  parts.push_back(text);
  return text_list(parts);
}

Result<Value> rsplit_method(const Call& call, const Value& object) {
  KVANT_TRY(call.check_arguments(2, {"sep", "maxsplit"}));
  KVANT_ASSIGN(int64_t max, call.int_argument(1, "maxsplit", -1));
  KVANT_ASSIGN(const std::string sep, call.text_argument(0, "sep", ""));
  if (sep.empty()) return call.unsupported("splitting at white space");
  KVANT_TRY(call.budget.charge_items(self(object).size()));
  std::string_view text = self(object);
  std::vector<std::string_view> parts;
  for (size_t at; max-- != 0 && (at = text.rfind(sep)) != std::string_view::npos;) {
    parts.push_back(text.substr(at + sep.size()));
    text = text.substr(0, at);
  }
  parts.push_back(text);
  std::reverse(parts.begin(), parts.end());
  return text_list(parts);
}

Result<Value> splitlines_method(const Call& call, const Value& object) {
  KVANT_TRY(call.check_arguments(1, {"keepends"}));
  KVANT_ASSIGN(const bool keep, call.bool_argument(0, "keepends", false));
  KVANT_TRY(call.budget.charge_items(self(object).size()));
  std::vector<std::string_view> lines;
  std::string_view text = self(object);
  while (!text.empty()) {
    const size_t end = std::min(text.find_first_of("\r\n"), text.size());
    const size_t after =
        std::min(end + (text.substr(end).starts_with("\r\n") ? 2 : 1), text.size());
    lines.push_back(text.substr(0, keep ? after : end));
    text.remove_prefix(after);
  }
  return text_list(lines);
}

Result<Value> replace_method(const Call& call, const Value& object) {
  KVANT_TRY(call.check_arguments(3, {"count"}));
  if (call.arguments.positional.size() < 2) return call.invalid("needs what to replace by what");
  KVANT_ASSIGN(const std::string from, call.text_argument(0, "", ""));
  KVANT_ASSIGN(const std::string to, call.text_argument(1, "", ""));
  KVANT_ASSIGN(const int64_t count, call.int_argument(2, "count", -1));
  return replace_text(call, self(object), from, to, count);
}

// find, rfind: the index in characters or -1.
template <bool kFirst>
Result<Value> find_method(const Call& call, const Value& object) {
  KVANT_TRY(call.check_arguments(1, {}));
  KVANT_ASSIGN(const std::string part, call.text_argument(0, "", ""));
  const size_t at = kFirst ? self(object).find(part) : self(object).rfind(part);
  if (at == std::string::npos) return Value(int64_t{-1});
  return Value(count_characters(std::string_view(self(object)).substr(0, at)));
}

Result<Value> count_method(const Call& call, const Value& object) {
  KVANT_TRY(call.check_arguments(1, {}));
  KVANT_ASSIGN(const std::string part, call.text_argument(0, "", ""));
  if (part.empty()) return Value(count_characters(self(object)) + 1);
  int64_t count = 0;
  for (size_t at = 0; (at = self(object).find(part, at)) != std::string::npos; at += part.size()) {
    ++count;
  }
  return Value(count);
}

Result<Value> join_method(const Call& call, const Value& object) {
  KVANT_TRY(call.check_arguments(1, {}));
  const Value* items = call.arguments.get(0, "");
  if (items == nullptr) return call.invalid("needs what to join");
  KVANT_ASSIGN(const std::vector<Value> values, iterate(*items, call.line, call.budget));
  for (const Value& value : values) {
    if (!value.is_string()) return call.invalid("joins strings only");
  }
  return join_values(call, values, self(object));
}

template <bool kPrefix>
Result<Value> remove_affix_method(const Call& call, const Value& object) {
  KVANT_TRY(call.check_arguments(1, {}));
  KVANT_ASSIGN(const std::string affix, call.text_argument(0, "", ""));
  std::string_view text = self(object);
  if (kPrefix && text.starts_with(affix)) text.remove_prefix(affix.size());
  if (!kPrefix && text.ends_with(affix)) text.remove_suffix(affix.size());
  return Value(text);
}

template <CharClass kClass>
Result<Value> all_of_class_method(const Call& call, const Value& object) {
  KVANT_TRY(call.check_arguments(0, {}));
  const std::vector<char32_t> text = decode_utf8(self(object));
  return Value(!text.empty() && std::all_of(text.begin(), text.end(), [](char32_t c) {
    return kClass == CharClass::kSpace ? is_python_space(c) : char_class(c) == kClass;
  }));
}

struct Row {
  std::string_view name;
  Method method;
};

constexpr Row kStringMethods[] = {
    {"capitalize", case_method<'c'>},
    {"count", count_method},
    {"endswith", affix_method<false>},
    {"find", find_method<true>},
    {"isalpha", all_of_class_method<CharClass::kLetter>},
    {"isdigit", all_of_class_method<CharClass::kNumber>},
    {"isspace", all_of_class_method<CharClass::kSpace>},
    {"join", join_method},
    {"lower", case_method<'l'>},
    {"lstrip", strip_method<Ends::kLeft>},
    {"removeprefix", remove_affix_method<true>},
    {"removesuffix", remove_affix_method<false>},
    {"replace", replace_method},
    {"rfind", find_method<false>},
    {"rsplit", rsplit_method},
    {"rstrip", strip_method<Ends::kRight>},
    {"split", split_method},
    {"splitlines", splitlines_method},
    {"startswith", affix_method<true>},
    {"strip", strip_method<Ends::kBoth>},
    {"title", case_method<'t'>},
    {"upper", case_method<'u'>},
};

enum class Part { kKeys, kValues, kItems };

template <Part kPart>
Result<Value> dict_parts(const Call& call, const Value& object) {
  KVANT_TRY(call.check_arguments(0, {}));
  KVANT_TRY(call.budget.charge_items(3 * object.as_dict()->items().size()));
  List out;
  for (const auto& [key, value] : object.as_dict()->items()) {
    if (kPart == Part::kKeys) {
      out.items.emplace_back(key);
    } else if (kPart == Part::kValues) {
      out.items.push_back(value);
    } else {
      out.items.emplace_back(List{{Value(key), value}, true});
    }
  }
  return Value(std::move(out));
}

Result<Value> dict_get(const Call& call, const Value& object) {
  KVANT_TRY(call.check_arguments(2, {"default"}));
  const Value* key = call.arguments.get(0, "");
  if (key == nullptr) return call.invalid("needs a key");
  if (const std::string* text = key->as_string()) {
    if (const Value* found = object.as_dict()->find(*text)) return *found;
  }
  const Value* fallback = call.arguments.get(1, "default");
  return fallback == nullptr ? Value(None()) : *fallback;
}

constexpr Row kDictMethods[] = {
    {"get", dict_get},
    {"items", dict_parts<Part::kItems>},
    {"keys", dict_parts<Part::kKeys>},
    {"values", dict_parts<Part::kValues>},
};

Result<Value> list_count(const Call& call, const Value& object) {
  KVANT_TRY(call.check_arguments(1, {}));
  const Value* wanted = call.arguments.get(0, "");
  if (wanted == nullptr) return call.invalid("needs what to count");
  int64_t count = 0;
  for (const Value& item : object.as_list()->items) {
    KVANT_ASSIGN(const bool same, equal(item, *wanted, call.budget));
    count += same ? 1 : 0;
  }
  return Value(count);
}

Result<Value> list_index(const Call& call, const Value& object) {
  KVANT_TRY(call.check_arguments(1, {}));
  const Value* wanted = call.arguments.get(0, "");
  if (wanted == nullptr) return call.invalid("needs what to find");
  const std::vector<Value>& items = object.as_list()->items;
  for (size_t i = 0; i < items.size(); ++i) {
    KVANT_ASSIGN(const bool same, equal(items[i], *wanted, call.budget));
    if (same) return Value(static_cast<int64_t>(i));
  }
  return call.invalid("the list does not contain it");
}

constexpr Row kListMethods[] = {{"count", list_count}, {"index", list_index}};

template <size_t N>
Result<Value> call_row(const Row (&rows)[N], const Call& call, const Value& object) {
  for (const Row& row : rows) {
    if (row.name == call.name) return row.method(call, object);
  }
  return unsupported_at(call.line,
                        fmt::format("the {} method {}()", object.type_name(), call.name));
}

char32_t map_case(char32_t c, bool upper) {
  const utf8proc_int32_t code_point = static_cast<utf8proc_int32_t>(c);
  return static_cast<char32_t>(upper ? utf8proc_toupper(code_point) : utf8proc_tolower(code_point));
}

}  // namespace

Result<Value> call_method(const Call& call, const Value& object) {
  if (object.is_string()) return call_row(kStringMethods, call, object);
  if (object.as_dict() != nullptr) return call_row(kDictMethods, call, object);
  if (object.as_list() != nullptr) return call_row(kListMethods, call, object);
  return invalid_at(call.line,
                    fmt::format("a {} has no method {}()", object.type_name(), call.name));
}

Value get_member(const Value& value, std::string_view name) {
  if (const Dict* dict = value.as_dict()) {
    const Value* found = dict->find(name);
    return found == nullptr ? Value() : *found;
  }
  if (const Namespace* space = value.as_namespace()) {
    const auto it = space->members.find(name);
    return it == space->members.end() ? Value() : it->second;
  }
  return {};
}

std::string change_case(std::string_view text, char how) {
  std::string out;
  bool in_word = false;  // 't': behind a letter; 'c': behind the first character
  for (std::string_view c : characters(text)) {
    if (utf8_sequence(c) == 0) {
      out += c;
      continue;
    }
    const char32_t code_point = decode_utf8(c)[0];
    const bool upper = how == 'u' || (how != 'l' && !in_word);
    append_utf8(map_case(code_point, upper), out);
    in_word = how == 'c' || char_class(code_point) == CharClass::kLetter;
  }
  return out;
}

Result<Value> replace_text(const Call& call, const std::string& text, const std::string& from,
                           const std::string& to, int64_t count) {
  std::string out;
  size_t at = 0;
  while (count != 0) {
    // An empty `from` is found in front of every character and at the end.
    const size_t found = from.empty() ? at : text.find(from, at);
    if (found == std::string::npos) break;
    KVANT_TRY(call.budget.charge(static_cast<int64_t>(found - at + to.size() + 1)));
    out.append(text, at, found - at);
    out += to;
    at = found + from.size();
    --count;
    if (!from.empty()) continue;
    if (at >= text.size()) return Value(std::move(out));
    const size_t length = std::max<size_t>(utf8_sequence(std::string_view(text).substr(at)), 1);
    out.append(text, at, length);
    at += length;
  }
  out.append(text, at);
  return Value(std::move(out));
}

Result<Value> join_values(const Call& call, const std::vector<Value>& items,
                          const std::string& separator) {
  std::string out;
  for (size_t i = 0; i < items.size(); ++i) {
    if (i != 0) {
      KVANT_TRY(call.budget.charge(static_cast<int64_t>(separator.size())));
      out += separator;
    }
    KVANT_ASSIGN(const std::string text, to_text(items[i], call.budget));
    out += text;
  }
  return Value(std::move(out));
}

}  // namespace kvant::model::jinja
