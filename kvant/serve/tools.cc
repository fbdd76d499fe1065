#include "kvant/serve/tools.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

namespace kvant::serve {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view kOpenTag = "<tool_call>";
constexpr std::string_view kCloseTag = "</tool_call>";
constexpr uint32_t kMaxParallelCalls = 16;

bool is_space(char c) {
  return c == ' ' || c == '\n' || c == '\t' || c == '\r';
}

std::optional<std::string> decode_string(std::string_view quoted) {
  const Json json = Json::parse(quoted, nullptr, false);
  if (!json.is_string()) return std::nullopt;
  return json.get<std::string>();
}

bool is_arguments(std::string_view quoted_key) {
  return quoted_key == "\"arguments\"" || quoted_key == "\"parameters\"";
}

// Keys of calls; an object with any other is an answer in JSON.
bool is_call_key(std::string_view quoted_key) {
  return is_arguments(quoted_key) || quoted_key == "\"name\"" || quoted_key == "\"type\"" ||
         quoted_key == "\"id\"";
}

}  // namespace

Result<ToolCallStyle> parse_tool_call_style(std::string_view name) {
  if (name == "hermes") return ToolCallStyle::kHermes;
  if (name == "llama3_json") return ToolCallStyle::kJson;
  return Error(ErrorCode::kInvalidArgument,
               fmt::format("'{}' is not a tool call parser; expected hermes or llama3_json", name));
}

std::string_view tool_call_style_name(ToolCallStyle style) {
  return style == ToolCallStyle::kHermes ? "hermes" : "llama3_json";
}

ToolCallStyle tool_call_style_of(std::string_view template_source) {
  const bool tagged = template_source.find(kOpenTag) != std::string_view::npos;
  return tagged ? ToolCallStyle::kHermes : ToolCallStyle::kJson;
}

bool template_knows_tools(std::string_view template_source) {
  return template_source.find("tools") != std::string_view::npos;
}

Result<grammar::ConstraintSpec> tool_call_constraint(const ToolCallDemand& demand) {
  const bool hermes = demand.style == ToolCallStyle::kHermes;
  grammar::ConstraintSpec spec = {
      .kind = grammar::ConstraintSpec::Kind::kSequences,
      .separator = "\n",
      .max_sequences = hermes && demand.parallel ? kMaxParallelCalls : 1};
  const Json tools = Json::parse(demand.tools_json, nullptr, false);
  if (!tools.is_array()) {
    return Error(ErrorCode::kInvalidArgument, "tools: expected an array of tools");
  }
  for (const Json& tool : tools) {
    const Json function = tool.is_object() && tool.contains("function") ? tool["function"] : Json();
    if (!function.is_object() || !function.contains("name") || !function["name"].is_string()) {
      return Error(ErrorCode::kInvalidArgument, "tools: expected functions with names");
    }
    const std::string name = function["name"].get<std::string>();
    if (!demand.only.empty() && name != demand.only) continue;
    const bool takes_any = !function.contains("parameters") || function["parameters"].is_null();
    const std::string schema = takes_any ? R"({"type": "object"})" : function["parameters"].dump();
    grammar::ConstraintSpec alone = {.kind = grammar::ConstraintSpec::Kind::kJsonSchema,
                                     .text = schema};
    if (const Result<grammar::Grammar> grammar = grammar::compile_grammar(alone); !grammar) {
      return grammar.error().with_context(fmt::format("tool '{}'", name));
    }
    using Kind = grammar::ConstraintPiece::Kind;
    spec.sequences.push_back(
        {{Kind::kText,
          fmt::format("{}{{\"name\": {}, \"{}\": ", hermes ? fmt::format("{}\n", kOpenTag) : "",
                      Json(name).dump(), hermes ? "arguments" : "parameters")},
         {Kind::kJsonSchema, schema},
         {Kind::kText, hermes ? fmt::format("}}\n{}", kCloseTag) : "}"}});
  }
  if (spec.sequences.empty()) {
    return Error(ErrorCode::kInvalidArgument,
                 demand.only.empty() ? "there are no tools to choose from"
                                     : fmt::format("there is no tool '{}'", demand.only));
  }
  return spec;
}

ToolCallParser::ToolCallParser(ToolCallParserOptions options)
    : options_(std::move(options)),
      random_(options_.id_seed),
      where_(options_.style == ToolCallStyle::kJson ? Where::kStart : Where::kContent) {}

std::vector<ToolEvent> ToolCallParser::push(std::string_view text) {
  for (const char c : text) step(c);
  return std::exchange(events_, {});
}

std::vector<ToolEvent> ToolCallParser::finish() {
  if (where_ == Where::kCall) give_up();
  const bool only_space = held_.size() == held_spaces_;
  // Behind calls, whitespace and the beginning of a closing tag are nothing.
  if (where_ != Where::kBehind && !(only_space && num_calls_ > 0)) release();
  held_.clear();
  return std::exchange(events_, {});
}

// What was held back is content.
void ToolCallParser::release() {
  held_spaces_ = 0;
  emit({.kind = ToolEvent::Kind::kContent, .text = std::exchange(held_, {})});
}

void ToolCallParser::step(char c) {
  switch (where_) {
    case Where::kStart: return start(c);
    case Where::kContent: return content(c);
    case Where::kCall: return call(c);
    case Where::kBehind: return behind(c);
  }
}

void ToolCallParser::start(char c) {
  if (is_space(c)) {
    held_ += c;
    ++held_spaces_;
  } else if (c == '{') {
    open_call();
    call(c);
  } else {
    where_ = Where::kContent;
    content(c);
  }
}

// Holds back whitespace and a tag that may be opening: before a call neither is content.
void ToolCallParser::content(char c) {
  if (options_.style == ToolCallStyle::kJson) {
    held_ += c;
    return release();
  }
  const size_t in_tag = held_.size() - held_spaces_;
  if (c == kOpenTag[in_tag]) {
    held_ += c;
    if (in_tag + 1 == kOpenTag.size()) open_call();
    return;
  }
  if (is_space(c) && in_tag == 0) {
    held_ += c;
    ++held_spaces_;
    return;
  }
  release();
  held_ += c;
  if (is_space(c)) {
    held_spaces_ = 1;
  } else if (c != kOpenTag[0]) {
    release();
  }
}

// `held_` begins with what stands before the object and is content if there is no call after all.
void ToolCallParser::open_call() {
  where_ = Where::kCall;
  part_ = Part::kOpen;
  key_.clear();
  value_.clear();
  arguments_.clear();
  depth_ = 0;
  in_string_ = escaped_ = begun_ = has_arguments_ = false;
  first_member_ = true;
}

void ToolCallParser::call(char c) {
  if (!begun_) held_ += c;
  if (!call_accepts(c)) give_up();
}

// The object is not a call, or ends too early.
void ToolCallParser::give_up() {
  if (begun_) {
    emit({.kind = ToolEvent::Kind::kCallEnd, .index = num_calls_ - 1});
    where_ = Where::kBehind;
    return;
  }
  where_ = Where::kContent;
  release();
}

bool ToolCallParser::call_accepts(char c) {
  switch (part_) {
    case Part::kInKey: return in_key(c);
    case Part::kInValue: return in_value(c);
    default: break;
  }
  if (is_space(c)) return true;
  switch (part_) {
    case Part::kOpen: part_ = Part::kKey; return c == '{';
    case Part::kKey:
      if (c == '}' && first_member_) return object_done();
      key_ = c;
      part_ = Part::kInKey;
      return c == '"';
    case Part::kColon: part_ = Part::kBeforeValue; return c == ':';
    case Part::kBeforeValue: return before_value(c);
    case Part::kAfterValue:
      if (c == '}') return object_done();
      part_ = Part::kKey;
      return c == ',';
    default: return false;
  }
}

bool ToolCallParser::in_key(char c) {
  key_ += c;
  if (c == '\\' || key_.size() > 64) return false;  // no key of a call
  if (c != '"') return true;
  part_ = Part::kColon;
  return is_call_key(key_) && !(is_arguments(key_) && has_arguments_) &&
         !(key_ == "\"name\"" && begun_);
}

bool ToolCallParser::before_value(char c) {
  part_ = Part::kInValue;
  first_member_ = false;
  value_.clear();
  depth_ = 0;
  in_string_ = escaped_ = false;
  return in_value(c);
}

bool ToolCallParser::in_value(char c) {
  // A number or a word ends where something else begins.
  const bool is_scalar = depth_ == 0 && !in_string_ && !value_.empty();
  if (is_scalar && (is_space(c) || c == ',' || c == '}' || c == ']')) {
    return value_done() && (is_space(c) || call_accepts(c));
  }
  value_ += c;
  bool done = false;
  if (in_string_) {
    const bool closes = c == '"' && !escaped_;
    escaped_ = c == '\\' && !escaped_;
    in_string_ = !closes;
    done = closes && depth_ == 0;
  } else if (c == '"') {
    if (is_scalar) return false;
    in_string_ = true;
  } else if (c == '{' || c == '[') {
    if (is_scalar) return false;
    ++depth_;
  } else if (c == '}' || c == ']') {
    if (depth_ == 0) return false;
    done = --depth_ == 0;
  }
  // Objects are passed on as they come; a string with JSON in it must be whole to be read.
  const bool streams = is_arguments(key_) && begun_ && depth_ + done > 0;
  if (streams && (value_[0] == '{' || value_[0] == '[')) {
    has_arguments_ = true;
    add_arguments(value_.size() == 1 ? std::string_view(value_) : std::string_view(&c, 1));
    if (value_.size() > 1) value_.pop_back();
  }
  return !done || value_done();
}

bool ToolCallParser::value_done() {
  part_ = Part::kAfterValue;
  if (key_ == "\"name\"") {
    const std::optional<std::string> name = decode_string(value_);
    if (!name || name->empty()) return false;
    const bool known = std::ranges::find(options_.names, *name) != options_.names.end();
    if (options_.style == ToolCallStyle::kJson && !known) return false;
    value_ = *name;
    begin_call();
  } else if (is_arguments(key_) && !has_arguments_) {
    has_arguments_ = true;
    const std::optional<std::string> inner = decode_string(value_);
    const std::string text = inner ? *inner : value_;
    if (begun_) {
      add_arguments(text);
    } else {
      arguments_ = text;
    }
  }
  return true;
}

void ToolCallParser::begin_call() {
  begun_ = true;
  held_.clear();
  held_spaces_ = 0;
  emit(
      {.kind = ToolEvent::Kind::kCallBegin, .index = num_calls_++, .id = new_id(), .name = value_});
  if (has_arguments_) add_arguments(arguments_);
}

void ToolCallParser::add_arguments(std::string_view text) {
  emit({.kind = ToolEvent::Kind::kArguments, .index = num_calls_ - 1, .text = std::string(text)});
}

bool ToolCallParser::object_done() {
  if (!begun_) return false;
  if (!has_arguments_) add_arguments("{}");
  give_up();  // the end of the call
  return true;
}

// Drops the closing tag, the separators of several calls and whitespace.
void ToolCallParser::behind(char c) {
  if (options_.style == ToolCallStyle::kJson) {
    if (c == '{') {
      held_.clear();
      open_call();
      return call(c);
    }
    if (!is_space(c) && c != ';' && c != ',') where_ = Where::kContent;
    if (where_ == Where::kContent) content(c);
    return;
  }
  const size_t num_matched = held_.size();
  if (c == kCloseTag[num_matched]) {
    held_ += c;
    if (held_.size() < kCloseTag.size()) return;
    held_.clear();
    where_ = Where::kContent;
    return;
  }
  if (is_space(c) && held_.empty()) return;
  // No closing tag: what stands here is content, or the next call.
  where_ = Where::kContent;
  const std::string text = std::exchange(held_, {});
  for (const char old : text) content(old);
  step(c);
}

void ToolCallParser::emit(ToolEvent event) {
  const bool is_text =
      event.kind == ToolEvent::Kind::kContent || event.kind == ToolEvent::Kind::kArguments;
  if (is_text && event.text.empty()) return;
  if (is_text && !events_.empty() && events_.back().kind == event.kind &&
      events_.back().index == event.index) {
    events_.back().text += event.text;
    return;
  }
  events_.push_back(std::move(event));
}

std::string ToolCallParser::new_id() {
  constexpr std::string_view kAlphabet =
      "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
  std::string id = "call_";
  for (int i = 0; i < 24; ++i) id += kAlphabet[random_.next() % kAlphabet.size()];
  return id;
}

}  // namespace kvant::serve
