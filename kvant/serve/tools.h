// Tool calls: how a model writes them, a constraint that makes it write one, and a parser that
// finds them in a stream of text.
//
// The tools themselves reach the model through its chat template (ChatOptions::tools_json).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/model/random.h"
#include "kvant/serve/grammar/constraint.h"

namespace kvant::serve {

// How a model writes a call.
enum class ToolCallStyle {
  kHermes,  // <tool_call>{"name": ..., "arguments": {...}}</tool_call>: Hermes, Qwen
  kJson,    // the whole answer is {"name": ..., "parameters": {...}}: Llama 3
};

// `hermes` and `llama3_json`, as vLLM's --tool-call-parser calls them.
Result<ToolCallStyle> parse_tool_call_style(std::string_view name);
std::string_view tool_call_style_name(ToolCallStyle style);
// What a chat template asks its model for: kHermes if the source writes <tool_call>.
ToolCallStyle tool_call_style_of(std::string_view template_source);
// Whether the template shows tools to the model at all.
bool template_knows_tools(std::string_view template_source);

struct ToolCallDemand {
  ToolCallStyle style = ToolCallStyle::kHermes;
  std::string tools_json;  // an array of {"type": "function", "function": {"name", "parameters"}}
  std::string only = {};   // `tool_choice` names this one; empty: any (`required`)
  bool parallel = true;    // several calls may follow each other (kHermes, at most 16)
};

// The constraint under which an answer is nothing but calls whose arguments satisfy the tools'
// schemas. kInvalidArgument and kUnsupported name the tool.
Result<grammar::ConstraintSpec> tool_call_constraint(const ToolCallDemand& demand);

struct ToolEvent {
  enum class Kind {
    kContent,    // `text` is part of the answer to the user
    kCallBegin,  // call `index` of `name` with `id`
    kArguments,  // `text` is the next part of the JSON of its arguments
    kCallEnd,
  };
  Kind kind;
  int index = 0;  // of the call, from 0
  std::string text = {};
  std::string id = {};
  std::string name = {};
};

struct ToolCallParserOptions {
  ToolCallStyle style = ToolCallStyle::kHermes;
  std::vector<std::string> names = {};  // of the tools: kJson takes other objects for content
  uint64_t id_seed = 0;                 // ids of calls are drawn from it: of the request, at random
};

// Finds calls in an answer. Text that only looks like one at first comes out as content; whitespace
// around calls does not come out. Never fails: what cannot be read as a call is content, or, once a
// call has begun, its end. Single-thread; time is linear in the text.
class ToolCallParser {
 public:
  explicit ToolCallParser(ToolCallParserOptions options);

  // Text in pieces of any size. Events of one kind in a row are joined.
  std::vector<ToolEvent> push(std::string_view text);
  // At the end of the answer: what was held back.
  std::vector<ToolEvent> finish();
  // Calls that have begun: with any, the answer's finish_reason is tool_calls.
  int num_calls() const { return num_calls_; }

 private:
  enum class Where {
    kStart,    // kJson: nothing but whitespace so far
    kContent,  // in text, or in what may be the opening tag
    kCall,     // in the object of a call
    kBehind,   // behind an object: whitespace, a closing tag or a separator
  };
  // Within the object of a call.
  enum class Part { kOpen, kKey, kInKey, kColon, kBeforeValue, kInValue, kAfterValue };

  void step(char c);
  void start(char c);
  void content(char c);
  void behind(char c);
  void call(char c);
  bool call_accepts(char c);
  bool in_key(char c);
  bool before_value(char c);
  bool in_value(char c);
  bool value_done();
  bool object_done();
  void open_call();
  void give_up();
  void release();
  void begin_call();
  void add_arguments(std::string_view text);
  void emit(ToolEvent event);
  std::string new_id();

  const ToolCallParserOptions options_;
  model::SplitMix64 random_;
  Where where_;
  std::string held_;  // not yet known to be content: whitespace, a part of a tag, a call's text
  size_t held_spaces_ = 0;  // whitespace that held_ begins with
  std::vector<ToolEvent> events_;
  int num_calls_ = 0;

  // Of the call that is being read.
  Part part_ = Part::kOpen;
  std::string key_;        // as written, with quotes
  std::string value_;      // as written so far; arguments that are streamed are not kept
  std::string arguments_;  // that came before the name
  int depth_ = 0;          // of brackets in the value
  bool in_string_ = false;
  bool escaped_ = false;
  bool first_member_ = true;
  bool begun_ = false;
  bool has_arguments_ = false;
};

}  // namespace kvant::serve
