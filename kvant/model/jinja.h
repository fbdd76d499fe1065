// A Jinja template: parsed once, rendered many times. Internal to model/; see chat_template.h.
//
// A subset that covers chat templates: for (else, if, loop.*), if, set (also blocks and
// namespaces), macro, raw, break, continue, expressions with Python's operators, slices,
// conditional expressions, and the filters, tests, methods and functions in jinja_builtins.cc,
// jinja_methods.cc and jinja_render.cc. Anything else is kUnsupported, naming the construct and its
// line. Immutable and thread-safe once parsed.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "kvant/base/result.h"
#include "kvant/model/jinja_syntax.h"
#include "kvant/model/jinja_value.h"

namespace kvant::model::jinja {

struct RenderLimits {
  int64_t work = int64_t{1} << 27;        // Budget
  size_t output_bytes = size_t{1} << 26;  // 64 MiB
};

class Template {
 public:
  static Result<Template> parse(std::string_view source);

  // `variables` are the template's globals. `now` (seconds since 1970) is what strftime_now sees;
  // the clock if absent. kInvalidArgument for what the template itself raises.
  Result<std::string> render(const Dict& variables, std::optional<int64_t> now = std::nullopt,
                             const RenderLimits& limits = {}) const;

 private:
  explicit Template(Body body) : body_(std::move(body)) {}
  Body body_;
};

}  // namespace kvant::model::jinja
