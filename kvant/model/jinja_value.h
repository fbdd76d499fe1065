// Values of the Jinja interpreter: what Python values a chat template can see. Internal to model/.
//
// Cheap to copy: strings, lists and dicts are shared and never change. The one thing that changes
// is a namespace, which the renderer owns, so that values cannot form cycles. Not thread-safe to
// share between renders that use namespaces; otherwise immutable.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "kvant/base/result.h"

namespace kvant::model::jinja {

class Value;
struct MacroDefinition;

struct List {
  std::vector<Value> items;
  bool is_tuple = false;  // prints with parentheses
};

// Keys in order of insertion.
class Dict {
 public:
  void set(std::string key, Value value);
  const Value* find(std::string_view key) const;  // nullptr: absent
  const std::vector<std::pair<std::string, Value>>& items() const { return items_; }

 private:
  std::vector<std::pair<std::string, Value>> items_;
  std::map<std::string, size_t, std::less<>> index_;
};

struct Namespace {
  std::map<std::string, Value, std::less<>> members;
};

// A function that the renderer offers, by name.
struct Function {
  std::string_view name;
};

struct Undefined {};
struct None {};

class Value {
 public:
  using Variant =
      std::variant<Undefined, None, bool, int64_t, double, std::shared_ptr<const std::string>,
                   std::shared_ptr<const List>, std::shared_ptr<const Dict>, Namespace*,
                   const MacroDefinition*, Function>;

  Value() = default;                                                                  // undefined
  Value(None) : data_(None()) {}                                                      // NOLINT
  Value(bool b) : data_(b) {}                                                         // NOLINT
  Value(int64_t i) : data_(i) {}                                                      // NOLINT
  Value(double d) : data_(d) {}                                                       // NOLINT
  Value(std::string s) : data_(std::make_shared<const std::string>(std::move(s))) {}  // NOLINT
  Value(std::string_view s) : Value(std::string(s)) {}                                // NOLINT
  Value(const char* s) : Value(std::string(s)) {}                                     // NOLINT
  Value(List list) : data_(std::make_shared<const List>(std::move(list))) {}          // NOLINT
  Value(Dict dict) : data_(std::make_shared<const Dict>(std::move(dict))) {}          // NOLINT
  Value(Namespace* space) : data_(space) {}                                           // NOLINT
  Value(const MacroDefinition* macro) : data_(macro) {}                               // NOLINT

  Value(Function function) : data_(function) {}  // NOLINT

  bool is_undefined() const { return std::holds_alternative<Undefined>(data_); }
  bool is_none() const { return std::holds_alternative<None>(data_); }
  bool is_bool() const { return std::holds_alternative<bool>(data_); }
  bool is_int() const { return std::holds_alternative<int64_t>(data_); }
  bool is_float() const { return std::holds_alternative<double>(data_); }
  bool is_number() const { return is_int() || is_float() || is_bool(); }
  bool is_string() const { return as_string() != nullptr; }

  // nullptr if the value is something else.
  const std::string* as_string() const { return get<std::string>(); }
  const List* as_list() const { return get<List>(); }
  const Dict* as_dict() const { return get<Dict>(); }
  Namespace* as_namespace() const {
    Namespace* const* p = std::get_if<Namespace*>(&data_);
    return p == nullptr ? nullptr : *p;
  }
  const MacroDefinition* as_macro() const {
    const MacroDefinition* const* p = std::get_if<const MacroDefinition*>(&data_);
    return p == nullptr ? nullptr : *p;
  }
  const Function* as_function() const { return std::get_if<Function>(&data_); }
  // Of a number; a bool is 0 or 1.
  double to_double() const;
  int64_t to_int() const;  // of an int or bool

  bool truthy() const;
  std::string_view type_name() const;  // for messages: "string", "list", ...

 private:
  template <typename T>
  const T* get() const {
    const std::shared_ptr<const T>* p = std::get_if<std::shared_ptr<const T>>(&data_);
    return p == nullptr ? nullptr : p->get();
  }
  Variant data_;
};

// What a render may still do, in units of about a byte written or an eighth of an expression
// evaluated. Values share their parts, so a small template can describe enormous ones.
class Budget {
 public:
  explicit Budget(int64_t work) : left_(work) {}
  // kResourceExhausted once everything is spent.
  Status charge(int64_t work);
  Status charge_items(size_t count) { return charge(static_cast<int64_t>(count) * 64); }

 private:
  int64_t left_;
};

Result<bool> equal(const Value& a, const Value& b, Budget& budget);
// Negative, zero or positive, as Python orders numbers and strings; kInvalidArgument for others.
Result<int> compare(const Value& a, const Value& b);

// As Python's str(); kUnsupported for a namespace or a macro.
Result<std::string> to_text(const Value& value, Budget& budget);
// As Python's json.dumps(value, ensure_ascii=False, indent=indent); indent < 0: on one line.
Result<std::string> to_json(const Value& value, int64_t indent, Budget& budget);
// A JSON text as a value; numbers beyond 64 bits become doubles.
Result<Value> from_json(std::string_view text);

// A string as its characters; bytes that are not UTF-8 are characters of their own.
std::vector<std::string_view> characters(std::string_view text);
int64_t count_characters(std::string_view text);
bool is_python_space(char32_t c);  // str.isspace()
// `text` without the white space (or, if not empty, the characters of `chars`) at its ends.
enum class Ends { kBoth, kLeft, kRight };
std::string_view strip(std::string_view text, Ends ends, std::string_view chars = {});

}  // namespace kvant::model::jinja
