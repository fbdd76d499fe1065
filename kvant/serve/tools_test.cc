#include "kvant/serve/tools.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <set>

#include "kvant/serve/grammar/machine.h"

namespace kvant::serve {
namespace {

struct Answer {
  std::string content;
  std::vector<std::pair<std::string, std::string>> calls;  // name and arguments
  std::set<std::string> ids;
  bool operator==(const Answer&) const = default;
};

// Joins events and checks their order.
void add(Answer& answer, const std::vector<ToolEvent>& events, bool& open) {
  for (const ToolEvent& event : events) {
    switch (event.kind) {
      case ToolEvent::Kind::kContent:
        EXPECT_FALSE(open || event.text.empty());
        answer.content += event.text;
        break;
      case ToolEvent::Kind::kCallBegin:
        EXPECT_FALSE(open);
        EXPECT_EQ(event.index, static_cast<int>(answer.calls.size()));
        answer.calls.emplace_back(event.name, "");
        EXPECT_TRUE(answer.ids.insert(event.id).second);
        open = true;
        break;
      case ToolEvent::Kind::kArguments:
        EXPECT_TRUE(open && !event.text.empty());
        answer.calls.back().second += event.text;
        break;
      case ToolEvent::Kind::kCallEnd:
        EXPECT_TRUE(open);
        open = false;
        break;
    }
  }
}

Answer parse(ToolCallStyle style, std::string_view text, size_t piece) {
  ToolCallParser parser({.style = style, .names = {"f", "get_weather"}, .id_seed = 3});
  Answer answer;
  bool open = false;
  for (size_t i = 0; i < text.size(); i += piece)
    add(answer, parser.push(text.substr(i, piece)), open);
  add(answer, parser.finish(), open);
  EXPECT_FALSE(open);
  EXPECT_EQ(parser.num_calls(), static_cast<int>(answer.calls.size()));
  return answer;
}

Answer parse(ToolCallStyle style, std::string_view text) {
  const Answer whole = parse(style, text, text.size() + 1);
  for (const size_t piece : {1, 2, 3, 7}) EXPECT_EQ(parse(style, text, piece), whole) << text;
  return whole;
}

Answer hermes(std::string_view text) {
  return parse(ToolCallStyle::kHermes, text);
}
Answer json(std::string_view text) {
  return parse(ToolCallStyle::kJson, text);
}

using Calls = std::vector<std::pair<std::string, std::string>>;

TEST(ToolCalls, HermesCallsAndTheTextAroundThem) {
  const Answer one = hermes(
      "Let me see.\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": "
      "\"K\\u00f6ln }\", "
      "\"days\": [1, {}]}}\n</tool_call>");
  EXPECT_EQ(one.content, "Let me see.");
  EXPECT_EQ(one.calls, (Calls{{"get_weather", R"({"city": "K\u00f6ln }", "days": [1, {}]})"}}));
  const Answer two = hermes(
      "<tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call>\n<tool_call>\n{\"arguments\": "
      "{\"x\":1} , "
      "\"name\" : \"g\"}</tool_call>\n ");
  EXPECT_EQ(two.content, "");
  EXPECT_EQ(two.calls, (Calls{{"f", "{}"}, {"g", "{\"x\":1}"}}));
  EXPECT_EQ(two.ids.size(), 2u);
}

TEST(ToolCalls, ArgumentsMayBeMissingOrAString) {
  EXPECT_EQ(hermes("<tool_call>{\"name\": \"f\"}</tool_call>").calls, (Calls{{"f", "{}"}}));
  EXPECT_EQ(
      hermes("<tool_call>{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": 1}\"}</tool_call>").calls,
      (Calls{{"f", "{\"a\": 1}"}}));
  EXPECT_EQ(hermes("<tool_call>{\"name\": \"f\", \"arguments\": null}</tool_call>").calls,
            (Calls{{"f", "null"}}));
}

TEST(ToolCalls, WhatOnlyLooksLikeACallIsContent) {
  for (const char* text :
       {"a < b <tool <tool_cal", "\n\n text\n ", "<tool_call>not json</tool_call>",
        "<tool_call>{\"x\": 1}", "<tool_call>", "<tool_call>{\"name\": 7}", "<tool_call>{}",
        "<tool_call>{\"name\": \"\"}", "<<tool_calls>", " <tool_call", "x <",
        "{\"name\": \"f\", \"parameters\": {}}"}) {
    const Answer answer = hermes(text);
    EXPECT_EQ(answer.content, text);
    EXPECT_TRUE(answer.calls.empty()) << text;
  }
}

TEST(ToolCalls, ACallThatIsCutOffKeepsWhatCame) {
  EXPECT_EQ(hermes("<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"b").calls,
            (Calls{{"f", "{\"a\": \"b"}}));
  EXPECT_EQ(hermes("<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_").content, "");
  // Without the closing tag the next call still is one.
  EXPECT_EQ(hermes("<tool_call>{\"name\": \"f\"}\n<tool_call>{\"name\": \"g\"}").calls.size(), 2u);
}

TEST(ToolCalls, JsonCallsAreTheWholeAnswer) {
  const Answer one = json(" {\"name\": \"f\", \"parameters\": {\"q\": \"a;b\"}}");
  EXPECT_EQ(one.content, "");
  EXPECT_EQ(one.calls, (Calls{{"f", "{\"q\": \"a;b\"}"}}));
  EXPECT_EQ(json("{\"type\": \"function\", \"name\": \"f\", \"parameters\": {}}; "
                 "{\"name\": \"get_weather\", \"arguments\": {}}")
                .calls.size(),
            2u);
  for (const char* text :
       {"{\"answer\": 42}", "  {\"name\": \"Ada\", \"parameters\": {}}", "{\"name\": \"Ada\"}",
        "text {\"name\": \"f\"}", "{", "  ", "[{\"name\": \"f\"}]", "{\"name\": \"f"}) {
    const Answer answer = json(text);
    EXPECT_EQ(answer.content, text);
    EXPECT_TRUE(answer.calls.empty()) << text;
  }
}

TEST(ToolCalls, ArgumentsAreStreamedAsTheyCome) {
  ToolCallParser parser({.style = ToolCallStyle::kHermes});
  EXPECT_TRUE(parser.push("<tool_call>{\"name\": \"f").empty());
  std::vector<ToolEvent> events = parser.push("\", \"arguments\": {\"text\": \"long");
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[0].kind, ToolEvent::Kind::kCallBegin);
  EXPECT_EQ(events[0].name, "f");
  EXPECT_EQ(events[0].id.substr(0, 5), "call_");
  EXPECT_EQ(events[1].text, "{\"text\": \"long");
  events = parser.push(" text\"}");
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0].text, " text\"}");
}

TEST(ToolCalls, StylesAreFoundInTemplates) {
  EXPECT_EQ(tool_call_style_of("... within <tool_call></tool_call> XML tags"),
            ToolCallStyle::kHermes);
  EXPECT_EQ(tool_call_style_of("{\"name\": function name, \"parameters\": ...}"),
            ToolCallStyle::kJson);
  for (const ToolCallStyle style : {ToolCallStyle::kHermes, ToolCallStyle::kJson}) {
    EXPECT_EQ(parse_tool_call_style(tool_call_style_name(style)).value(), style);
  }
  EXPECT_FALSE(parse_tool_call_style("mistral"));
  EXPECT_TRUE(template_knows_tools("{%- if tools %}") && !template_knows_tools("{{ messages }}"));
}

bool matches(const grammar::ConstraintSpec& spec, std::string_view text) {
  const grammar::Grammar grammar = grammar::compile_grammar(spec).value();
  grammar::Machine machine(grammar);
  grammar::StateId state = machine.start();
  for (const char byte : text) {
    state = machine.next(state, static_cast<uint8_t>(byte));
    if (state == grammar::kDead) return false;
  }
  return machine.ends(state);
}

constexpr const char* kTools = R"([
  {"type": "function", "function": {"name": "f", "parameters":
    {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}},
  {"type": "function", "function": {"name": "get_weather"}}])";

TEST(ToolCalls, ConstraintsWriteWhatTheParserReads) {
  const std::string call =
      "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 12}}\n</tool_call>";
  const auto required = tool_call_constraint({.tools_json = kTools}).value();
  EXPECT_TRUE(matches(required, call));
  EXPECT_TRUE(matches(required, call + "\n" + call));
  EXPECT_FALSE(matches(required, "text " + call));
  EXPECT_FALSE(
      matches(required, "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>"));
  EXPECT_EQ(hermes(call + "\n" + call).calls, (Calls{{"f", "{\"x\": 12}"}, {"f", "{\"x\": 12}"}}));
  const auto named =
      tool_call_constraint({.tools_json = kTools, .only = "get_weather", .parallel = false})
          .value();
  EXPECT_FALSE(matches(named, call));
  EXPECT_TRUE(matches(
      named,
      "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"a\": [1]}}\n</tool_call>"));
  const auto as_json =
      tool_call_constraint({.style = ToolCallStyle::kJson, .tools_json = kTools}).value();
  EXPECT_TRUE(matches(as_json, "{\"name\": \"f\", \"parameters\": {\"x\":1}}"));
  EXPECT_EQ(json("{\"name\": \"f\", \"parameters\": {\"x\":1}}").calls.size(), 1u);
}

TEST(ToolCalls, ConstraintsNameTheToolThatIsWrong) {
  const auto problem = [](const char* tools, const char* only = "") {
    const auto spec = tool_call_constraint({.tools_json = tools, .only = only});
    return spec ? std::string() : spec.error().message();
  };
  EXPECT_EQ(problem(R"([{"function": {"name": "g", "parameters": {"not": {}}}}])"),
            "tool 'g': schema #: \"not\" is not supported");
  EXPECT_EQ(problem(kTools, "h"), "there is no tool 'h'");
  EXPECT_EQ(problem("[]"), "there are no tools to choose from");
  EXPECT_NE(problem("{"), "");
  EXPECT_NE(problem("[{}]"), "");
}

}  // namespace
}  // namespace kvant::serve
