#include "kvant/serve/openai/json.h"

#include <fmt/format.h>

#include <cmath>

namespace kvant::serve::openai {
namespace {

// Before anything is built: how deep brackets nest and how many values there are at most.
Status check_limits(std::string_view text, const JsonLimits& limits) {
  int depth = 0;
  int64_t values = 1;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') {
        ++i;
      } else if (c == '"') {
        in_string = false;
      }
      continue;
    }
    switch (c) {
      case '"': in_string = true; break;
      case '[':
      case '{':
        ++values;
        if (++depth > limits.depth) {
          return Error(ErrorCode::kInvalidArgument,
                       fmt::format("the JSON body nests deeper than {} levels", limits.depth));
        }
        break;
      case ']':
      case '}': --depth; break;
      case ',': ++values; break;
      default: break;
    }
  }
  if (values > limits.values) {
    return Error(ErrorCode::kInvalidArgument,
                 fmt::format("the JSON body has more than {} values", limits.values));
  }
  return {};
}

// Without the library's own prefix "[json.exception.parse_error.101] ".
std::string_view plain_message(std::string_view what) {
  const size_t bracket = what.find("] ");
  return bracket == std::string_view::npos ? what : what.substr(bracket + 2);
}

std::string_view kind_of(const Json& value) {
  return value.type_name();
}

}  // namespace

Result<Json> parse_json(std::string_view text, const JsonLimits& limits) {
  KVANT_TRY(check_limits(text, limits));
  try {
    return Json::parse(text);
  } catch (const Json::exception& exception) {
    std::string message(plain_message(exception.what()));
    // The message quotes the input, which may be long and need not be UTF-8; dump_json() replaces.
    if (message.size() > 300) message.resize(300);
    return Error(ErrorCode::kInvalidArgument,
                 fmt::format("the body is not valid JSON: {}", message));
  }
}

std::string dump_json(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string quote_json(std::string_view text) {
  return dump_json(Json(text));
}

double json_logprob(float logprob) {
  return std::isfinite(logprob) ? static_cast<double>(logprob) : -9999.0;
}

const Json* FieldReader::find(std::string_view name) const {
  const auto found = object_.find(name);
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

std::optional<int64_t> FieldReader::integer(std::string_view name, int64_t min, int64_t max) {
  const Json* value = find(name);
  if (value == nullptr) return std::nullopt;
  // 16.0 is what some languages write for 16.
  const bool whole = value->is_number_float() && std::abs(value->get<double>()) < 1e15 &&
                     std::floor(value->get<double>()) == value->get<double>();
  if (!value->is_number_integer() && !whole) {
    fail(name, fmt::format("expected an integer, found {}", kind_of(*value)));
    return std::nullopt;
  }
  const bool huge =
      value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX);
  const int64_t number = huge    ? INT64_MAX
                         : whole ? static_cast<int64_t>(value->get<double>())
                                 : value->get<int64_t>();
  if (huge || number < min || number > max) {
    fail(name, fmt::format("{} is out of range; expected {} to {}", dump_json(*value), min, max));
    return std::nullopt;
  }
  return number;
}

std::optional<double> FieldReader::number(std::string_view name) {
  const Json* value = find(name);
  if (value == nullptr) return std::nullopt;
  if (!value->is_number()) {
    fail(name, fmt::format("expected a number, found {}", kind_of(*value)));
    return std::nullopt;
  }
  return value->get<double>();
}

std::optional<bool> FieldReader::boolean(std::string_view name) {
  const Json* value = find(name);
  if (value == nullptr) return std::nullopt;
  if (!value->is_boolean()) {
    fail(name, fmt::format("expected true or false, found {}", kind_of(*value)));
    return std::nullopt;
  }
  return value->get<bool>();
}

std::optional<std::string> FieldReader::text(std::string_view name) {
  const Json* value = find(name);
  if (value == nullptr) return std::nullopt;
  if (!value->is_string()) {
    fail(name, fmt::format("expected a string, found {}", kind_of(*value)));
    return std::nullopt;
  }
  return value->get<std::string>();
}

std::vector<std::string> FieldReader::texts(std::string_view name) {
  const Json* value = find(name);
  std::vector<std::string> out;
  if (value == nullptr) return out;
  if (value->is_string()) {
    out.push_back(value->get<std::string>());
    return out;
  }
  if (!value->is_array()) {
    fail(name, fmt::format("expected a string or an array of strings, found {}", kind_of(*value)));
    return out;
  }
  for (const Json& item : *value) {
    if (!item.is_string()) {
      fail(name, fmt::format("expected an array of strings, found {} in it", kind_of(item)));
      return {};
    }
    out.push_back(item.get<std::string>());
  }
  return out;
}

std::vector<int32_t> FieldReader::integers(std::string_view name) {
  const Json* value = find(name);
  std::vector<int32_t> out;
  if (value == nullptr) return out;
  if (!value->is_array()) {
    fail(name, fmt::format("expected an array of integers, found {}", kind_of(*value)));
    return out;
  }
  out.reserve(value->size());
  for (const Json& item : *value) {
    if (!item.is_number_integer() || item.get<int64_t>() < 0 ||
        item.get<int64_t>() > int64_t{INT32_MAX}) {
      fail(name, fmt::format("expected an array of token ids, found {} in it", dump_json(item)));
      return {};
    }
    out.push_back(item.get<int32_t>());
  }
  return out;
}

const Json* FieldReader::object(std::string_view name) {
  const Json* value = find(name);
  if (value != nullptr && !value->is_object()) {
    fail(name, fmt::format("expected an object, found {}", kind_of(*value)));
    return nullptr;
  }
  return value;
}

void FieldReader::fail(std::string_view name, std::string_view message) {
  if (error_) return;
  const std::string field = path_ + std::string(name);
  error_ = ApiError{.message = fmt::format("{}: {}", field, message), .param = field};
}

}  // namespace kvant::serve::openai
