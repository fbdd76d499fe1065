// Strings, numbers and arrays of SchemaWalker.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "kvant/serve/grammar/char_set.h"
#include "kvant/serve/grammar/formats.h"
#include "kvant/serve/grammar/number_range.h"
#include "kvant/serve/grammar/regex.h"
#include "kvant/serve/grammar/schema_walker.h"

namespace kvant::serve::grammar {
namespace {

constexpr double kExactIntegers = 9007199254740992.0;  // doubles name every integer up to 2^53
constexpr double kLargestInteger = 1e18;               // no integer of ours reaches it

bool is_number_format(std::string_view format) {
  return format == "int32" || format == "int64" || format == "float" || format == "double";
}

// The tighter of an inclusive and an exclusive bound; `sign` is 1 for lower, -1 for upper ones.
std::optional<Bound> tighter(const Json* inclusive, const Json* exclusive, double sign) {
  std::optional<Bound> out;
  if (inclusive != nullptr) out = {inclusive->get<double>(), true};
  if (exclusive != nullptr) {
    const double value = exclusive->get<double>();
    if (!out || sign * value >= sign * out->value) out = {value, false};
  }
  return out;
}

}  // namespace

Result<NodeId> SchemaWalker::string(NodeId from, const Json& schema, const Place& place) {
  std::string key;  // the same restrictions are one rule
  for (const char* keyword : {"pattern", "format", "minLength", "maxLength"}) {
    if (schema.contains(keyword)) key += Json(keyword).dump() + schema[keyword].dump();
  }
  if (key.empty()) return compiler_.string_value(from);
  auto known = compiler_.strings_.find(key);
  if (known == compiler_.strings_.end()) {
    const RuleId rule = builder_.new_rule();
    KVANT_TRY(string_contents(rule, schema, place));
    known = compiler_.strings_.emplace(key, rule).first;
  }
  return builder_.call(from, known->second);
}

Status SchemaWalker::string_contents(RuleId rule, const Json& schema, const Place& place) {
  NodeId at = builder_.literal(builder_.start(rule), "\"");
  const bool has_length = schema.contains("minLength") || schema.contains("maxLength");
  for (const char* keyword : {"pattern", "format"}) {
    if (!schema.contains(keyword)) continue;
    if (!schema[keyword].is_string()) return error(place.at(keyword), "expected a string");
    if (has_length) {
      return unsupported(place, keyword, "together with minLength or maxLength is not supported");
    }
  }
  if (schema.contains("pattern") && schema.contains("format")) {
    return unsupported(place, "pattern", "together with format is not supported");
  }
  if (schema.contains("pattern") || schema.contains("format")) {
    const bool is_pattern = schema.contains("pattern");
    const std::string text = schema[is_pattern ? "pattern" : "format"].get<std::string>();
    const std::string_view known = format_regex(text);
    if (!is_pattern && known.empty()) {
      return unsupported(place, "format",
                         fmt::format("of {} is not supported; known are {}", text, format_names()));
    }
    const Result<NodeId> end =
        add_regex(builder_, at, is_pattern ? std::string_view(text) : known,
                  {.context = TextContext::kJsonString,
                   .match = is_pattern ? RegexMatch::kSearch : RegexMatch::kWhole});
    if (!end) return end.error().with_context("schema " + place.at("pattern").pointer);
    at = *end;
  } else {
    KVANT_ASSIGN(const Count length, count(schema, "minLength", "maxLength", place));
    if (length.min > length.max) return {};  // no such string: the rule has no end
    at = builder_.repeat(
        at, [&](NodeId begin) { return compiler_.any_char_rule_part(begin); }, length.min,
        length.max);
  }
  builder_.end_rule(rule, builder_.literal(at, "\""));
  return {};
}

Result<NodeId> SchemaWalker::number(NodeId from, const Json& schema, bool integer,
                                    const Place& place) {
  const auto bound = [&](const char* keyword) -> Result<const Json*> {
    const auto it = schema.find(keyword);
    if (it == schema.end()) return static_cast<const Json*>(nullptr);
    if (!it->is_number()) return error(place.at(keyword), "expected a number");
    const double value = std::abs(it->get<double>());
    if (integer && value > kExactIntegers && value < kLargestInteger) {
      return unsupported(place, keyword, "between 2^53 and 10^18 is not supported");
    }
    return &*it;
  };
  KVANT_ASSIGN(const Json* minimum, bound("minimum"));
  KVANT_ASSIGN(const Json* above, bound("exclusiveMinimum"));
  KVANT_ASSIGN(const Json* maximum, bound("maximum"));
  KVANT_ASSIGN(const Json* below, bound("exclusiveMaximum"));
  std::optional<Bound> low = tighter(minimum, above, 1);
  std::optional<Bound> high = tighter(maximum, below, -1);
  if (const auto format = schema.find("format"); format != schema.end()) {
    const std::string name = format->is_string() ? format->get<std::string>() : format->dump();
    if (!is_number_format(name) && !schema.contains("type")) return builder_.new_node();
    if (!is_number_format(name) && format_regex(name).empty()) {
      return unsupported(place, "format", fmt::format("of {} is not supported", name));
    }
    if (integer && name == "int32") {
      if (!low || low->value < -2147483648.0) low = {-2147483648.0, true};
      if (!high || high->value > 2147483647.0) high = {2147483647.0, true};
    }
  }
  std::optional<std::string> regex;
  if (integer) {
    regex = integer_range_regex(low, high);
  } else if (!low && !high) {
    return compiler_.number_value(from);
  } else {
    Result<std::optional<std::string>> range = number_range_regex(low, high);
    if (!range) return range.error().with_context("schema " + place.pointer);
    regex = *range;
  }
  if (!regex) return builder_.new_node();  // no such number
  return add_regex(builder_, from, *regex);
}

Result<NodeId> SchemaWalker::array(NodeId from, const Json& schema, const Place& place) {
  static const Json kAnything = Json(true);
  KVANT_ASSIGN(const Count length, count(schema, "minItems", "maxItems", place));
  const auto prefix_it = schema.find("prefixItems");
  const Json prefix = prefix_it != schema.end() ? *prefix_it : Json::array();
  if (!prefix.is_array()) return error(place.at("prefixItems"), "expected a list");
  const auto items_it = schema.find("items");
  const Json* items = items_it != schema.end() ? &*items_it : prefix.empty() ? &kAnything : nullptr;
  if (items != nullptr && items->is_array()) {
    return unsupported(place, "items", "as a list is of older drafts; write prefixItems");
  }
  if (items != nullptr && *items == Json(false)) items = nullptr;
  const NodeId open = compiler_.line_break(builder_.literal(from, "["));
  const NodeId last = builder_.new_node();  // behind the last item
  const NodeId close = builder_.new_node();
  builder_.empty_edge(compiler_.line_break(last), close);
  if (length.min == 0) builder_.empty_edge(open, close);
  NodeId at = open;
  uint32_t done = 0;
  for (; done < prefix.size() && done < length.max; ++done) {
    KVANT_ASSIGN(at,
                 value(done == 0 ? at : comma(at), prefix[done], place.at("prefixItems", done)));
    if (done + 1 >= length.min) builder_.empty_edge(at, last);
  }
  if (items != nullptr && done < length.max) {
    const RuleId item = builder_.new_rule();
    KVANT_ASSIGN(const NodeId end, value(builder_.start(item), *items, place.at("items")));
    builder_.end_rule(item, end);
    uint32_t min = length.min > done ? length.min - done : 0;
    uint32_t max = length.max == kUnbounded ? kUnbounded : length.max - done;
    if (done == 0) {
      at = builder_.call(at, item);
      min = min == 0 ? 0 : min - 1;
      max = max == kUnbounded ? kUnbounded : max - 1;
    }
    at = builder_.repeat(
        at, [&](NodeId begin) { return builder_.call(comma(begin), item); }, min, max);
    if (length.min <= length.max) builder_.empty_edge(at, last);
  }
  return builder_.literal(close, "]");
}

}  // namespace kvant::serve::grammar
