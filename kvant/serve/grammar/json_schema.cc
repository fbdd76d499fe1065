#include "kvant/serve/grammar/json_schema.h"

#include "kvant/serve/grammar/char_set.h"
#include "kvant/serve/grammar/regex.h"
#include "kvant/serve/grammar/schema_merge.h"
#include "kvant/serve/grammar/schema_walker.h"

namespace kvant::serve::grammar {
namespace {

constexpr uint32_t kMaxIndent = 32;  // spaces; deeper objects than models write
constexpr uint32_t kMaxTabs = 8;
constexpr std::string_view kNumber =
    "-?(0|[1-9][0-9]{0,17})(\\.[0-9]{1,20})?([eE][+-]?[0-9]{1,2})?";

// Parses with a bound on nesting: copies and destruction of JSON recurse.
Result<Json> parse_schema(std::string_view text) {
  if (text.size() > kMaxSchemaBytes) {
    return Error(ErrorCode::kInvalidArgument, "the schema has more than 131072 bytes");
  }
  bool too_deep = false;
  try {
    Json json = Json::parse(text, [&](int depth, Json::parse_event_t, Json&) {
      too_deep = too_deep || depth > 4 * kMaxSchemaDepth;
      return !too_deep;
    });
    if (too_deep) return Error(ErrorCode::kInvalidArgument, "the schema is nested too deeply");
    return json;
  } catch (const Json::exception& e) {
    return Error(ErrorCode::kInvalidArgument, std::string("the schema is not JSON: ") + e.what());
  }
}

}  // namespace

JsonSchemaCompiler::JsonSchemaCompiler(GrammarBuilder& builder, JsonOptions options)
    : builder_(builder), options_(options) {}

Result<NodeId> JsonSchemaCompiler::add(NodeId from, std::string_view schema) {
  KVANT_ASSIGN(const Json document, parse_schema(schema));
  try {
    return SchemaWalker(*this, document).add(from);
  } catch (const Json::exception& e) {  // a keyword's value of a type that nobody checked
    return Error(ErrorCode::kInvalidArgument, std::string("the schema is malformed: ") + e.what());
  }
}

NodeId JsonSchemaCompiler::regex(NodeId from, std::string_view pattern) {
  return add_regex(builder_, from, pattern).value();  // patterns of ours
}

NodeId JsonSchemaCompiler::space(NodeId from) {
  if (options_.whitespace == JsonWhitespace::kNone) return from;
  return builder_.optional(from, [&](NodeId at) { return builder_.literal(at, " "); });
}

NodeId JsonSchemaCompiler::line_break(NodeId from) {
  if (options_.whitespace == JsonWhitespace::kNone) return from;
  const auto one = [&](RuleId& rule, std::string_view text) {
    if (rule >= 0) return;
    rule = builder_.new_rule();
    builder_.end_rule(rule, builder_.literal(builder_.start(rule), text));
  };
  one(blank_, " ");
  one(tab_, "\t");
  // Not a rule of its own: what follows whitespace decides which tokens fit, and constraint.h's
  // masks see that only within a rule.
  const NodeId end = builder_.new_node();
  builder_.empty_edge(from, end);
  builder_.byte_edge(from, ' ', ' ', end);
  const NodeId broken = builder_.literal(from, "\n");
  builder_.call_edge(broken, {.rule = blank_, .target = end, .min = 0, .max = kMaxIndent});
  builder_.call_edge(broken, {.rule = tab_, .target = end, .min = 1, .max = kMaxTabs});
  return end;
}

NodeId JsonSchemaCompiler::any_char_rule_part(NodeId from) {
  const NodeId end = builder_.new_node();
  add_chars(builder_, from, plain_in_json_string(), TextContext::kPlain, end);
  const NodeId backslash = builder_.literal(from, "\\");
  for (const char c : {'"', '\\', '/', 'b', 'f', 'n', 'r', 't'}) {
    builder_.byte_edge(backslash, static_cast<uint8_t>(c), static_cast<uint8_t>(c), end);
  }
  // Characters outside surrogates, and whole pairs of them.
  const NodeId code = builder_.literal(backslash, "u");
  builder_.empty_edge(regex(code, "([0-9a-ce-fA-CE-F][0-9a-fA-F]|[dD][0-7])[0-9a-fA-F]{2}"), end);
  builder_.empty_edge(regex(code, "[dD][89abAB][0-9a-fA-F]{2}\\\\u[dD][c-fC-F][0-9a-fA-F]{2}"),
                      end);
  return end;
}

NodeId JsonSchemaCompiler::string_value(NodeId from) {
  if (string_ < 0) {
    string_ = builder_.new_rule();
    NodeId at = builder_.literal(builder_.start(string_), "\"");
    at = builder_.repeat(
        at, [&](NodeId begin) { return any_char_rule_part(begin); }, 0, kUnbounded);
    builder_.end_rule(string_, builder_.literal(at, "\""));
  }
  return builder_.call(from, string_);
}

NodeId JsonSchemaCompiler::number_value(NodeId from) {
  if (number_ < 0) {
    number_ = builder_.new_rule();
    builder_.end_rule(number_, regex(builder_.start(number_), kNumber));
  }
  return builder_.call(from, number_);
}

NodeId JsonSchemaCompiler::any_value(NodeId from) {
  if (value_ < 0) {
    value_ = builder_.new_rule();
    const Json anything =
        Json::parse(R"({"type": ["object", "array", "string", "number", "boolean", "null"]})");
    SchemaWalker walker(*this, anything);
    builder_.end_rule(value_, walker.add(builder_.start(value_)).value());
  }
  return builder_.call(from, value_);
}

Result<Grammar> compile_json_schema(std::string_view schema, JsonOptions options) {
  GrammarBuilder builder;
  JsonSchemaCompiler compiler(builder, options);
  const RuleId root = builder.new_rule();
  KVANT_ASSIGN(const NodeId end, compiler.add(builder.start(root), schema));
  builder.end_rule(root, end);
  Result<Grammar> grammar = builder.build(root);
  if (!grammar) return grammar.error().with_context("the schema");
  return grammar;
}

Result<Grammar> compile_json_object(JsonOptions options) {
  return compile_json_schema(R"({"type": "object"})", options);
}

}  // namespace kvant::serve::grammar
