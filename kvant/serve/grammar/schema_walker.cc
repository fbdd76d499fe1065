#include "kvant/serve/grammar/schema_walker.h"

#include <fmt/format.h>

#include <algorithm>

namespace kvant::serve::grammar {
namespace {

constexpr size_t kMaxMergedValues = 1'000'000;  // bounds the time of hostile schemas
constexpr size_t kMaxOneOf = 64;                // branches, compared pair by pair

const Json* find(const Json& schema, std::string_view keyword) {
  const auto it = schema.find(std::string(keyword));
  return it != schema.end() ? &*it : nullptr;
}

size_t num_values(const Json& json) {
  size_t count = 1;
  if (json.is_structured()) {
    for (const Json& value : json) count += num_values(value);
  }
  return count;
}

}  // namespace

SchemaWalker::Place SchemaWalker::Place::at(std::string_view token) const {
  std::string escaped;
  for (const char c : token) {
    if (c == '~')
      escaped += "~0";
    else if (c == '/')
      escaped += "~1";
    else
      escaped += c;
  }
  return {pointer + "/" + escaped, depth + 1};
}

SchemaWalker::Place SchemaWalker::Place::at(std::string_view token, size_t index) const {
  return {fmt::format("{}/{}/{}", pointer, token, index), depth + 1};
}

Error SchemaWalker::error(const Place& place, std::string_view what) const {
  return Error(ErrorCode::kInvalidArgument, fmt::format("schema {}: {}", place.pointer, what));
}

Error SchemaWalker::unsupported(const Place& place, std::string_view keyword,
                                std::string_view why) const {
  return Error(ErrorCode::kUnsupported,
               fmt::format("schema {}: \"{}\" {}", place.pointer, keyword, why));
}

Result<NodeId> SchemaWalker::add(NodeId from) {
  return value(from, document_, {"#"});
}

Status SchemaWalker::check_keywords(const Json& schema, const Place& place) const {
  for (const auto& item : schema.items()) {
    if (keyword_kind(item.key()) == Keyword::kUnknown) {
      return unsupported(place, item.key(), "is not supported");
    }
  }
  if (const Json* unique = find(schema, "uniqueItems"); unique && *unique != Json(false)) {
    return unsupported(place, "uniqueItems", "is not supported");
  }
  return {};
}

Result<NodeId> SchemaWalker::value(NodeId from, const Json& schema, const Place& place) {
  if (place.depth > kMaxSchemaDepth) {
    return error(place, fmt::format("more than {} levels of schemas", kMaxSchemaDepth));
  }
  if (builder_.is_full()) return from;  // build() says so
  if (schema.is_boolean()) {
    return schema.get<bool>() ? compiler_.any_value(from) : builder_.new_node();
  }
  if (!schema.is_object()) return error(place, "expected an object, true or false");
  KVANT_TRY(check_keywords(schema, place));
  if (schema.contains("$ref")) return reference(from, schema, place);
  if (schema.contains("allOf")) return all_of(from, schema, place);
  if (schema.contains("anyOf")) return branches(from, schema, "anyOf", place);
  if (schema.contains("oneOf")) return branches(from, schema, "oneOf", place);
  if (schema.contains("const") || schema.contains("enum")) return constants(from, schema, place);
  return of_types(from, schema, place);
}

Result<Json> SchemaWalker::merge(const Json& a, const Json& b, const Place& place) {
  merged_values_ += num_values(a) + num_values(b);
  if (merged_values_ > kMaxMergedValues) {
    return error(place, "merging its parts takes too long; make it smaller");
  }
  Result<Json> merged = merge_schemas(a, b);
  if (!merged) return merged.error().with_context("schema " + place.pointer);
  return merged;
}

Result<NodeId> SchemaWalker::reference(NodeId from, const Json& schema, const Place& place) {
  const Json& pointer = schema["$ref"];
  if (!pointer.is_string()) return error(place.at("$ref"), "expected a string");
  const std::string name = pointer.get<std::string>();
  const Json* target = find_reference(document_, name);
  if (target == nullptr) {
    return error(
        place.at("$ref"),
        fmt::format("\"{}\" is not in the schema; references within it begin with #", name));
  }
  if (has_assertions_beside(schema, "$ref")) {
    Json beside = schema;
    beside.erase("$ref");
    KVANT_ASSIGN(const Json merged, merge(*target, beside, place));
    return value(from, merged, place.at("$ref"));
  }
  const auto [known, is_new] = references_.try_emplace(name, -1);
  if (is_new) {
    const RuleId rule = builder_.new_rule();
    known->second = rule;
    // Recursion ends at the rule that is being written: the depth counts along the document.
    KVANT_ASSIGN(const NodeId end, value(builder_.start(rule), *target, {name, place.depth + 1}));
    builder_.end_rule(rule, end);
    return builder_.call(from, rule);
  }
  return builder_.call(from, known->second);
}

Result<NodeId> SchemaWalker::all_of(NodeId from, const Json& schema, const Place& place) {
  const Json& parts = schema["allOf"];
  if (!parts.is_array() || parts.empty()) return error(place.at("allOf"), "expected a list");
  const bool alone = !has_assertions_beside(schema, "allOf");
  if (alone && parts.size() == 1) return value(from, parts[0], place.at("allOf", 0));
  Json merged = schema;
  merged.erase("allOf");
  for (size_t i = 0; i < parts.size(); ++i) {
    const Json* part = &parts[i];
    // A reference says nothing to merge with by itself.
    if (part->is_object() && part->contains("$ref") && !has_assertions_beside(*part, "$ref")) {
      const Json& pointer = (*part)["$ref"];
      const Json* target =
          pointer.is_string() ? find_reference(document_, pointer.get<std::string>()) : nullptr;
      if (target != nullptr) part = target;
    }
    KVANT_ASSIGN(merged, merge(merged, *part, place.at("allOf", i)));
  }
  return value(from, merged, place.at("allOf"));
}

Result<NodeId> SchemaWalker::branches(NodeId from, const Json& schema, std::string_view keyword,
                                      const Place& place) {
  const Json& parts = schema[std::string(keyword)];
  if (!parts.is_array() || parts.empty()) return error(place.at(keyword), "expected a list");
  if (keyword == "oneOf") {
    if (parts.size() > kMaxOneOf) {
      return unsupported(place, "oneOf",
                         fmt::format("of more than {} branches is not supported", kMaxOneOf));
    }
    for (size_t i = 0; i < parts.size(); ++i) {
      for (size_t j = i + 1; j < parts.size(); ++j) {
        if (exclude_each_other(document_, parts[i], parts[j])) continue;
        return unsupported(place, "oneOf",
                           fmt::format("needs branches that exclude each other by their types or "
                                       "by a required property with constants; {} and {} may both "
                                       "match (anyOf allows that)",
                                       i, j));
      }
    }
  }
  Json beside = schema;
  beside.erase(std::string(keyword));
  const bool alone = !has_assertions_beside(schema, keyword);
  const NodeId end = builder_.new_node();
  for (size_t i = 0; i < parts.size(); ++i) {
    const NodeId begin = builder_.new_node();
    builder_.empty_edge(from, begin);
    Json merged;
    if (!alone) {
      KVANT_ASSIGN(merged, merge(beside, parts[i], place.at(keyword, i)));
    }
    KVANT_ASSIGN(const NodeId last, value(begin, alone ? parts[i] : merged, place.at(keyword, i)));
    builder_.empty_edge(last, end);
  }
  return end;
}

Result<NodeId> SchemaWalker::constants(NodeId from, const Json& schema, const Place& place) {
  const bool is_const = schema.contains("const");
  Json values = is_const ? Json::array({schema["const"]}) : schema["enum"];
  if (!values.is_array()) return error(place.at("enum"), "expected a list");
  for (const auto& item : schema.items()) {
    const std::string& name = item.key();
    if (name == "const" || name == "type" || name == "$defs" || name == "definitions" ||
        name == "uniqueItems" || keyword_kind(name) == Keyword::kAnnotation) {
      continue;
    }
    if (name != "enum") {
      return unsupported(
          place, name,
          is_const ? "beside \"const\" is not supported" : "beside \"enum\" is not supported");
    }
    if (is_const && std::ranges::find(item.value(), values[0]) == item.value().end()) {
      return builder_.new_node();
    }
  }
  if (schema.contains("type")) {
    KVANT_ASSIGN(const std::vector<std::string> names, types(schema, place));
    Json kept = Json::array();
    for (const Json& value : values) {
      const bool fits =
          std::ranges::any_of(names, [&](const auto& name) { return is_of_type(value, name); });
      if (fits) kept.push_back(value);
    }
    values = std::move(kept);
  }
  const NodeId end = builder_.new_node();
  for (const Json& value : values) builder_.empty_edge(constant(from, value), end);
  return end;
}

NodeId SchemaWalker::constant(NodeId from, const Json& value) {
  if (value.is_object()) {
    from = builder_.literal(from, "{");
    bool first = true;
    for (const auto& item : value.items()) {
      from = first ? compiler_.line_break(from) : comma(from);
      first = false;
      from = builder_.literal(from, Json(item.key()).dump() + ":");
      from = constant(compiler_.space(from), item.value());
    }
    return builder_.literal(first ? from : compiler_.line_break(from), "}");
  }
  if (value.is_array()) {
    from = builder_.literal(from, "[");
    bool first = true;
    for (const Json& item : value) {
      from = first ? compiler_.line_break(from) : comma(from);
      first = false;
      from = constant(from, item);
    }
    return builder_.literal(first ? from : compiler_.line_break(from), "]");
  }
  return builder_.literal(from, value.dump());
}

Result<std::vector<std::string>> SchemaWalker::types(const Json& schema, const Place& place) const {
  static const std::vector<std::string> kAll = {"object", "array",   "string",
                                                "number", "boolean", "null"};
  std::vector<std::string> out;
  if (const Json* type = find(schema, "type")) {
    for (const Json& name : type->is_array() ? *type : Json::array({*type})) {
      const bool known =
          name.is_string() &&
          (name == "integer" || std::ranges::find(kAll, name.get<std::string>()) != kAll.end());
      if (!known) {
        return error(place.at("type"),
                     fmt::format("{} is not a type; expected object, array, string, number, "
                                 "integer, boolean or null",
                                 name.dump()));
      }
      out.push_back(name.get<std::string>());
    }
    return out;
  }
  const auto speaks_of = [&](std::initializer_list<std::string_view> keywords) {
    return std::ranges::any_of(keywords, [&](auto name) { return find(schema, name) != nullptr; });
  };
  if (speaks_of(
          {"properties", "required", "additionalProperties", "minProperties", "maxProperties"})) {
    out.emplace_back("object");
  }
  if (speaks_of({"items", "prefixItems", "minItems", "maxItems"})) out.emplace_back("array");
  if (speaks_of({"pattern", "format", "minLength", "maxLength"})) out.emplace_back("string");
  if (speaks_of({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})) {
    out.emplace_back("number");
  }
  return out.empty() ? kAll : out;
}

Result<NodeId> SchemaWalker::of_types(NodeId from, const Json& schema, const Place& place) {
  // {} and true are the same rule; the rule of any value itself names its types.
  if (!has_assertions_beside(schema, "")) return compiler_.any_value(from);
  KVANT_ASSIGN(const std::vector<std::string> names, types(schema, place));
  if (names.size() == 1) return of_type(from, names[0], schema, place);
  const NodeId end = builder_.new_node();
  for (const std::string& name : names) {
    if (name == "integer" && std::ranges::find(names, "number") != names.end()) continue;
    const NodeId begin = builder_.new_node();
    builder_.empty_edge(from, begin);
    KVANT_ASSIGN(const NodeId last, of_type(begin, name, schema, place));
    builder_.empty_edge(last, end);
  }
  return end;
}

Result<NodeId> SchemaWalker::of_type(NodeId from, std::string_view type, const Json& schema,
                                     const Place& place) {
  if (type == "object") return object(from, schema, place);
  if (type == "array") return array(from, schema, place);
  if (type == "string") return string(from, schema, place);
  if (type == "number") return number(from, schema, false, place);
  if (type == "integer") return number(from, schema, true, place);
  if (type == "null") return builder_.literal(from, "null");
  const NodeId end = builder_.new_node();
  builder_.empty_edge(builder_.literal(from, "true"), end);
  builder_.empty_edge(builder_.literal(from, "false"), end);
  return end;
}

NodeId SchemaWalker::comma(NodeId from) {
  return compiler_.line_break(builder_.literal(from, ","));
}

Result<SchemaWalker::Count> SchemaWalker::count(const Json& schema, std::string_view min,
                                                std::string_view max, const Place& place) const {
  Count out;
  const auto read = [&](std::string_view keyword, uint32_t& value) -> Status {
    const Json* json = find(schema, keyword);
    if (json == nullptr) return {};
    const bool whole =
        json->is_number() && json->get<double>() >= 0 && is_of_type(*json, "integer");
    if (!whole) return error(place.at(keyword), "expected an integer of 0 or more");
    // Beyond any text that a model writes.
    value = static_cast<uint32_t>(std::min(json->get<double>(), double{kUnbounded - 1}));
    return {};
  };
  KVANT_TRY(read(min, out.min));
  KVANT_TRY(read(max, out.max));
  return out;
}

}  // namespace kvant::serve::grammar
