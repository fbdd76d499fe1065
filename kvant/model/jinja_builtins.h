// Filters, tests, methods and functions of the Jinja interpreter, each a row of a table in
// jinja_builtins.cc or jinja_methods.cc. Internal to model/. Behaviour is that of Python's jinja2
// with the settings of Hugging Face's chat templates.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/model/jinja_value.h"

namespace kvant::model::jinja {

// The arguments of a call, in order and by name.
struct Arguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;

  // The argument at `index` or called `name`; nullptr if it was not given.
  const Value* get(size_t index, std::string_view name) const;
};

struct Call {
  std::string_view name;
  const Arguments& arguments;
  int line;
  Budget& budget;

  Error invalid(std::string_view what) const;  // "line 3: trim: what"
  Error unsupported(
      std::string_view what) const;  // "line 3: the filter trim: what is not supported"
  // Arguments by name or position; the fallback if absent, an error if of another kind.
  Result<int64_t> int_argument(size_t index, std::string_view key, int64_t fallback) const;
  Result<std::string> text_argument(size_t index, std::string_view key,
                                    std::string_view fallback) const;
  Result<bool> bool_argument(size_t index, std::string_view key, bool fallback) const;
  // An error unless there are at most `max` arguments and their names are among `names`.
  Status check_arguments(size_t max, std::initializer_list<std::string_view> names) const;
};

// kUnsupported for an unknown name.
Result<Value> apply_filter(const Call& call, const Value& input);
Result<bool> apply_test(const Call& call, const Value& input);
Result<Value> call_method(const Call& call, const Value& object);

// The items that a loop over `value` sees: of a list, the keys of a dict, the characters of a
// string, nothing of undefined.
Result<std::vector<Value>> iterate(const Value& value, int line, Budget& budget);
// item in container
Result<bool> is_in(const Value& item, const Value& container, int line, Budget& budget);
// value.name and value[key]: undefined if there is no such thing.
Value get_member(const Value& value, std::string_view name);

// What filters and methods share.
std::string change_case(std::string_view text,
                        char how);  // 'u'pper, 'l'ower, 'c'apitalize, 't'itle
Result<Value> replace_text(const Call& call, const std::string& text, const std::string& from,
                           const std::string& to, int64_t count);
Result<Value> join_values(const Call& call, const std::vector<Value>& items,
                          const std::string& separator);

}  // namespace kvant::model::jinja
