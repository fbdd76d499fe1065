#include "kvant/serve/openai/generation_request.h"

#include <fmt/format.h>

#include <climits>

namespace kvant::serve::openai {
namespace {

constexpr int kDefaultCompletionTokens = 16;  // OpenAI's
constexpr size_t kMaxLogitBias = 1024;

void read_float(FieldReader& reader, std::string_view name, float& out) {
  if (const auto value = reader.number(name)) out = static_cast<float>(*value);
}

void read_int(FieldReader& reader, std::string_view name, int& out, int64_t min = INT_MIN) {
  if (const auto value = reader.integer(name, min, INT_MAX)) out = static_cast<int>(*value);
}

void read_bool(FieldReader& reader, std::string_view name, bool& out) {
  if (const auto value = reader.boolean(name)) out = *value;
}

void read_logit_bias(FieldReader& reader, SamplingParams& sampling) {
  const Json* bias = reader.object("logit_bias");
  if (bias == nullptr) return;
  if (bias->size() > kMaxLogitBias) {
    reader.fail("logit_bias",
                fmt::format("{} entries; expected at most {}", bias->size(), kMaxLogitBias));
    return;
  }
  for (const auto& [key, value] : bias->items()) {
    int32_t id = -1;
    const bool is_id =
        !key.empty() && key.size() < 10 && key.find_first_not_of("0123456789") == std::string::npos;
    if (is_id) id = static_cast<int32_t>(std::stol(key));
    if (!is_id || !value.is_number()) {
      reader.fail("logit_bias", "expected token ids as keys and numbers as values");
      return;
    }
    sampling.logit_bias.emplace_back(id, value.get<float>());
  }
}

void read_sampling(FieldReader& reader, SamplingParams& sampling) {
  read_int(reader, "n", sampling.n);
  read_float(reader, "temperature", sampling.temperature);
  read_float(reader, "top_p", sampling.top_p);
  read_int(reader, "top_k", sampling.top_k);
  read_float(reader, "min_p", sampling.min_p);
  read_float(reader, "presence_penalty", sampling.presence_penalty);
  read_float(reader, "frequency_penalty", sampling.frequency_penalty);
  read_float(reader, "repetition_penalty", sampling.repetition_penalty);
  read_logit_bias(reader, sampling);
  sampling.allowed_token_ids = reader.integers("allowed_token_ids");
  if (const auto seed = reader.integer("seed", INT64_MIN, INT64_MAX)) {
    sampling.seed = static_cast<uint64_t>(*seed);
  }
  read_int(reader, "min_tokens", sampling.min_tokens);
  read_bool(reader, "ignore_eos", sampling.ignore_eos);
  sampling.stop = reader.texts("stop");
  sampling.stop_token_ids = reader.integers("stop_token_ids");
  read_bool(reader, "include_stop_str_in_output", sampling.include_stop_str_in_output);
  read_bool(reader, "skip_special_tokens", sampling.skip_special_tokens);
  for (const std::string& stop : sampling.stop) {
    if (stop.empty()) reader.fail("stop", "an empty string ends nothing");
  }
}

void read_response_format(FieldReader& reader, GenerationRequest& request,
                          std::optional<ApiError>& error) {
  const Json* format = reader.object("response_format");
  if (format == nullptr) return;
  FieldReader fields(*format, "response_format.", error);
  const std::string type = fields.text("type").value_or("");
  if (type == "text") return;
  if (type == "json_object") {
    request.response_format = ResponseFormat::kJsonObject;
    return;
  }
  if (type != "json_schema") {
    fields.fail("type", fmt::format("expected text, json_object or json_schema, found '{}'", type));
    return;
  }
  request.response_format = ResponseFormat::kJsonSchema;
  const Json* wrapper = fields.object("json_schema");
  if (wrapper == nullptr) {
    fields.fail("json_schema", "expected an object with a name and a schema");
    return;
  }
  FieldReader schema(*wrapper, "response_format.json_schema.", error);
  const Json* body = schema.find("schema");
  if (body == nullptr || !(body->is_object() || body->is_boolean())) {
    schema.fail("schema", "expected a JSON schema");
    return;
  }
  request.schema_json = dump_json(*body);
}

// vLLM's extensions: structured_outputs {json, regex, choice}, and their older names.
void read_structured_outputs(FieldReader& reader, GenerationRequest& request,
                             std::optional<ApiError>& error) {
  const auto take = [&](FieldReader& fields, std::string_view prefix) {
    const std::string json_name = std::string(prefix) + "json";
    if (const Json* schema = fields.find(json_name)) {
      request.response_format = ResponseFormat::kJsonSchema;
      request.schema_json = schema->is_string() ? schema->get<std::string>() : dump_json(*schema);
    }
    request.regex = fields.text(std::string(prefix) + "regex").value_or(request.regex);
    const std::string choice_name = std::string(prefix) + "choice";
    if (fields.find(choice_name) != nullptr) request.choices = fields.texts(choice_name);
    const std::string grammar_name = std::string(prefix) + "grammar";
    if (fields.find(grammar_name) != nullptr) {
      fields.fail(grammar_name, "grammars are not supported; use a JSON schema, regex or choice");
    }
  };
  take(reader, "guided_");
  if (const Json* outputs = reader.object("structured_outputs")) {
    FieldReader fields(*outputs, "structured_outputs.", error);
    take(fields, "");
  }
  const int ways = (request.response_format != ResponseFormat::kText ? 1 : 0) +
                   (request.regex.empty() ? 0 : 1) + (request.choices.empty() ? 0 : 1);
  if (ways > 1) {
    reader.fail("structured_outputs", "give one of a JSON schema, a regex and a choice");
  }
}

void read_common(FieldReader& reader, GenerationRequest& request, std::optional<ApiError>& error) {
  request.model = reader.text("model").value_or("");
  request.user = reader.text("user").value_or("");
  request.cache_salt = reader.text("cache_salt").value_or("");
  read_int(reader, "priority", request.priority);
  // No page comes from another worker or is kept for one, whatever is in it.
  reader.object("kv_transfer_params");
  read_sampling(reader, request.sampling);
  read_bool(reader, "stream", request.stream);
  read_bool(reader, "echo", request.echo);
  read_bool(reader, "return_token_ids", request.return_token_ids);
  read_bool(reader, "return_tokens_as_token_ids", request.tokens_as_ids);
  if (const Json* options = reader.object("stream_options")) {
    if (!request.stream) reader.fail("stream_options", "only with stream: true");
    FieldReader fields(*options, "stream_options.", error);
    read_bool(fields, "include_usage", request.include_usage);
    read_bool(fields, "continuous_usage_stats", request.continuous_usage);
  }
  read_response_format(reader, request, error);
  read_structured_outputs(reader, request, error);
  if (reader.boolean("use_beam_search").value_or(false)) {
    reader.fail("use_beam_search", "beam search is not supported");
  }
  const auto prompt_logprobs = reader.integer("prompt_logprobs", 0, INT_MAX);
  if (prompt_logprobs) request.sampling.prompt_logprobs = static_cast<int>(*prompt_logprobs);
}

void read_prompts(FieldReader& reader, const RequestLimits& limits, GenerationRequest& request) {
  const Json* prompt = reader.find("prompt");
  constexpr std::string_view kExpected =
      "expected a string, an array of strings, an array of token ids or an array of such arrays";
  if (prompt == nullptr || !(prompt->is_string() || prompt->is_array()) || prompt->empty()) {
    reader.fail("prompt", kExpected);
    return;
  }
  const auto ids_of = [&](const Json& array) {
    std::vector<int32_t> ids;
    ids.reserve(array.size());
    for (const Json& item : array) {
      const bool is_id = item.is_number_integer() && item.get<int64_t>() >= 0 &&
                         item.get<int64_t>() < limits.sampling.vocab_size;
      if (!is_id) {
        reader.fail("prompt", fmt::format("expected token ids from 0 to {}, found {}",
                                          limits.sampling.vocab_size - 1, dump_json(item)));
        return std::vector<int32_t>();
      }
      ids.push_back(item.get<int32_t>());
    }
    return ids;
  };
  if (prompt->is_string()) {
    request.prompts.emplace_back(prompt->get<std::string>());
  } else if (prompt->front().is_number()) {
    request.prompts.emplace_back(ids_of(*prompt));
  } else {
    if (prompt->size() > limits.max_prompts) {
      reader.fail("prompt", fmt::format("{} prompts; expected at most {}", prompt->size(),
                                        limits.max_prompts));
      return;
    }
    for (const Json& item : *prompt) {
      if (item.is_string()) {
        request.prompts.emplace_back(item.get<std::string>());
      } else if (item.is_array() && !item.empty()) {
        request.prompts.emplace_back(ids_of(item));
      } else {
        reader.fail("prompt", kExpected);
        return;
      }
    }
  }
}

void check_sampling(FieldReader& reader, const RequestLimits& limits,
                    std::optional<ApiError>& error, const SamplingParams& sampling) {
  if (reader.failed()) return;
  if (const Status status = sampling.check(limits.sampling); !status) {
    error = to_api_error(status.error());
    // "FIELD is VALUE; ...": the field is the parameter.
    const std::string& message = status.error().message();
    error->param = message.substr(0, message.find_first_of(" ["));
  }
}

void read_tools(FieldReader& reader, GenerationRequest& request, std::optional<ApiError>& error) {
  const Json* tools = reader.find("tools");
  if (tools != nullptr && !tools->is_array()) {
    reader.fail("tools", "expected an array of tools");
    return;
  }
  const bool any = tools != nullptr && !tools->empty();
  const Json* choice = reader.find("tool_choice");
  if (any) {
    for (const Json& tool : *tools) {
      const bool is_function = tool.is_object() && tool.contains("function") &&
                               tool["function"].is_object() && tool["function"].contains("name") &&
                               tool["function"]["name"].is_string();
      if (!is_function) {
        reader.fail("tools",
                    "expected objects {\"type\": \"function\", \"function\": {\"name\", "
                    "\"description\", \"parameters\"}}");
        return;
      }
    }
    request.tools_json = dump_json(*tools);
    request.tool_choice = ToolChoice::kAuto;
  }
  read_bool(reader, "parallel_tool_calls", request.parallel_tool_calls);
  if (choice == nullptr) return;
  if (choice->is_object()) {
    FieldReader fields(*choice, "tool_choice.", error);
    const Json* function = fields.object("function");
    if (function == nullptr || !function->contains("name") || !(*function)["name"].is_string()) {
      fields.fail("function", "expected an object with the name of a tool");
      return;
    }
    request.tool_choice = ToolChoice::kNamed;
    request.tool_name = (*function)["name"].get<std::string>();
    bool named = false;
    for (const Json& tool : any ? *tools : Json::array()) {
      named |= tool["function"]["name"] == request.tool_name;
    }
    if (!named) {
      reader.fail("tool_choice", fmt::format("there is no tool '{}' in tools", request.tool_name));
    }
    return;
  }
  const std::string text = reader.text("tool_choice").value_or("auto");
  if (text == "none") {
    request.tool_choice = ToolChoice::kNone;
  } else if (text == "required") {
    request.tool_choice = ToolChoice::kRequired;
  } else if (text != "auto") {
    reader.fail("tool_choice", fmt::format("expected none, auto, required or an object that names "
                                           "a tool, found '{}'",
                                           text));
  }
  if (text == "required" && !any) reader.fail("tool_choice", "there are no tools to choose from");
}

// The text of a message's content.
std::optional<std::string> content_text(const Json& content, std::string& problem) {
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array()) {
    problem = "expected a string or an array of text parts";
    return std::nullopt;
  }
  std::string text;
  for (const Json& part : content) {
    const bool is_text = part.is_object() && part.value("type", Json()) == "text" &&
                         part.contains("text") && part["text"].is_string();
    if (!is_text && !part.is_string()) {
      problem = "only parts of type text are supported";
      return std::nullopt;
    }
    if (!text.empty()) text += '\n';
    text += part.is_string() ? part.get<std::string>() : part["text"].get<std::string>();
  }
  return text;
}

// Arguments come as the text of an object; templates print the object.
bool open_arguments(Json& calls) {
  if (!calls.is_array()) return false;
  for (Json& call : calls) {
    if (!call.is_object() || !call.contains("function") || !call["function"].is_object()) {
      return false;
    }
    Json& function = call["function"];
    if (!function.contains("arguments") || !function["arguments"].is_string()) continue;
    const auto text = function["arguments"].get<std::string>();
    Result<Json> arguments = text.empty() ? Result<Json>(Json::object()) : parse_json(text);
    if (arguments && arguments->is_object()) function["arguments"] = std::move(*arguments);
  }
  return true;
}

}  // namespace

Json read_messages(FieldReader& reader, const RequestLimits& limits) {
  const Json* given = reader.find("messages");
  if (given == nullptr || !given->is_array() || given->empty()) {
    reader.fail("messages", "expected an array of at least one message");
    return Json::array();
  }
  if (given->size() > limits.max_messages) {
    reader.fail("messages", fmt::format("{} messages; expected at most {}", given->size(),
                                        limits.max_messages));
    return Json::array();
  }
  Json messages = *given;
  for (size_t i = 0; i < messages.size(); ++i) {
    Json& message = messages[i];
    const auto wrong = [&](std::string_view what) {
      reader.fail("messages", fmt::format("message {}: {}", i, what));
      return Json::array();
    };
    if (!message.is_object() || !message.contains("role") || !message["role"].is_string()) {
      return wrong("expected an object with a role and a content");
    }
    const bool has_calls = message.contains("tool_calls") && !message["tool_calls"].is_null();
    if (has_calls && !open_arguments(message["tool_calls"])) {
      return wrong("tool_calls: expected an array of calls of functions");
    }
    if (!message.contains("content") || message["content"].is_null()) {
      if (message["role"] != "assistant") return wrong("it has no content");
      message["content"] = "";
      continue;
    }
    std::string problem;
    std::optional<std::string> text = content_text(message["content"], problem);
    if (!text) return wrong("content: " + problem);
    message["content"] = std::move(*text);
  }
  return messages;
}

ParsedRequest parse_completion(const Json& body, const RequestLimits& limits) {
  if (!body.is_object()) return ApiError{.message = "expected a JSON object"};
  std::optional<ApiError> error;
  FieldReader reader(body, "", error);
  GenerationRequest request;
  read_common(reader, request, error);
  read_prompts(reader, limits, request);
  read_bool(reader, "add_special_tokens", request.add_special_tokens);
  if (reader.find("suffix") != nullptr && !reader.text("suffix").value_or("x").empty()) {
    reader.fail("suffix", "text cannot be put in front of a suffix; leave it out");
  }
  const int64_t best_of = reader.integer("best_of", 0, INT_MAX).value_or(request.sampling.n);
  if (best_of != request.sampling.n) {
    reader.fail("best_of", "only as many as n; ask for more choices with n");
  }
  if (const auto logprobs = reader.integer("logprobs", 0, INT_MAX)) {
    request.logprobs = true;
    request.top_logprobs = static_cast<int>(*logprobs);
    request.sampling.logprobs = request.top_logprobs;
    if (request.echo) request.sampling.prompt_logprobs = request.top_logprobs;
  }
  const auto max_tokens = reader.integer("max_tokens", 0, INT_MAX);
  request.sampling.max_tokens = static_cast<int>(max_tokens.value_or(kDefaultCompletionTokens));
  if (request.sampling.max_tokens == 0 && !request.echo) {
    reader.fail("max_tokens", "0 is for scoring a prompt, together with echo: true");
  }
  check_sampling(reader, limits, error, request.sampling);
  if (error) return *error;
  return request;
}

ParsedRequest parse_chat(const Json& body, const RequestLimits& limits) {
  if (!body.is_object()) return ApiError{.message = "expected a JSON object"};
  std::optional<ApiError> error;
  FieldReader reader(body, "", error);
  GenerationRequest request;
  request.chat = true;
  read_common(reader, request, error);
  const Json messages = read_messages(reader, limits);
  request.messages_json = dump_json(messages);
  read_bool(reader, "add_generation_prompt", request.add_generation_prompt);
  if (const Json* variables = reader.object("chat_template_kwargs")) {
    request.variables_json = dump_json(*variables);
  }
  read_tools(reader, request, error);
  if (request.echo) reader.fail("echo", "only in /v1/completions");
  read_bool(reader, "logprobs", request.logprobs);
  if (const auto top = reader.integer("top_logprobs", 0, INT_MAX)) {
    request.top_logprobs = static_cast<int>(*top);
    if (!request.logprobs && *top > 0) reader.fail("top_logprobs", "only with logprobs: true");
  }
  if (request.logprobs) request.sampling.logprobs = request.top_logprobs;
  auto max_tokens = reader.integer("max_completion_tokens", 1, INT_MAX);
  if (!max_tokens) max_tokens = reader.integer("max_tokens", 1, INT_MAX);
  if (max_tokens) request.sampling.max_tokens = static_cast<int>(*max_tokens);
  check_sampling(reader, limits, error, request.sampling);
  if (error) return *error;
  return request;
}

}  // namespace kvant::serve::openai
