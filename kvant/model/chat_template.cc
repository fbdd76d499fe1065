#include "kvant/model/chat_template.h"

#include <fmt/format.h>

#include "kvant/model/jinja.h"

namespace kvant::model {
namespace {

using jinja::Dict;
using jinja::List;
using jinja::Value;

Result<Value> parse_argument(std::string_view name, std::string_view json) {
  Result<Value> value = jinja::from_json(json);
  if (!value) return value.error().with_context(name);
  return value;
}

}  // namespace

struct ChatTemplate::Impl {
  std::string source;
  std::string bos;
  std::string eos;
  jinja::Template program;

  Result<std::string> render(Value messages, const ChatOptions& options) const;
};

Result<std::string> ChatTemplate::Impl::render(Value messages, const ChatOptions& options) const {
  Dict variables;
  if (!options.variables_json.empty()) {
    KVANT_ASSIGN(const Value more, parse_argument("variables", options.variables_json));
    if (more.as_dict() == nullptr) {
      return Error(ErrorCode::kInvalidArgument, "variables: expected a JSON object");
    }
    variables = *more.as_dict();
  }
  variables.set("messages", std::move(messages));
  variables.set("add_generation_prompt", Value(options.add_generation_prompt));
  variables.set("bos_token", Value(bos));
  variables.set("eos_token", Value(eos));
  variables.set("tools", Value(jinja::None()));
  variables.set("documents", Value(jinja::None()));
  if (!options.tools_json.empty()) {
    KVANT_ASSIGN(Value tools, parse_argument("tools", options.tools_json));
    if (tools.as_list() == nullptr) {
      return Error(ErrorCode::kInvalidArgument, "tools: expected a JSON array");
    }
    variables.set("tools", std::move(tools));
  }
  return program.render(variables, options.now);
}

ChatTemplate::ChatTemplate(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
ChatTemplate::ChatTemplate(ChatTemplate&&) noexcept = default;
ChatTemplate& ChatTemplate::operator=(ChatTemplate&&) noexcept = default;
ChatTemplate::~ChatTemplate() = default;

Result<ChatTemplate> ChatTemplate::create(const Gguf& gguf, const Tokenizer& tokenizer) {
  if (!gguf.has("tokenizer.chat_template")) {
    return Error(
        ErrorCode::kNotFound,
        fmt::format("{}: the file has no chat template (tokenizer.chat_template); this is a "
                    "base model: give it raw text",
                    gguf.name()));
  }
  KVANT_ASSIGN(const std::string_view source, gguf.string("tokenizer.chat_template"));
  const auto text = [&tokenizer](std::optional<TokenId> id) {
    return id ? tokenizer.token_text(*id) : std::string_view();
  };
  return parse(source, text(tokenizer.bos()), text(tokenizer.eos()));
}

Result<ChatTemplate> ChatTemplate::parse(std::string_view source, std::string_view bos,
                                         std::string_view eos) {
  KVANT_ASSIGN(jinja::Template program, jinja::Template::parse(source));
  return ChatTemplate(std::make_unique<Impl>(
      Impl{std::string(source), std::string(bos), std::string(eos), std::move(program)}));
}

Result<std::string> ChatTemplate::render(std::span<const ChatMessage> messages,
                                         const ChatOptions& options) const {
  List list;
  for (const ChatMessage& message : messages) {
    Dict dict;
    dict.set("role", Value(message.role));
    dict.set("content", Value(message.content));
    list.items.emplace_back(std::move(dict));
  }
  return impl_->render(Value(std::move(list)), options);
}

Result<std::string> ChatTemplate::render_json(std::string_view messages_json,
                                              const ChatOptions& options) const {
  KVANT_ASSIGN(Value messages, parse_argument("messages", messages_json));
  if (messages.as_list() == nullptr) {
    return Error(ErrorCode::kInvalidArgument, "messages: expected a JSON array");
  }
  return impl_->render(std::move(messages), options);
}

const std::string& ChatTemplate::source() const {
  return impl_->source;
}

Result<std::vector<TokenId>> encode_chat(const Tokenizer& tokenizer, std::string_view text) {
  KVANT_ASSIGN(std::vector<TokenId> ids, tokenizer.encode(text));
  const bool has_bos = !ids.empty() && tokenizer.bos() && ids.front() == *tokenizer.bos();
  if (tokenizer.adds_bos() && !has_bos) ids.insert(ids.begin(), *tokenizer.bos());
  return ids;
}

}  // namespace kvant::model
