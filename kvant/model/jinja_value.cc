#include "kvant/model/jinja_value.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>

#include "kvant/model/unicode.h"

namespace kvant::model::jinja {
namespace {

constexpr int kMaxDepth = 200;  // of nested lists and dicts

Error too_deep() {
  return Error(ErrorCode::kInvalidArgument,
               fmt::format("data is nested more than {} deep", kMaxDepth));
}

// repr() of a float: the shortest digits that read back, with Python's choice of exponent.
std::string float_text(double d) {
  if (std::isnan(d)) return "nan";
  if (std::isinf(d)) return d > 0 ? "inf" : "-inf";
  char buffer[64];
  const double magnitude = std::fabs(d);
  const bool fixed = magnitude == 0 || (magnitude >= 1e-4 && magnitude < 1e16);
  const std::to_chars_result end =
      std::to_chars(buffer, buffer + sizeof(buffer), d,
                    fixed ? std::chars_format::fixed : std::chars_format::scientific);
  std::string out(buffer, end.ptr);
  if (fixed && out.find('.') == std::string::npos) out += ".0";
  return out;
}

std::string string_repr(std::string_view text) {
  const bool double_quotes =
      text.find('\'') != std::string_view::npos && text.find('"') == std::string_view::npos;
  const char quote = double_quotes ? '"' : '\'';
  std::string out(1, quote);
  for (const char c : text) {
    const unsigned char byte = static_cast<unsigned char>(c);
    if (c == quote || c == '\\') {
      out += {'\\', c};
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\r') {
      out += "\\r";
    } else if (c == '\t') {
      out += "\\t";
    } else if (byte < 0x20 || byte == 0x7f) {
      out += fmt::format("\\x{:02x}", byte);
    } else {
      out.push_back(c);
    }
  }
  out.push_back(quote);
  return out;
}

Status append_repr(const Value& value, int depth, Budget& budget, std::string& out);

Status append_text(const Value& value, Budget& budget, std::string& out) {
  if (const std::string* text = value.as_string()) {
    out += *text;
    return budget.charge(static_cast<int64_t>(text->size()));
  }
  if (value.is_undefined()) return {};
  return append_repr(value, 0, budget, out);
}

Status append_repr(const Value& value, int depth, Budget& budget, std::string& out) {
  if (depth > kMaxDepth) return too_deep();
  KVANT_TRY(budget.charge(
      value.is_string() ? 8 + 4 * static_cast<int64_t>(value.as_string()->size()) : 8));
  if (value.is_none()) {
    out += "None";
  } else if (value.is_bool()) {
    out += value.truthy() ? "True" : "False";
  } else if (value.is_int()) {
    out += fmt::format("{}", value.to_int());
  } else if (value.is_float()) {
    out += float_text(value.to_double());
  } else if (const std::string* text = value.as_string()) {
    out += string_repr(*text);
  } else if (const List* list = value.as_list()) {
    out.push_back(list->is_tuple ? '(' : '[');
    for (size_t i = 0; i < list->items.size(); ++i) {
      if (i != 0) out += ", ";
      KVANT_TRY(append_repr(list->items[i], depth + 1, budget, out));
    }
    if (list->is_tuple && list->items.size() == 1) out.push_back(',');
    out.push_back(list->is_tuple ? ')' : ']');
  } else if (const Dict* dict = value.as_dict()) {
    out.push_back('{');
    bool first = true;
    for (const auto& [key, item] : dict->items()) {
      out += first ? "" : ", ";
      first = false;
      out += string_repr(key) + ": ";
      KVANT_TRY(append_repr(item, depth + 1, budget, out));
    }
    out.push_back('}');
  } else {
    return Error(ErrorCode::kUnsupported, fmt::format("printing a {}", value.type_name()));
  }
  return {};
}

std::string json_string(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    switch (c) {
      case '"': out += "\\\""; break;
      case '\\': out += "\\\\"; break;
      case '\n': out += "\\n"; break;
      case '\r': out += "\\r"; break;
      case '\t': out += "\\t"; break;
      case '\b': out += "\\b"; break;
      case '\f': out += "\\f"; break;
      default:
        if (static_cast<unsigned char>(c) < 0x20) {
          out += fmt::format("\\u{:04x}", static_cast<unsigned char>(c));
        } else {
          out.push_back(c);
        }
    }
  }
  return out + '"';
}

class JsonWriter {
 public:
  JsonWriter(int64_t indent, Budget& budget, std::string& out)
      : indent_(indent), budget_(budget), out_(out) {}

  Status write(const Value& value, int depth) {
    if (depth > kMaxDepth) return too_deep();
    const int64_t indentation = indent_ < 0 ? 0 : indent_ * depth;
    KVANT_TRY(budget_.charge(8 + indentation));
    if (value.is_none()) {
      out_ += "null";
    } else if (value.is_bool()) {
      out_ += value.truthy() ? "true" : "false";
    } else if (value.is_float()) {
      const double d = value.to_double();
      out_ += std::isnan(d)   ? "NaN"
              : std::isinf(d) ? (d > 0 ? "Infinity" : "-Infinity")
                              : float_text(d);
    } else if (value.is_int()) {
      out_ += fmt::format("{}", value.to_int());
    } else if (const std::string* text = value.as_string()) {
      KVANT_TRY(budget_.charge(2 * static_cast<int64_t>(text->size())));
      out_ += json_string(*text);
    } else if (const List* list = value.as_list()) {
      return write_all('[', ']', depth, list->items.size(),
                       [&](size_t i) { return write(list->items[i], depth + 1); });
    } else if (const Dict* dict = value.as_dict()) {
      return write_all('{', '}', depth, dict->items().size(), [&](size_t i) {
        out_ += json_string(dict->items()[i].first) + ": ";
        return write(dict->items()[i].second, depth + 1);
      });
    } else {
      return Error(ErrorCode::kInvalidArgument,
                   fmt::format("a {} cannot be written as JSON", value.type_name()));
    }
    return {};
  }

 private:
  template <typename WriteItem>
  Status write_all(char open, char close, int depth, size_t count, WriteItem write_item) {
    out_.push_back(open);
    for (size_t i = 0; i < count; ++i) {
      if (i != 0) out_ += indent_ < 0 ? ", " : ",";
      new_line(depth + 1);
      KVANT_TRY(write_item(i));
    }
    if (count != 0) new_line(depth);
    out_.push_back(close);
    return {};
  }
  void new_line(int depth) {
    if (indent_ < 0) return;
    out_.push_back('\n');
    out_.append(static_cast<size_t>(indent_ * depth), ' ');
  }
  int64_t indent_;
  Budget& budget_;
  std::string& out_;
};

Result<Value> from_parsed(const nlohmann::ordered_json& json, int depth) {
  if (depth > kMaxDepth) return too_deep();
  if (json.is_null()) return Value(None());
  if (json.is_boolean()) return Value(json.get<bool>());
  if (json.is_string()) return Value(json.get<std::string>());
  if (json.is_number_unsigned() && json.get<uint64_t>() > uint64_t{INT64_MAX}) {
    return Value(static_cast<double>(json.get<uint64_t>()));
  }
  if (json.is_number_integer()) return Value(json.get<int64_t>());
  if (json.is_number()) return Value(json.get<double>());
  if (json.is_array()) {
    List list;
    for (const auto& item : json) {
      KVANT_ASSIGN(Value value, from_parsed(item, depth + 1));
      list.items.push_back(std::move(value));
    }
    return Value(std::move(list));
  }
  Dict dict;
  for (const auto& [key, item] : json.items()) {
    KVANT_ASSIGN(Value value, from_parsed(item, depth + 1));
    dict.set(key, std::move(value));
  }
  return Value(std::move(dict));
}

Result<bool> equal_at(const Value& a, const Value& b, int depth, Budget& budget);

Result<bool> equal_lists(const List& a, const List& b, int depth, Budget& budget) {
  if (a.is_tuple != b.is_tuple || a.items.size() != b.items.size()) return false;
  for (size_t i = 0; i < a.items.size(); ++i) {
    KVANT_ASSIGN(const bool same, equal_at(a.items[i], b.items[i], depth + 1, budget));
    if (!same) return false;
  }
  return true;
}

Result<bool> equal_dicts(const Dict& a, const Dict& b, int depth, Budget& budget) {
  if (a.items().size() != b.items().size()) return false;
  for (const auto& [key, value] : a.items()) {
    const Value* other = b.find(key);
    if (other == nullptr) return false;
    KVANT_ASSIGN(const bool same, equal_at(value, *other, depth + 1, budget));
    if (!same) return false;
  }
  return true;
}

Result<bool> equal_at(const Value& a, const Value& b, int depth, Budget& budget) {
  if (depth > kMaxDepth) return too_deep();
  KVANT_TRY(budget.charge(8));
  if (a.is_number() && b.is_number()) {
    if (!a.is_float() && !b.is_float()) return a.to_int() == b.to_int();
    return a.to_double() == b.to_double();
  }
  if (a.is_string() && b.is_string()) return *a.as_string() == *b.as_string();
  if (a.as_list() != nullptr && b.as_list() != nullptr) {
    return equal_lists(*a.as_list(), *b.as_list(), depth, budget);
  }
  if (a.as_dict() != nullptr && b.as_dict() != nullptr) {
    return equal_dicts(*a.as_dict(), *b.as_dict(), depth, budget);
  }
  if (a.as_namespace() != nullptr) return a.as_namespace() == b.as_namespace();
  if (a.as_macro() != nullptr) return a.as_macro() == b.as_macro();
  if (a.as_function() != nullptr && b.as_function() != nullptr) {
    return a.as_function()->name == b.as_function()->name;
  }
  return (a.is_none() && b.is_none()) || (a.is_undefined() && b.is_undefined());
}

}  // namespace

void Dict::set(std::string key, Value value) {
  const auto [it, inserted] = index_.emplace(key, items_.size());
  if (inserted) {
    items_.emplace_back(std::move(key), std::move(value));
  } else {
    items_[it->second].second = std::move(value);
  }
}

const Value* Dict::find(std::string_view key) const {
  const auto it = index_.find(key);
  return it == index_.end() ? nullptr : &items_[it->second].second;
}

double Value::to_double() const {
  if (const double* d = std::get_if<double>(&data_)) return *d;
  return static_cast<double>(to_int());
}

int64_t Value::to_int() const {
  if (const bool* b = std::get_if<bool>(&data_)) return *b ? 1 : 0;
  const int64_t* i = std::get_if<int64_t>(&data_);
  return i == nullptr ? 0 : *i;
}

bool Value::truthy() const {
  if (is_number()) return is_float() ? to_double() != 0 : to_int() != 0;
  if (const std::string* text = as_string()) return !text->empty();
  if (const List* list = as_list()) return !list->items.empty();
  if (const Dict* dict = as_dict()) return !dict->items().empty();
  return !is_none() && !is_undefined();
}

std::string_view Value::type_name() const {
  constexpr std::string_view kNames[] = {"undefined value", "none",   "bool",    "int",
                                         "float",           "string", "list",    "dict",
                                         "namespace",       "macro",  "function"};
  return kNames[data_.index()];
}

Status Budget::charge(int64_t work) {
  left_ -= work;
  if (left_ >= 0) return {};
  left_ = -1;
  return Error(ErrorCode::kResourceExhausted,
               "chat template: it does more work or writes more text than any conversation needs");
}

Result<bool> equal(const Value& a, const Value& b, Budget& budget) {
  return equal_at(a, b, 0, budget);
}

Result<int> compare(const Value& a, const Value& b) {
  const auto order = [](const auto& x, const auto& y) { return x < y ? -1 : y < x ? 1 : 0; };
  if (a.is_number() && b.is_number()) {
    if (!a.is_float() && !b.is_float()) return order(a.to_int(), b.to_int());
    return order(a.to_double(), b.to_double());
  }
  if (a.is_string() && b.is_string()) return order(*a.as_string(), *b.as_string());
  return Error(ErrorCode::kInvalidArgument,
               fmt::format("a {} and a {} have no order", a.type_name(), b.type_name()));
}

Result<std::string> to_text(const Value& value, Budget& budget) {
  std::string out;
  KVANT_TRY(append_text(value, budget, out));
  return out;
}

Result<std::string> to_json(const Value& value, int64_t indent, Budget& budget) {
  std::string out;
  KVANT_TRY(JsonWriter(std::min<int64_t>(indent, 16), budget, out).write(value, 0));
  return out;
}

Result<Value> from_json(std::string_view text) {
  // nlohmann's parser is not recursive, but destroying what it made is: bound the nesting first.
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    if (in_string) {
      if (text[i] == '\\')
        ++i;
      else if (text[i] == '"')
        in_string = false;
    } else if (text[i] == '"') {
      in_string = true;
    } else if (text[i] == '[' || text[i] == '{') {
      if (++depth > kMaxDepth) return too_deep();
    } else if (text[i] == ']' || text[i] == '}') {
      --depth;
    }
  }
  const nlohmann::ordered_json parsed = nlohmann::ordered_json::parse(text, nullptr, false);
  if (parsed.is_discarded()) return Error(ErrorCode::kInvalidArgument, "this is not valid JSON");
  return from_parsed(parsed, 0);
}

std::vector<std::string_view> characters(std::string_view text) {
  std::vector<std::string_view> out;
  while (!text.empty()) {
    const size_t length = std::max<size_t>(utf8_sequence(text), 1);
    out.push_back(text.substr(0, length));
    text.remove_prefix(length);
  }
  return out;
}

int64_t count_characters(std::string_view text) {
  int64_t count = 0;
  while (!text.empty()) {
    text.remove_prefix(std::max<size_t>(utf8_sequence(text), 1));
    ++count;
  }
  return count;
}

bool is_python_space(char32_t c) {
  return (c >= 0x1c && c <= 0x1f) || char_class(c) == CharClass::kSpace;
}

std::string_view strip(std::string_view text, Ends ends, std::string_view chars) {
  const std::vector<std::string_view> set = characters(chars);
  const auto goes = [&set](std::string_view c) {
    if (set.empty()) return is_python_space(decode_utf8(c)[0]);
    return std::find(set.begin(), set.end(), c) != set.end();
  };
  if (ends != Ends::kRight) {
    while (!text.empty()) {
      const std::string_view c = text.substr(0, std::max<size_t>(utf8_sequence(text), 1));
      if (!goes(c)) break;
      text.remove_prefix(c.size());
    }
  }
  if (ends != Ends::kLeft) {
    while (!text.empty()) {
      size_t start = text.size() - 1;  // of the last character
      for (size_t back = 2; back <= std::min<size_t>(4, text.size()); ++back) {
        if (utf8_sequence(text.substr(text.size() - back)) == back) start = text.size() - back;
      }
      if (!goes(text.substr(start))) break;
      text = text.substr(0, start);
    }
  }
  return text;
}

}  // namespace kvant::model::jinja
