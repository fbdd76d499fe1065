#include "kvant/serve/grammar/grammar.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <charconv>
#include <regex>

#include "kvant/serve/grammar/constraint.h"
#include "kvant/serve/grammar/machine.h"
#include "kvant/serve/grammar/number_range.h"
#include "kvant/serve/grammar/testing/documents.h"

namespace kvant::serve::grammar {
namespace {

using Kind = ConstraintSpec::Kind;

bool matches(const Grammar& grammar, std::string_view text) {
  Machine machine(grammar);
  StateId state = machine.start();
  for (const char byte : text) {
    state = machine.next(state, static_cast<uint8_t>(byte));
    if (state == kDead) return false;
  }
  return machine.ends(state);
}

Grammar compiled(const ConstraintSpec& spec) {
  Result<Grammar> grammar = compile_grammar(spec);
  EXPECT_TRUE(grammar) << grammar.error().message() << "\n" << spec.text;
  return std::move(grammar).value();
}

bool regex_matches(std::string_view pattern, std::string_view text) {
  return matches(compiled({.kind = Kind::kRegex, .text = std::string(pattern)}), text);
}

bool schema_matches(std::string_view schema, std::string_view text) {
  return matches(compiled({.kind = Kind::kJsonSchema, .text = std::string(schema)}), text);
}

std::string problem(Kind kind, std::string_view text) {
  const Result<Grammar> grammar = compile_grammar({.kind = kind, .text = std::string(text)});
  return grammar ? "" : grammar.error().message();
}

TEST(Regex, MatchesWholeTexts) {
  EXPECT_TRUE(regex_matches("a(b|cd)*e?", "abcdb"));
  EXPECT_FALSE(regex_matches("a(b|cd)*e?", "abc"));
  EXPECT_TRUE(regex_matches("^[A-Z][a-z]{2,3}$", "Abcd"));
  EXPECT_FALSE(regex_matches("[A-Z][a-z]{2,3}", "Abcde"));
  EXPECT_TRUE(regex_matches("\\d{12}\\s\\w+", "123456789012 a_9"));
  EXPECT_FALSE(regex_matches("\\d{12}", "12345678901"));
  EXPECT_FALSE(regex_matches("\\d{12}", "1234567890123"));
  EXPECT_TRUE(regex_matches("[^a-c\\]]+", "xyz["));
  EXPECT_FALSE(regex_matches("[^a-c\\]]+", "x]"));
  EXPECT_TRUE(regex_matches("(?:x|(?P<n>y)|(?<m>z))", "z"));
  EXPECT_TRUE(regex_matches("(a*)*b", "aab"));
  EXPECT_TRUE(regex_matches("(a|b?){3}", "ab"));
  EXPECT_TRUE(regex_matches("\\x41\\u00e9\\u{1F600}\\uD83D\\uDE00.",
                            "A\xc3\xa9\xf0\x9f\x98\x80\xf0\x9f\x98\x80\xe2\x82\xac"));
  EXPECT_FALSE(regex_matches(".", "\n"));
  EXPECT_FALSE(regex_matches(".", "\xff"));
}

TEST(Regex, CharactersAreWholeUtf8) {
  const std::string every_length = "[\\u007f-\\u{10FFFF}]";
  for (const char* text : {"\x7f", "\xc2\x80", "\xdf\xbf", "\xe0\xa0\x80", "\xed\x9f\xbf",
                           "\xee\x80\x80", "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf"}) {
    EXPECT_TRUE(regex_matches(every_length, text)) << text;
  }
  for (const char* text :
       {"~", "\xc1\xbf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xe2\x82", "\x80"}) {
    EXPECT_FALSE(regex_matches(every_length, text)) << text;
  }
  EXPECT_TRUE(regex_matches("[\xc3\xa4-\xe1\x88\xb4]", "\xe0\xa4\x85"));
}

TEST(Regex, AgreesWithTheStandardLibrary) {
  const char* patterns[] = {"(ab|a)(bc|c)?",   "[ab]{2,11}c*",   "(a+b){1,9}",
                            "a{0,3}(b|c){10}", "((a|b)c?){2,}a", "(aa|b)*(ab|c){0,20}"};
  std::mt19937 random(3);
  for (const char* pattern : patterns) {
    const Grammar grammar = compiled({.kind = Kind::kRegex, .text = pattern});
    const std::regex expected(pattern);
    int matched = 0;
    for (int i = 0; i < 3000; ++i) {
      std::string text;
      for (size_t length = random() % 14; length > 0; --length) text += "abc"[random() % 3];
      const bool match = std::regex_match(text, expected);
      matched += match;
      ASSERT_EQ(matches(grammar, text), match) << pattern << " on " << text;
    }
    EXPECT_GT(matched, 0) << pattern;
  }
}

TEST(Regex, WhatIsNotRegularIsNamed) {
  const auto error = [](std::string_view pattern) { return problem(Kind::kRegex, pattern); };
  EXPECT_EQ(error("ab(?=c)"),
            "regular expression, position 3: a group that begins with (?=c is not supported");
  EXPECT_EQ(error("(a)\\1"), "regular expression, position 4: \\1 is not supported");
  EXPECT_EQ(error("a\\b"), "regular expression, position 2: \\b is not supported");
  EXPECT_EQ(error("a^b"),
            "regular expression, position 1: an anchor inside the expression is not supported");
  EXPECT_EQ(error("(a"), "regular expression, position 2: expected )");
  EXPECT_EQ(error("a)"), "regular expression, position 1: unmatched )");
  EXPECT_EQ(error("[b-a]"), "regular expression, position 4: a range backwards");
  EXPECT_NE(error("*"), "");
  EXPECT_NE(error("a{2,1}"), "");
  EXPECT_NE(error("a{1000000}"), "");
  EXPECT_NE(error("[a"), "");
  EXPECT_NE(error("\xff"), "");
  EXPECT_NE(error(std::string(5000, '(')), "");
  EXPECT_NE(error("((((a{999}){999}){999}){999})b{99999}c{8}(((d{8}){8}){8}){8}(((d{8}){8}){8}){8}"
                  "((((((d{8}){8}){8}){8}){8}){8}){8}"),
            "");
}

TEST(NumberRange, IntegersAgreeWithComparison) {
  const std::optional<Bound> bounds[] = {std::nullopt,      Bound{-105, true},  Bound{-10, false},
                                         Bound{-1.5, true}, Bound{0, true},     Bound{0, false},
                                         Bound{7, true},    Bound{99.5, false}, Bound{120, true}};
  for (const auto& low : bounds) {
    for (const auto& high : bounds) {
      const auto regex = integer_range_regex(low, high);
      std::optional<Grammar> grammar;
      if (regex) grammar = compiled({.kind = Kind::kRegex, .text = *regex});
      for (int value = -130; value <= 130; ++value) {
        const bool above = !low || (low->inclusive ? value >= low->value : value > low->value);
        const bool below = !high || (high->inclusive ? value <= high->value : value < high->value);
        const bool match = grammar && matches(*grammar, std::to_string(value));
        ASSERT_EQ(match, above && below) << value << " in " << regex.value_or("nothing");
      }
      EXPECT_FALSE(grammar && (matches(*grammar, "-0") || matches(*grammar, "007")));
    }
  }
}

TEST(NumberRange, NumbersAgreeWithComparison) {
  const std::optional<Bound> bounds[] = {
      std::nullopt,      Bound{-3.25, true},  Bound{-3.2, false}, Bound{-1, true},
      Bound{0, true},    Bound{0, false},     Bound{0.5, true},   Bound{0.5, false},
      Bound{0.53, true}, Bound{0.531, false}, Bound{2, false},    Bound{2, true},
      Bound{2.05, true}, Bound{12.75, false}};
  std::vector<std::string> texts;
  for (const char* whole : {"0", "1", "2", "3", "12", "13"}) {
    for (const char* sign : {"", "-"}) {
      for (const char* fraction :
           {"",     ".0",   ".2",    ".20",   ".25", ".3",  ".49", ".5",   ".50", ".52",  ".53",
            ".530", ".531", ".5309", ".5311", ".6",  ".04", ".05", ".051", ".75", ".749", ".9"}) {
        texts.push_back(std::string(sign) + whole + fraction);
      }
    }
  }
  for (const auto& low : bounds) {
    for (const auto& high : bounds) {
      const auto regex = number_range_regex(low, high).value();
      std::optional<Grammar> grammar;
      if (regex) grammar = compiled({.kind = Kind::kRegex, .text = *regex});
      for (const std::string& text : texts) {
        double value = 0;
        std::from_chars(text.data(), text.data() + text.size(), value);
        const bool above = !low || (low->inclusive ? value >= low->value : value > low->value);
        const bool below = !high || (high->inclusive ? value <= high->value : value < high->value);
        const bool match = grammar && matches(*grammar, text);
        if (value == 0 && text[0] == '-') {
          EXPECT_FALSE(match) << text;  // one zero is enough
        } else {
          ASSERT_EQ(match, above && below) << text << " in " << regex.value_or("nothing");
        }
      }
    }
  }
  EXPECT_FALSE(number_range_regex(Bound{1e15, true}, std::nullopt));
}

TEST(JsonSchema, ObjectsAreClosedAndOrderedAndMayLeaveOptionsOut) {
  const char* schema = R"({"type": "object", "required": ["b"],
    "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}, "c": {"type": "null"}}})";
  EXPECT_TRUE(schema_matches(schema, R"({"b":true})"));
  EXPECT_TRUE(schema_matches(schema, R"({"a": 1, "b": true, "c": null})"));
  EXPECT_TRUE(schema_matches(schema, "{\n  \"b\": true,\n  \"c\": null\n}"));
  EXPECT_FALSE(schema_matches(schema, R"({"a": 1})"));
  EXPECT_FALSE(schema_matches(schema, R"({"b":true,"a":1})"));
  EXPECT_FALSE(schema_matches(schema, R"({"b":true,"x":1})"));
  EXPECT_FALSE(schema_matches(schema, R"({"b":true,})"));
  EXPECT_FALSE(schema_matches(schema, R"({,"b":true})"));
  EXPECT_FALSE(schema_matches(schema, R"({"b":  true})"));
  EXPECT_FALSE(schema_matches(schema, "{\n\n\"b\":true}"));
}

TEST(JsonSchema, AdditionalPropertiesHaveOtherNames) {
  const char* schema = R"({"type": "object", "properties": {"abc": {"type": "null"}, "é": {}},
    "additionalProperties": {"type": "integer"}})";
  EXPECT_TRUE(schema_matches(schema, R"({"ab":1,"abcd":2,"":3,"è":4,"x":5})"));
  EXPECT_TRUE(schema_matches(schema, R"({"abc":null,"abd":1})"));
  EXPECT_FALSE(schema_matches(schema, R"({"abc":1})"));
  EXPECT_FALSE(schema_matches(schema, R"({"x":1,"abc":1})"));
  EXPECT_FALSE(schema_matches(schema, R"({"x":1,"é":1})"));
}

TEST(JsonSchema, MergesWhatAppliesTogether) {
  const char* all = R"({"allOf": [
     {"type": "object", "properties": {"a": {"type": "number", "minimum": 3}}, "required": ["a"]},
     {"properties": {"a": {"type": "integer"}, "b": {"$ref": "#/$defs/b"}}}],
     "$defs": {"b": {"enum": ["x", "y"]}}, "required": ["b"]})";
  EXPECT_TRUE(schema_matches(all, R"({"a":3,"b":"y"})"));
  EXPECT_FALSE(schema_matches(all, R"({"a":2,"b":"y"})"));
  EXPECT_FALSE(schema_matches(all, R"({"a":3.5,"b":"y"})"));
  EXPECT_FALSE(schema_matches(all, R"({"a":3})"));
  const char* any =
      R"({"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}},
     "anyOf": [{"required": ["a"]}, {"required": ["b"]}]})";
  EXPECT_TRUE(schema_matches(any, R"({"a":null})"));
  EXPECT_TRUE(schema_matches(any, R"({"b":null})"));
  EXPECT_FALSE(schema_matches(any, "{}"));
  const char* one = R"({"oneOf": [
     {"type": "object", "properties": {"kind": {"const": "a"}, "x": {"type": "integer"}}, "required": ["kind", "x"]},
     {"type": "object", "properties": {"kind": {"const": "b"}}, "required": ["kind"]}]})";
  EXPECT_TRUE(schema_matches(one, R"({"kind":"b"})"));
  EXPECT_FALSE(schema_matches(one, R"({"kind":"a"})"));
}

TEST(JsonSchema, RecursionEnds) {
  const char* list =
      R"({"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
     "required": ["next"]})";
  EXPECT_TRUE(schema_matches(list, R"({"next":{"next":{"next":null}}})"));
  EXPECT_EQ(problem(Kind::kJsonSchema, R"({"type": "object", "properties": {"next": {"$ref": "#"}},
     "required": ["next"]})"),
            "the constraint on the output: no finite text satisfies it");
  EXPECT_NE(problem(Kind::kJsonSchema, R"({"anyOf": [{"$ref": "#"}, {"type": "null"}]})"), "");
  // A branch without an end is not offered.
  EXPECT_FALSE(schema_matches(
      R"({"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/never"}, "minItems": 1},
     {"type": "null"}], "$defs": {"never": {"type": "array", "items": {"$ref": "#/$defs/never"}, "minItems": 1}}})",
      "[[["));
}

TEST(JsonSchema, Formats) {
  const auto format = [](const char* name, const char* text) {
    return schema_matches(fmt::format(R"({{"type": "string", "format": "{}"}})", name),
                          fmt::format("\"{}\"", text));
  };
  EXPECT_TRUE(format("date", "2024-12-31") && format("date", "2023-02-28"));
  EXPECT_FALSE(format("date", "2023-02-30") || format("date", "2023-04-31") ||
               format("date", "2023-13-01"));
  EXPECT_TRUE(format("date-time", "2024-01-30T23:59:59.5+01:00"));
  EXPECT_TRUE(format("uuid", "123e4567-e89b-12d3-a456-426614174000"));
  EXPECT_TRUE(format("email", "ada.l@example.org"));
  EXPECT_TRUE(format("ipv4", "192.168.0.255") && !format("ipv4", "256.1.1.1"));
  EXPECT_TRUE(format("ipv6", "2001:db8::1") && format("ipv6", "::") && !format("ipv6", "1::2::3"));
  EXPECT_TRUE(format("duration", "P1Y2M3DT4H5M6S") && format("duration", "PT5M") &&
              !format("duration", "P"));
  EXPECT_TRUE(format("uri", "https://example.org/a?b=c#d") && format("hostname", "a-b.example"));
}

TEST(JsonSchema, StringsAreUnicodeWithWholeEscapes) {
  const char* schema = R"({"type": "string", "minLength": 2, "maxLength": 2})";
  EXPECT_TRUE(schema_matches(schema, R"("\n\u00e9")"));
  EXPECT_TRUE(schema_matches(schema, R"("😀\ud83d\ude00")"));
  EXPECT_FALSE(schema_matches(schema, R"("\ud83dx")"));
  EXPECT_FALSE(schema_matches(schema, R"("abc")"));
  EXPECT_FALSE(schema_matches(schema, "\"a\xff\""));
  EXPECT_FALSE(schema_matches(schema, "\"a\n\""));
  EXPECT_TRUE(schema_matches(R"({"type": "string", "pattern": "^a[\"\\n]b$"})", R"("a\"b")"));
  EXPECT_TRUE(schema_matches(R"({"type": "string", "pattern": "^a[\"\\n]b$"})", R"("a\nb")"));
}

TEST(JsonSchema, WhatIsNotSupportedIsNamedWithItsPlace) {
  const auto error = [](std::string_view schema) { return problem(Kind::kJsonSchema, schema); };
  EXPECT_EQ(error(R"({"properties": {"a/b": {"not": {}}}})"),
            "schema #/properties/a~1b: \"not\" is not supported");
  EXPECT_EQ(error(R"({"type": "array", "items": {"multipleOf": 3}})"),
            "schema #/items: \"multipleOf\" is not supported");
  EXPECT_EQ(error(R"({"$defs": {"x": {"if": {}}}, "anyOf": [{"$ref": "#/$defs/x"}]})"),
            "schema #/$defs/x: \"if\" is not supported");
  EXPECT_EQ(
      error(R"({"type": "text"})"),
      "schema #/type: \"text\" is not a type; expected object, array, string, number, integer, "
      "boolean or null");
  EXPECT_EQ(
      error(R"({"$ref": "other.json"})"),
      "schema #/$ref: \"other.json\" is not in the schema; references within it begin with #");
  EXPECT_NE(
      error(R"({"oneOf": [{"type": "integer"}, {"type": "number"}]})").find("exclude each other"),
      std::string::npos);
  EXPECT_NE(error(R"({"type": "string", "format": "phone"})").find("known are date"),
            std::string::npos);
  EXPECT_NE(error(R"({"type": "string", "pattern": "a", "maxLength": 3})").find("maxLength"),
            std::string::npos);
  for (const char* bad : {"",
                          "[",
                          "7",
                          "{\"type\": 3}",
                          "{\"minItems\": -1}",
                          "{\"required\": 1}",
                          "{\"properties\": []}",
                          "{\"enum\": 3}",
                          "{\"allOf\": []}",
                          "{\"pattern\": 1}",
                          "{\"minimum\": \"a\"}",
                          "false",
                          "{\"enum\": []}",
                          "{\"type\": []}",
                          "{\"maxItems\": 0, \"minItems\": 1}",
                          "{\"minLength\": 2, \"maxLength\": 1}",
                          "{\"$ref\": 3}",
                          "{\"$ref\": \"#\"}",
                          "{\"uniqueItems\": true}",
                          "{\"minimum\": 3, \"maximum\": 2, \"type\": \"integer\"}"}) {
    EXPECT_NE(error(bad), "") << bad;
  }
}

TEST(JsonSchema, HostileSchemasEndSoon) {
  const auto error = [](const std::string& schema) { return problem(Kind::kJsonSchema, schema); };
  std::string deep;
  for (int i = 0; i < 20000; ++i) deep += "[";
  EXPECT_NE(error(deep), "");
  std::string nested = "true";
  for (int i = 0; i < 100; ++i) nested = fmt::format(R"({{"items": {}}})", nested);
  EXPECT_NE(error(nested), "");
  EXPECT_EQ(error(R"({"type": "array", "items": {"type": "string", "minLength": 4000000000}})"),
            "");
  // Merging that would double at each level.
  EXPECT_NE(
      error(
          R"({"$defs": {"a": {"type": "object", "properties": {"x": {"allOf": [{"$ref": "#/$defs/a"}],
     "required": ["y"]}, "y": {"allOf": [{"$ref": "#/$defs/a"}], "required": ["x"]}}}}, "$ref": "#/$defs/a"})"),
      "");
  EXPECT_NE(error(std::string(200'000, ' ')), "");
}

TEST(Machine, StacksThatCannotBeToldApartStayBounded) {
  const Grammar grammar = compiled({.kind = Kind::kJsonSchema, .text = R"({"anyOf": [
     {"type": "array", "items": {"$ref": "#"}}, {"type": "array", "items": {"$ref": "#"}, "maxItems": 9},
     {"type": "array", "items": {"$ref": "#"}, "maxItems": 10}, {"type": "null"}]})"});
  Machine machine(grammar);
  StateId state = machine.start();
  for (int i = 0; i < 40; ++i) {
    state = machine.next(state, '[');
    ASSERT_NE(state, kDead);
    ASSERT_LE(machine.configs(state).size(), Machine::kMaxConfigs);
  }
  for (int i = 0; i < 40; ++i) state = machine.next(state, ']');
  ASSERT_NE(state, kDead);
  EXPECT_TRUE(machine.ends(state));
}

TEST(Constraint, ChoicesAndSequences) {
  const Grammar choice = compiled({.kind = Kind::kChoice, .choices = {"yes", "no", "nothing"}});
  EXPECT_TRUE(matches(choice, "no") && matches(choice, "nothing"));
  EXPECT_FALSE(matches(choice, "noth") || matches(choice, "yesno"));
  const ConstraintSpec spec = {
      .kind = Kind::kSequences,
      .sequences = {{{ConstraintPiece::Kind::kText, "<a>"},
                     {ConstraintPiece::Kind::kJsonSchema, R"({"type": "integer"})"},
                     {ConstraintPiece::Kind::kText, "</a>"}},
                    {{ConstraintPiece::Kind::kText, "<b>"}}},
      .separator = "\n",
      .max_sequences = 3};
  const Grammar calls = compiled(spec);
  EXPECT_TRUE(matches(calls, "<a>12</a>"));
  EXPECT_TRUE(matches(calls, "<b>\n<a>1</a>\n<b>"));
  EXPECT_FALSE(matches(calls, "<b>\n<b>\n<b>\n<b>"));
  EXPECT_FALSE(matches(calls, ""));
  EXPECT_FALSE(compile_grammar({.kind = Kind::kChoice}));
}

TEST(Constraint, EndsOnlyAtTheEnd) {
  const auto vocabulary = testing::small_vocabulary();
  ConstraintCompiler compiler(vocabulary, 2);
  const ConstraintSpec spec = {.kind = Kind::kChoice, .choices = {"ab", "abc"}};
  const auto source = compiler.compile(spec).value();
  EXPECT_EQ(compiler.compile(spec).value(), source);
  const auto constraint = source->create();
  std::vector<uint32_t> mask((vocabulary->size() + 31) / 32);
  const int32_t end = vocabulary->end_tokens()[0];
  const auto allows = [&](int32_t id) {
    constraint->allowed(mask);
    return static_cast<bool>(mask[id / 32] >> (id % 32) & 1);
  };
  EXPECT_FALSE(allows(end) || constraint->accept(end) || constraint->is_complete());
  EXPECT_TRUE(allows('a'));
  ASSERT_TRUE(constraint->accept('a'));
  EXPECT_FALSE(constraint->accept('x'));
  ASSERT_TRUE(constraint->accept('b'));
  EXPECT_TRUE(constraint->is_complete() && allows(end) && allows('c'));
  ASSERT_TRUE(constraint->accept('c'));
  EXPECT_TRUE(allows(end) && !allows('c'));
  ASSERT_TRUE(constraint->accept(end));
  EXPECT_TRUE(constraint->is_complete() && !constraint->accept('a') && !constraint->accept(-1));
}

TEST(Constraint, AVocabularyThatCannotSpellTheRestEndsTheAnswer) {
  const auto vocabulary =
      std::make_shared<Vocabulary>(std::vector<std::string>{"a", "b", ""}, std::vector<int32_t>{2});
  ConstraintCompiler compiler(vocabulary);
  const auto constraint = compiler.compile({.kind = Kind::kRegex, .text = "abx"}).value()->create();
  std::vector<uint32_t> mask(1);
  ASSERT_TRUE(constraint->accept(0) && constraint->accept(1));
  constraint->allowed(mask);
  EXPECT_EQ(mask[0], 1u << 2);
  EXPECT_FALSE(constraint->is_complete());
  EXPECT_TRUE(constraint->accept(2));
}

}  // namespace
}  // namespace kvant::serve::grammar
