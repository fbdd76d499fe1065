// Responses and stream chunks of the completion interfaces, as OpenAI's clients read them.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/model/tokenizer.h"
#include "kvant/serve/openai/json.h"
#include "kvant/serve/sampling.h"

namespace kvant::serve::openai {

struct Usage {
  int64_t prompt_tokens = 0;
  int64_t completion_tokens = 0;
  int64_t cached_tokens = 0;
};
Json usage_json(const Usage& usage);

// What every response and chunk of one request begins with.
struct ResponseHead {
  std::string id;       // "chatcmpl-..." or "cmpl-..."
  std::string object;   // "chat.completion", "chat.completion.chunk", "text_completion"
  int64_t created = 0;  // seconds since 1970
  std::string model;
};
Json head_json(const ResponseHead& head);

struct LogprobOptions {
  int top = 0;
  bool tokens_as_ids = false;
};

// The text of one token as log-probabilities show it; part of a character becomes U+FFFD when
// written.
std::string token_text(const model::Tokenizer& tokenizer, int32_t id, bool as_id);

// {"content": [{"token", "logprob", "bytes", "top_logprobs"}]}
Json chat_logprobs(const model::Tokenizer& tokenizer, std::span<const SampledToken> tokens,
                   const LogprobOptions& options);

// {"tokens", "token_logprobs", "top_logprobs", "text_offset"}. A token with id -1 - id stands for
// `id` without a log-probability (the first of a prompt): see unscored(). `offset` counts
// characters and goes on.
Json completion_logprobs(const model::Tokenizer& tokenizer, std::span<const SampledToken> tokens,
                         const LogprobOptions& options, int64_t& offset);
inline SampledToken unscored(int32_t id) {
  return {.id = -1 - id, .logprob = 0, .top = {}};
}

// vLLM's prompt_logprobs: null, or {"ID": {"logprob", "rank", "decoded_token"}} for each token.
Json prompt_logprobs_json(const model::Tokenizer& tokenizer, std::span<const SampledToken> tokens);

// One chunk of a stream as bytes to send: "data: {...}\n\n".
class ChunkWriter {
 public:
  explicit ChunkWriter(const ResponseHead& head);

  // `choice_fields`: members of the choice's object behind its index, from chat_delta() or text().
  // `usage`: a member of the chunk; nullptr leaves it out.
  std::string choice(int index, std::string_view choice_fields, const Json* usage) const;
  // The chunk without choices at the end.
  std::string usage_only(const Json& usage) const;
  // More members of the chunk itself: prompt_token_ids.
  std::string choice_with(int index, std::string_view choice_fields, std::string_view more,
                          const Json* usage) const;

 private:
  std::string prefix_;  // up to "choices":[
};
inline constexpr std::string_view kStreamEnd = "data: [DONE]\n\n";
std::string error_chunk(const ApiError& error);

}  // namespace kvant::serve::openai
