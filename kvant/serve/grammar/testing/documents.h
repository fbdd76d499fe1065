// For tests only: vocabularies, a JSON schema validator that shares no code with the compiler, and
// random schemas with documents that satisfy them.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <regex>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/serve/grammar/constraint.h"

namespace kvant::serve::grammar::testing {

using Json = nlohmann::ordered_json;

// Every byte, then pieces as byte pair encodings have them: words, punctuation of JSON with what
// stands around it, and broken pieces of characters. The last token is the end.
inline std::shared_ptr<const Vocabulary> small_vocabulary(uint32_t seed = 1) {
  std::vector<std::string> tokens;
  for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
  for (const char* piece : {"{\"",       "\":",         "\": ",        "\": \"",
                            "\",",       "\", \"",      "\"}",         "}}",
                            "},",        "}]",          "]}",          "],",
                            "[]",        "{}",          "[[",          " \"",
                            ": ",        ", ",          ",\n",         "{\n",
                            "\n  ",      "  ",          "    ",        "\n    \"",
                            "true",      "false",       "null",        "tr",
                            "ue",        "10",          "00",          "123",
                            "-1",        ".5",          "e+",          "ab",
                            "abc",       "the",         " the",        "na",
                            "me",        "name",        "\\\"",        "\\n",
                            "\\u",       "00e9",        "\xc3",        "\xa9",
                            "\xc3\xa9",  "\xf0\x9f",    "\x98\x80",    "\xf0\x9f\x98\x80x",
                            "a\"",       "b\",",        "key",         "y\":",
                            "\"key\": ", "}\n",         "]\n",         "\n}",
                            "\n]",       "<tool_call>", "</tool_call>"}) {
    tokens.emplace_back(piece);
  }
  std::mt19937 random(seed);
  const std::string_view alphabet = "abkey\"\":,[]{} \n019.-\\u";
  for (int i = 0; i < 400; ++i) {
    std::string token;
    for (uint32_t length = 2 + random() % 4; length > 0; --length) {
      token += alphabet[random() % alphabet.size()];
    }
    tokens.push_back(token);
  }
  tokens.emplace_back();  // a control token
  tokens.emplace_back();  // the end
  return std::make_shared<Vocabulary>(
      tokens, std::vector<int32_t>{static_cast<int32_t>(tokens.size() - 1)});
}

inline size_t num_characters(const std::string& text) {
  return static_cast<size_t>(std::ranges::count_if(
      text, [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
}

// Whether `value` satisfies `schema`, of the keywords that random_schema() writes and a few more.
class Validator {
 public:
  explicit Validator(const Json& document) : document_(document) {}
  bool valid(const Json& value) const { return valid(value, document_); }

 private:
  static bool is_type(const Json& value, const std::string& type) {
    if (type == "integer") {
      return value.is_number_integer() ||
             (value.is_number_float() && std::floor(value.get<double>()) == value.get<double>());
    }
    return (type == "null" && value.is_null()) || (type == "boolean" && value.is_boolean()) ||
           (type == "string" && value.is_string()) || (type == "number" && value.is_number()) ||
           (type == "array" && value.is_array()) || (type == "object" && value.is_object());
  }

  bool valid(const Json& value, const Json& schema) const {
    if (schema.is_boolean()) return schema.get<bool>();
    if (schema.contains("$ref")) {
      const std::string ref = schema["$ref"];
      if (!valid(value, document_.at(Json::json_pointer(ref.substr(1))))) return false;
    }
    if (schema.contains("type")) {
      const Json types = schema["type"].is_array() ? schema["type"] : Json::array({schema["type"]});
      if (std::ranges::none_of(types, [&](const Json& t) { return is_type(value, t); }))
        return false;
    }
    if (schema.contains("const") && value != schema["const"]) return false;
    if (schema.contains("enum") &&
        std::ranges::find(schema["enum"], value) == schema["enum"].end()) {
      return false;
    }
    const auto count = [&](const char* keyword) {
      return schema.contains(keyword)
                 ? std::ranges::count_if(schema[keyword],
                                         [&](const Json& s) { return valid(value, s); })
                 : -1;
    };
    if (schema.contains("allOf") && count("allOf") != static_cast<long>(schema["allOf"].size()))
      return false;
    if (count("anyOf") == 0) return false;
    if (schema.contains("oneOf") && count("oneOf") != 1) return false;
    if (value.is_number() && !valid_number(value.get<double>(), schema)) return false;
    if (value.is_string() && !valid_string(value, schema)) return false;
    if (value.is_array() && !valid_array(value, schema)) return false;
    return !value.is_object() || valid_object(value, schema);
  }

  static bool valid_number(double value, const Json& schema) {
    return !(schema.contains("minimum") && value < schema["minimum"].get<double>()) &&
           !(schema.contains("maximum") && value > schema["maximum"].get<double>()) &&
           !(schema.contains("exclusiveMinimum") &&
             value <= schema["exclusiveMinimum"].get<double>()) &&
           !(schema.contains("exclusiveMaximum") &&
             value >= schema["exclusiveMaximum"].get<double>());
  }

  static bool valid_string(const std::string& value, const Json& schema) {
    if (schema.contains("minLength") && num_characters(value) < schema["minLength"].get<size_t>())
      return false;
    if (schema.contains("maxLength") && num_characters(value) > schema["maxLength"].get<size_t>())
      return false;
    return !schema.contains("pattern") ||
           std::regex_search(value, std::regex(schema["pattern"].get<std::string>()));
  }

  bool valid_array(const Json& value, const Json& schema) const {
    if (schema.contains("minItems") && value.size() < schema["minItems"].get<size_t>())
      return false;
    if (schema.contains("maxItems") && value.size() > schema["maxItems"].get<size_t>())
      return false;
    const size_t num_prefix = schema.contains("prefixItems") ? schema["prefixItems"].size() : 0;
    for (size_t i = 0; i < value.size(); ++i) {
      if (i < num_prefix && !valid(value[i], schema["prefixItems"][i])) return false;
      if (i >= num_prefix && schema.contains("items") && !valid(value[i], schema["items"]))
        return false;
    }
    return true;
  }

  bool valid_object(const Json& value, const Json& schema) const {
    if (schema.contains("required")) {
      for (const Json& name : schema["required"]) {
        if (!value.contains(name.get<std::string>())) return false;
      }
    }
    if (schema.contains("minProperties") && value.size() < schema["minProperties"].get<size_t>())
      return false;
    if (schema.contains("maxProperties") && value.size() > schema["maxProperties"].get<size_t>())
      return false;
    for (const auto& item : value.items()) {
      if (schema.contains("properties") && schema["properties"].contains(item.key())) {
        if (!valid(item.value(), schema["properties"][item.key()])) return false;
      } else if (schema.contains("additionalProperties") &&
                 !valid(item.value(), schema["additionalProperties"])) {
        return false;
      }
    }
    return true;
  }

  const Json& document_;
};

// Random schemas, and for each random documents that satisfy it in the spelling and order that the
// compiler promises to accept.
class SchemaWriter {
 public:
  explicit SchemaWriter(uint32_t seed) : random_(seed) {}

  Json schema() {
    document_ = Json::object();
    document_["$defs"]["tree"] = {
        {"type", "object"},
        {"properties",
         {{"value", {{"type", "integer"}, {"minimum", 0}, {"maximum", 99}}},
          {"children",
           {{"type", "array"}, {"items", {{"$ref", "#/$defs/tree"}}}, {"maxItems", 3}}}}},
        {"required", {"value"}},
        {"additionalProperties", false}};
    const Json root = part(3);
    for (const auto& item : root.items()) document_[item.key()] = item.value();
    return document_;
  }

  // A document of the last schema as text.
  std::string document() { return value(document_, 0); }

  // `text` cut into tokens of the vocabulary at random.
  std::vector<int32_t> tokenize(const Vocabulary& vocabulary, std::string_view text) {
    std::vector<int32_t> out;
    while (!text.empty()) {
      std::vector<int32_t> fitting;
      for (size_t id = 0; id < vocabulary.size(); ++id) {
        const std::string_view token = vocabulary.token(static_cast<int32_t>(id));
        if (!token.empty() && text.starts_with(token)) fitting.push_back(static_cast<int32_t>(id));
      }
      out.push_back(fitting[pick(fitting.size())]);
      text.remove_prefix(vocabulary.token(out.back()).size());
    }
    return out;
  }

  size_t pick(size_t count) { return random_() % count; }
  bool chance(double p) { return static_cast<double>(random_() % 1000) < p * 1000; }

 private:
  Json part(int depth) {
    const size_t kind = depth > 0 ? pick(12) : pick(7);
    switch (kind) {
      case 0: return string_schema();
      case 1: return number_schema("integer");
      case 2: return number_schema("number");
      case 3: return {{"type", "boolean"}};
      case 4: return {{"enum", {"red", "gr\xc3\xbcn", 7, nullptr, "a \"quoted\" one"}}};
      case 5: return {{"const", "fixed"}};
      case 6: return {{"type", {"string", "null"}}};
      case 7: return {{"$ref", "#/$defs/tree"}};
      case 8: return {{"anyOf", {part(depth - 1), part(depth - 1)}}};
      case 9: return array_schema(depth);
      default: return object_schema(depth);
    }
  }

  Json string_schema() {
    Json out = {{"type", "string"}};
    if (chance(0.3)) return out;
    if (chance(0.4)) {
      const char* patterns[] = {"^[a-c]{2,4}$", "^(x|yy)+z?$", "^\\d{3}-\\d{4}$", "b"};
      out["pattern"] = patterns[pick(4)];
      return out;
    }
    const size_t min = pick(4);
    if (chance(0.7)) out["minLength"] = min;
    if (chance(0.7)) out["maxLength"] = min + pick(20);
    return out;
  }

  Json number_schema(const char* type) {
    Json out = {{"type", type}};
    if (chance(0.3)) return out;
    const int low = static_cast<int>(pick(400)) - 200;
    const double step = std::string_view(type) == "number" && chance(0.7) ? 0.125 : 1;
    if (chance(0.7)) out[chance(0.7) ? "minimum" : "exclusiveMinimum"] = low * step;
    if (chance(0.7)) {
      out[chance(0.7) ? "maximum" : "exclusiveMaximum"] =
          (low + 2 + static_cast<int>(pick(300))) * step;
    }
    return out;
  }

  Json array_schema(int depth) {
    Json out = {{"type", "array"}};
    if (chance(0.25)) {
      out["prefixItems"] = {part(depth - 1), part(depth - 1)};
      out["items"] = chance(0.5) ? Json(false) : part(depth - 1);
      if (chance(0.5)) out["minItems"] = pick(3);
      return out;
    }
    if (chance(0.9)) out["items"] = part(depth - 1);
    const size_t min = pick(3);
    if (chance(0.5)) out["minItems"] = min;
    if (chance(0.5)) out["maxItems"] = min + pick(12);
    return out;
  }

  Json object_schema(int depth) {
    Json out = {{"type", "object"}};
    if (chance(0.2)) {
      if (chance(0.8)) out["additionalProperties"] = part(depth - 1);
      if (chance(0.3)) out["minProperties"] = 1;
      if (chance(0.3)) out["maxProperties"] = 3;
      return out;
    }
    Json required = Json::array();
    for (const char* name : {"key", "name", "k", "na\"me", "\xc3\xa9"}) {
      if (chance(0.4)) continue;
      out["properties"][name] = part(depth - 1);
      if (chance(0.5)) required.push_back(name);
    }
    if (!out.contains("properties")) out["properties"] = Json::object();
    if (!required.empty()) out["required"] = required;
    if (chance(0.4)) out["additionalProperties"] = chance(0.5) ? Json(false) : part(depth - 1);
    return out;
  }

  // ---- documents

  std::string gap(bool may_break) {
    if (chance(0.6)) return "";
    if (!may_break || chance(0.5)) return " ";
    return std::string("\n") + std::string(pick(9), ' ');
  }

  std::string any_text(size_t length) {
    std::string text;
    const char* pieces[] = {"a",    "b",   "k",       " ", "\xc3\xa9",    "\xf0\x9f\x98\x80",
                            "\\\"", "\\n", "\\u00e9", "{", "\xe2\x82\xac"};
    for (size_t i = 0; i < length; ++i) text += pieces[pick(11)];
    return text;
  }

  std::string value(const Json& schema, int depth) {
    if (schema == Json(true)) return any(depth);
    if (schema.contains("$ref")) return value(document_["$defs"]["tree"], depth);
    if (schema.contains("anyOf")) return value(schema["anyOf"][pick(2)], depth);
    if (schema.contains("const")) return schema["const"].dump();
    if (schema.contains("enum")) return schema["enum"][pick(schema["enum"].size())].dump();
    if (!schema.contains("type")) return any(depth);
    const Json type =
        schema["type"].is_array() ? schema["type"][pick(schema["type"].size())] : schema["type"];
    if (type == "null") return "null";
    if (type == "boolean") return chance(0.5) ? "true" : "false";
    if (type == "string") return string_value(schema);
    if (type == "integer" || type == "number") return number_value(schema, type == "integer");
    if (type == "array") return array_value(schema, depth);
    return object_value(schema, depth);
  }

  std::string any(int depth) {
    switch (pick(depth > 2 ? 3 : 5)) {
      case 0: return std::string("\"") + any_text(pick(5)) + "\"";
      case 1: return "-12.5e3";
      case 2: return "null";
      case 3: return std::string("[") + any(depth + 1) + "," + any(depth + 1) + "]";
      default: return std::string("{\"") + any_text(3) + "\": " + any(depth + 1) + "}";
    }
  }

  std::string string_value(const Json& schema) {
    if (schema.contains("pattern")) {
      const std::string pattern = schema["pattern"];
      if (pattern == "b") return std::string("\"") + std::string(pick(3), 'a') + "b\\n\xc3\xa9\"";
      if (pattern.starts_with("^[a-c]"))
        return std::string("\"") + std::string(2 + pick(3), 'c') + "\"";
      if (pattern.starts_with("^(x")) return chance(0.5) ? "\"xyyx\"" : "\"yyz\"";
      return "\"555-0123\"";
    }
    const size_t min = schema.contains("minLength") ? schema["minLength"].get<size_t>() : 0;
    const size_t max = schema.contains("maxLength") ? schema["maxLength"].get<size_t>() : min + 9;
    return std::string("\"") + any_text(min + pick(max - min + 1)) + "\"";
  }

  std::string number_value(const Json& schema, bool integer) {
    const double step = integer ? 1 : 0.0625;
    const auto get = [&](const char* keyword, double fallback) {
      return schema.contains(keyword) ? schema[keyword].get<double>() : fallback;
    };
    double low = get("minimum", get("exclusiveMinimum", -1e6));
    double high = get("maximum", get("exclusiveMaximum", low + 2e6));
    if (low == -1e6) low = high - 2e6;
    if (schema.contains("exclusiveMinimum")) low += step;
    if (schema.contains("exclusiveMaximum")) high -= step;
    double value =
        low + step * static_cast<double>(pick(static_cast<size_t>((high - low) / step) + 1));
    if (chance(0.2)) value = low;
    if (chance(0.2)) value = high;
    if (value == std::floor(value)) return std::to_string(static_cast<int64_t>(value));
    return Json(value).dump();
  }

  std::string array_value(const Json& schema, int depth) {
    const Json prefix = schema.contains("prefixItems") ? schema["prefixItems"] : Json::array();
    const Json items = schema.contains("items") ? schema["items"] : Json(true);
    const size_t min = schema.contains("minItems") ? schema["minItems"].get<size_t>() : 0;
    size_t max = schema.contains("maxItems") ? schema["maxItems"].get<size_t>() : min + 3;
    if (items == Json(false)) max = prefix.size();
    const size_t length = depth > 3 ? min : min + pick(max - min + 1);
    std::string out = std::string("[") + gap(true);
    for (size_t i = 0; i < length; ++i) {
      if (i > 0) out += std::string(",") + gap(true);
      out += value(i < prefix.size() ? prefix[i] : items, depth + 1);
    }
    return out + (length == 0 ? "" : gap(true)) + "]";
  }

  std::string object_value(const Json& schema, int depth) {
    std::string out = std::string("{") + gap(true);
    bool first = true;
    const auto member = [&](const std::string& name, const Json& of) {
      if (!first) out += std::string(",") + gap(true);
      first = false;
      out += name + ":" + gap(false) + value(of, depth + 1);
    };
    const Json properties = schema.contains("properties") ? schema["properties"] : Json::object();
    const Json required = schema.contains("required") ? schema["required"] : Json::array();
    for (const auto& item : properties.items()) {
      const bool needed = std::ranges::find(required, Json(item.key())) != required.end();
      if (needed || (depth <= 3 && chance(0.5))) member(Json(item.key()).dump(), item.value());
    }
    const bool declares = schema.contains("properties");
    const Json additional =
        schema.contains("additionalProperties") ? schema["additionalProperties"] : Json(!declares);
    if (additional != Json(false)) {
      size_t count = pick(3);
      if (schema.contains("minProperties")) count = std::max<size_t>(count, 1);
      const char* names[] = {"\"kez\"", "\"x\"", "\"nam\""};
      for (size_t i = 0; i < count; ++i) member(names[i], additional);
    }
    return out + (first ? "" : gap(true)) + "}";
  }

  std::mt19937 random_;
  Json document_;
};

}  // namespace kvant::serve::grammar::testing
