// JSON schemas (draft 2020-12, the part that constrained decoding needs) as grammars.
//
// Supported: type (one or several), properties, required, additionalProperties, minProperties and
// maxProperties (of objects without declared properties), items, prefixItems, minItems, maxItems,
// enum, const, anyOf, oneOf (of branches that exclude each other), allOf, $ref, $defs and
// definitions with recursion, pattern, minLength, maxLength, format, minimum, maximum and their
// exclusive forms, true and false. Annotations are passed over. Everything else is an error that
// names the keyword and where it stands: nothing is ignored.
//
// What the grammar accepts always satisfies the schema. It is narrower than the schema where that
// keeps models on track, and where a grammar cannot do better:
//  - properties come in the order of the schema, optional ones may be left out, additional ones
//    follow; `additionalProperties` defaults to false where `properties` are given (as with
//    xgrammar's strict mode), likewise `items` after `prefixItems`;
//  - a schema without `type` has the type that its keywords speak of;
//  - names of additional properties have no escapes, and may repeat each other;
//  - enum and const accept one spelling of strings and numbers;
//  - whitespace is bounded: none or one space after ":" and ","; after "{", "[" and ",", and before
//    "}" and "]", also a line break followed by at most 32 spaces or 8 tabs;
//  - numbers have at most 18 digits before the point (15 within bounds), 20 behind it (16), and two
//    in the exponent (none within bounds); integers have neither point nor exponent;
//  - some formats accept fewer texts than their RFCs.
#pragma once

#include <map>
#include <string>
#include <string_view>

#include "kvant/base/result.h"
#include "kvant/serve/grammar/grammar.h"

namespace kvant::serve::grammar {

enum class JsonWhitespace {
  kBounded,  // as above
  kNone,     // compact JSON
};

struct JsonOptions {
  JsonWhitespace whitespace = JsonWhitespace::kBounded;
};

inline constexpr size_t kMaxSchemaBytes = 128 << 10;
inline constexpr int kMaxSchemaDepth = 64;

// Adds schemas to one grammar; they share the rules of strings, numbers and values. Single-thread.
class JsonSchemaCompiler {
 public:
  explicit JsonSchemaCompiler(GrammarBuilder& builder, JsonOptions options = {});

  // A value that satisfies `schema` (JSON text), from `from` to the node returned.
  // kInvalidArgument: not JSON, not a schema, too large. kUnsupported: a keyword that is not
  // supported. Time and memory are bounded by the grammar's limit.
  Result<NodeId> add(NodeId from, std::string_view schema);

 private:
  friend class SchemaWalker;
  NodeId string_value(NodeId from);  // any string, with its quotes
  NodeId number_value(NodeId from);
  NodeId any_value(NodeId from);
  NodeId any_char_rule_part(NodeId from);  // of a string's contents
  NodeId regex(NodeId from, std::string_view pattern);
  NodeId space(NodeId from);       // behind ":"
  NodeId line_break(NodeId from);  // behind "{", "[", "," and before "}", "]"

  GrammarBuilder& builder_;
  JsonOptions options_;
  RuleId string_ = -1;
  RuleId number_ = -1;
  RuleId value_ = -1;
  RuleId blank_ = -1;
  RuleId tab_ = -1;
  std::map<std::string, RuleId> strings_;  // by what restricts them
};

// The whole text is one value.
Result<Grammar> compile_json_schema(std::string_view schema, JsonOptions options = {});
// One object of any kind: `response_format` json_object.
Result<Grammar> compile_json_object(JsonOptions options = {});

}  // namespace kvant::serve::grammar
