#include "kvant/serve/grammar/schema_merge.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <vector>

namespace kvant::serve::grammar {
namespace {

constexpr std::string_view kSupportedKeywords[] = {"$ref",
                                                   "$defs",
                                                   "definitions",
                                                   "allOf",
                                                   "anyOf",
                                                   "oneOf",
                                                   "enum",
                                                   "const",
                                                   "type",
                                                   "properties",
                                                   "required",
                                                   "additionalProperties",
                                                   "minProperties",
                                                   "maxProperties",
                                                   "items",
                                                   "prefixItems",
                                                   "minItems",
                                                   "maxItems",
                                                   "uniqueItems",
                                                   "pattern",
                                                   "format",
                                                   "minLength",
                                                   "maxLength",
                                                   "minimum",
                                                   "maximum",
                                                   "exclusiveMinimum",
                                                   "exclusiveMaximum"};

constexpr std::string_view kAnnotations[] = {
    "title",        "description",     "default",         "examples", "example",
    "deprecated",   "readOnly",        "writeOnly",       "$schema",  "$id",
    "$comment",     "$anchor",         "$vocabulary",     "strict",   "discriminator",
    "externalDocs", "contentEncoding", "contentMediaType"};

Error cannot_merge(std::string_view keyword) {
  return Error(ErrorCode::kUnsupported,
               fmt::format("two different values of \"{}\" that apply together", keyword));
}

std::vector<std::string> types_of(const Json& type) {
  std::vector<std::string> out;
  if (type.is_string()) out.push_back(type.get<std::string>());
  if (type.is_array()) {
    for (const Json& item : type) {
      if (item.is_string()) out.push_back(item.get<std::string>());
    }
  }
  return out;
}

Json common_types(const Json& a, const Json& b) {
  Json out = Json::array();
  for (const std::string& x : types_of(a)) {
    for (const std::string& y : types_of(b)) {
      if (x == y) out.push_back(x);
      if ((x == "integer" && y == "number") || (x == "number" && y == "integer")) {
        out.push_back("integer");
      }
    }
  }
  return out;
}

Json both(const Json& a, const Json& b) {
  if (a == b) return a;
  return Json{{"allOf", Json::array({a, b})}};
}

// Properties that only one schema declares fall under the other's additionalProperties.
Json merge_properties(const Json& a, const Json& b) {
  static const Json kNone = Json::object();
  const auto properties = [](const Json& schema) -> const Json& {
    const auto it = schema.find("properties");
    return it != schema.end() && it->is_object() ? *it : kNone;
  };
  const Json& in_a = properties(a);
  const Json& in_b = properties(b);
  Json out = Json::object();
  const auto add = [&out](const auto& item, const Json& others, const Json& other_schema) {
    if (const auto it = others.find(item.key()); it != others.end()) {
      out[item.key()] = both(item.value(), *it);
    } else if (const auto rest = other_schema.find("additionalProperties");
               rest != other_schema.end()) {
      out[item.key()] = both(item.value(), *rest);
    } else {
      out[item.key()] = item.value();
    }
  };
  for (const auto& item : in_a.items()) add(item, in_b, b);
  for (const auto& item : in_b.items()) {
    if (!in_a.contains(item.key())) add(item, in_a, a);
  }
  return out;
}

// Merges one keyword that both have.
Result<Json> merge_values(const std::string& keyword, const Json& a, const Json& b) {
  if (a == b) return a;
  const bool numbers = a.is_number() && b.is_number();
  if (keyword == "type") return common_types(a, b);
  if (keyword == "enum" && a.is_array() && b.is_array()) {
    Json out = Json::array();
    for (const Json& value : a) {
      if (std::ranges::find(b, value) != b.end()) out.push_back(value);
    }
    return out;
  }
  if (keyword == "required" && a.is_array() && b.is_array()) {
    Json out = a;
    for (const Json& name : b) {
      if (std::ranges::find(out, name) == out.end()) out.push_back(name);
    }
    return out;
  }
  if (keyword == "allOf" && a.is_array() && b.is_array()) {
    Json out = a;
    out.insert(out.end(), b.begin(), b.end());
    return out;
  }
  if (keyword.starts_with("min") && numbers) return a < b ? b : a;
  if (keyword.starts_with("max") && numbers) return a < b ? a : b;
  if (keyword == "exclusiveMinimum" && numbers) return a < b ? b : a;
  if (keyword == "exclusiveMaximum" && numbers) return a < b ? a : b;
  if (keyword == "items" || keyword == "additionalProperties") return both(a, b);
  if (keyword == "uniqueItems") return Json(true);
  return cannot_merge(keyword);
}

const Json& resolved(const Json& document, const Json& schema) {
  const Json* at = &schema;
  for (int i = 0; i < 16 && at->is_object(); ++i) {
    const auto it = at->find("$ref");
    if (it == at->end() || !it->is_string()) break;
    const Json* target = find_reference(document, it->get<std::string>());
    if (target == nullptr) break;
    at = target;
  }
  return *at;
}

// The values that const or enum allow; nullptr: any.
Json constants_of(const Json& schema) {
  if (const auto it = schema.find("const"); it != schema.end()) return Json::array({*it});
  if (const auto it = schema.find("enum"); it != schema.end() && it->is_array()) return *it;
  return nullptr;
}

bool types_exclude(const Json& a, const Json& b) {
  if (!a.contains("type") || !b.contains("type")) return false;
  return common_types(a["type"], b["type"]).empty();
}

bool constants_exclude(const Json& a, const Json& b) {
  const Json in_a = constants_of(a);
  const Json in_b = constants_of(b);
  if (in_a.is_null() && in_b.is_null()) return false;
  const auto none_of_type = [](const Json& values, const Json& schema) {
    const auto type = schema.find("type");
    if (type == schema.end()) return false;
    const auto types = types_of(*type);
    return std::ranges::none_of(values, [&](const Json& value) {
      return std::ranges::any_of(types, [&](const auto& t) { return is_of_type(value, t); });
    });
  };
  constexpr size_t kMaxCompared = 200;  // each with each
  if (in_a.size() > kMaxCompared || in_b.size() > kMaxCompared) return false;
  if (in_a.is_null()) return none_of_type(in_b, a);
  if (in_b.is_null()) return none_of_type(in_a, b);
  return std::ranges::none_of(
      in_a, [&](const Json& value) { return std::ranges::find(in_b, value) != in_b.end(); });
}

bool requires_property(const Json& schema, const std::string& name) {
  const auto it = schema.find("required");
  return it != schema.end() && it->is_array() && std::ranges::find(*it, Json(name)) != it->end();
}

}  // namespace

Keyword keyword_kind(std::string_view name) {
  if (std::ranges::find(kAnnotations, name) != std::end(kAnnotations) || name.starts_with("x-")) {
    return Keyword::kAnnotation;
  }
  const bool supported =
      std::ranges::find(kSupportedKeywords, name) != std::end(kSupportedKeywords);
  return supported ? Keyword::kSupported : Keyword::kUnknown;
}

bool has_assertions_beside(const Json& schema, std::string_view except) {
  for (const auto& item : schema.items()) {
    const std::string& name = item.key();
    if (name == except || name == "$defs" || name == "definitions") continue;
    if (keyword_kind(name) != Keyword::kAnnotation) return true;
  }
  return false;
}

const Json* find_reference(const Json& document, std::string_view reference) {
  if (!reference.starts_with("#")) return nullptr;
  reference.remove_prefix(1);
  try {
    // Pointers in references are percent-encoded (RFC 6901 section 6).
    std::string pointer;
    for (size_t i = 0; i < reference.size(); ++i) {
      if (reference[i] == '%' && i + 2 < reference.size()) {
        pointer +=
            static_cast<char>(std::stoi(std::string(reference.substr(i + 1, 2)), nullptr, 16));
        i += 2;
      } else {
        pointer += reference[i];
      }
    }
    const Json::json_pointer path(pointer);
    return document.contains(path) ? &document.at(path) : nullptr;
  } catch (const std::exception&) {  // not a pointer
    return nullptr;
  }
}

Result<Json> merge_schemas(const Json& a, const Json& b) {
  if (a.is_boolean()) return a.get<bool>() ? b : a;
  if (b.is_boolean()) return b.get<bool>() ? a : b;
  if (!a.is_object() || !b.is_object()) {
    return Error(ErrorCode::kInvalidArgument, "a schema is an object, true or false");
  }
  Json out = Json::object();
  for (const auto& item : a.items()) {
    const auto other = b.find(item.key());
    if (other == b.end() || keyword_kind(item.key()) == Keyword::kAnnotation ||
        item.key() == "$defs" || item.key() == "definitions" || item.key() == "properties") {
      out[item.key()] = item.value();
      continue;
    }
    // What no single value says is left for a later merge.
    const bool one_each = item.key() == "anyOf" || item.key() == "oneOf" || item.key() == "$ref";
    if (one_each && item.value() != *other) {
      out["allOf"].push_back(Json{{item.key(), *other}});
      out[item.key()] = item.value();
      continue;
    }
    KVANT_ASSIGN(out[item.key()], merge_values(item.key(), item.value(), *other));
  }
  for (const auto& item : b.items()) {
    if (item.key() == "allOf" && out.contains("allOf") && !a.contains("allOf")) {
      for (const Json& part : item.value()) out["allOf"].push_back(part);
    } else if (!out.contains(item.key())) {
      out[item.key()] = item.value();
    }
  }
  if (a.contains("properties") || b.contains("properties")) {
    out["properties"] = merge_properties(a, b);
  }
  return out;
}

bool exclude_each_other(const Json& document, const Json& a_reference, const Json& b_reference) {
  const Json& a = resolved(document, a_reference);
  const Json& b = resolved(document, b_reference);
  if (!a.is_object() || !b.is_object()) return a == Json(false) || b == Json(false);
  if (types_exclude(a, b) || constants_exclude(a, b)) return true;
  const auto in_a = a.find("properties");
  const auto in_b = b.find("properties");
  if (in_a == a.end() || in_b == b.end()) return false;
  const auto is_object_type = [](const Json& schema) {
    return schema.contains("type") && schema["type"] == "object";
  };
  if (!is_object_type(a) && !is_object_type(b)) return false;
  for (const auto& item : in_a->items()) {
    const auto other = in_b->find(item.key());
    if (other == in_b->end()) continue;
    if (!requires_property(a, item.key()) || !requires_property(b, item.key())) continue;
    const Json& x = resolved(document, item.value());
    const Json& y = resolved(document, *other);
    if (x.is_object() && y.is_object() && (types_exclude(x, y) || constants_exclude(x, y))) {
      return true;
    }
  }
  return false;
}

bool is_of_type(const Json& value, std::string_view name) {
  if (name == "null") return value.is_null();
  if (name == "boolean") return value.is_boolean();
  if (name == "string") return value.is_string();
  if (name == "array") return value.is_array();
  if (name == "object") return value.is_object();
  if (name == "number") return value.is_number();
  if (name != "integer") return false;
  if (value.is_number_integer()) return true;
  return value.is_number_float() &&
         value.get<double>() == static_cast<double>(static_cast<int64_t>(
                                    std::clamp(value.get<double>(), -9e18, 9e18)));
}

}  // namespace kvant::serve::grammar
