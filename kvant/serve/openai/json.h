// JSON of requests and responses: parsing with limits, typed fields, text.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/serve/openai/api_error.h"

namespace kvant::serve::openai {

// Keys keep their order: chat templates print objects.
using Json = nlohmann::ordered_json;

struct JsonLimits {
  int depth = 64;              // of arrays and objects in each other
  int64_t values = 2'000'000;  // a value takes 16 bytes and more, in the text only two
};

// kInvalidArgument says what is wrong and where: not JSON, not UTF-8, beyond the limits.
Result<Json> parse_json(std::string_view text, const JsonLimits& limits = {});

// On one line. Bytes that are not UTF-8 become U+FFFD.
std::string dump_json(const Json& value);
// `text` as a JSON string, quotes included; the same for bytes that are not UTF-8.
std::string quote_json(std::string_view text);
// A number that JSON has: infinities and NaN become -9999, which is what vLLM sends for the
// log-probability of what cannot be.
double json_logprob(float logprob);

// Reads the fields of one object; null counts as absent, unknown fields are ignored. The first
// wrong field is kept in `error` and later reads go on, so that a parser checks once, at the end.
class FieldReader {
 public:
  // `path` stands in front of names in messages: "response_format." or nothing. `object` and
  // `error` must outlive it.
  FieldReader(const Json& object, std::string path, std::optional<ApiError>& error)
      : object_(object), path_(std::move(path)), error_(error) {}

  // nullptr: absent or null.
  const Json* find(std::string_view name) const;
  std::optional<int64_t> integer(std::string_view name, int64_t min, int64_t max);
  std::optional<double> number(std::string_view name);
  std::optional<bool> boolean(std::string_view name);
  std::optional<std::string> text(std::string_view name);
  // A string or an array of strings.
  std::vector<std::string> texts(std::string_view name);
  std::vector<int32_t> integers(std::string_view name);
  // nullptr: absent or not an object (which is an error).
  const Json* object(std::string_view name);

  // "FIELD: MESSAGE" unless an error is there already.
  void fail(std::string_view name, std::string_view message);
  bool failed() const { return error_.has_value(); }

 private:
  const Json& object_;
  std::string path_;
  std::optional<ApiError>& error_;
};

}  // namespace kvant::serve::openai
