// Turns a conversation into the text that a chat model expects, with the template stored in its
// file.
//
// The template is Jinja source (`tokenizer.chat_template`); kvant renders a subset of the language
// and names what it does not support. Behaviour is that of Hugging Face's apply_chat_template.
// Immutable and thread-safe once created; does not need the Gguf any more.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/model/gguf.h"
#include "kvant/model/tokenizer.h"

namespace kvant::model {

struct ChatMessage {
  std::string role;  // "system", "user", "assistant", "tool"
  std::string content;
};

struct ChatOptions {
  bool add_generation_prompt = true;  // end with the start of the assistant's answer
  std::string tools_json = {};        // a JSON array of tools; empty: none
  std::string variables_json = {};    // a JSON object of further variables; empty: none
  std::optional<int64_t> now = {};    // seconds since 1970 for templates that ask for the date
};

class ChatTemplate {
 public:
  // kNotFound if the file has no template (a base model); kUnsupported names a construct and its
  // line.
  static Result<ChatTemplate> create(const Gguf& gguf, const Tokenizer& tokenizer);
  // `bos` and `eos`: the text of these tokens, which templates can refer to.
  static Result<ChatTemplate> parse(std::string_view source, std::string_view bos,
                                    std::string_view eos);
  ChatTemplate(ChatTemplate&&) noexcept;
  ChatTemplate& operator=(ChatTemplate&&) noexcept;
  ~ChatTemplate();

  // kInvalidArgument if the template refuses the conversation (it says why).
  Result<std::string> render(std::span<const ChatMessage> messages,
                             const ChatOptions& options = {}) const;
  // The same for messages with more than role and content (tool calls): a JSON array of objects.
  Result<std::string> render_json(std::string_view messages_json,
                                  const ChatOptions& options = {}) const;
  const std::string& source() const;

 private:
  struct Impl;
  explicit ChatTemplate(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Ids of a rendered conversation: control tokens are parsed, and BOS is added if the model asks for
// it and the template has not written it.
Result<std::vector<TokenId>> encode_chat(const Tokenizer& tokenizer, std::string_view text);

}  // namespace kvant::model
