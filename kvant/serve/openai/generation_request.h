// The bodies of /v1/completions and /v1/chat/completions as values. Names, meanings and defaults
// are OpenAI's, and vLLM's where OpenAI has none (research: vLLM's protocol.py).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "kvant/serve/openai/api_error.h"
#include "kvant/serve/openai/json.h"
#include "kvant/serve/sampling_params.h"

namespace kvant::serve::openai {

// Text, or ids of tokens.
using PromptInput = std::variant<std::string, std::vector<int32_t>>;

enum class ToolChoice { kNone, kAuto, kRequired, kNamed };
enum class ResponseFormat { kText, kJsonObject, kJsonSchema };

struct GenerationRequest {
  bool chat = false;
  std::string model;  // empty: the one there is
  SamplingParams sampling;
  std::string user;
  std::string cache_salt;
  int priority = 0;

  // ---- what is sent back, and how
  bool stream = false;
  bool include_usage = false;
  bool continuous_usage = false;  // in every chunk
  bool logprobs = false;
  int top_logprobs = 0;
  bool echo = false;  // the prompt in front of the answer
  bool return_token_ids = false;
  bool tokens_as_ids = false;  // "token_id:17" instead of text in log-probabilities

  // ---- completions
  std::vector<PromptInput> prompts;
  bool add_special_tokens = true;

  // ---- chat
  std::string messages_json;   // an array, contents as plain strings
  std::string tools_json;      // an array or empty
  std::string variables_json;  // chat_template_kwargs, an object or empty
  bool add_generation_prompt = true;
  ToolChoice tool_choice = ToolChoice::kNone;
  std::string tool_name;  // kNamed
  bool parallel_tool_calls = true;

  // ---- the form of the answer
  ResponseFormat response_format = ResponseFormat::kText;
  std::string schema_json;           // kJsonSchema
  std::string regex;                 // of structured_outputs / guided_regex; empty: none
  std::vector<std::string> choices;  // the same: the answer is one of these
};

struct RequestLimits {
  SamplingLimits sampling;
  int64_t max_model_len = 0;
  size_t max_prompts = 1024;  // of one completion request
  size_t max_messages = 4096;
};

using ParsedRequest = std::variant<GenerationRequest, ApiError>;
ParsedRequest parse_completion(const Json& body, const RequestLimits& limits);
ParsedRequest parse_chat(const Json& body, const RequestLimits& limits);

// The `messages` of a chat request, checked, with the text parts of contents joined and arguments
// of earlier tool calls as objects: what chat templates expect. An empty array on errors.
Json read_messages(FieldReader& reader, const RequestLimits& limits);

}  // namespace kvant::serve::openai
