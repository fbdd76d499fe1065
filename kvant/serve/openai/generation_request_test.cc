#include "kvant/serve/openai/generation_request.h"

#include <gtest/gtest.h>

namespace kvant::serve::openai {
namespace {

const RequestLimits kLimits{.sampling = {.vocab_size = 1000}, .max_model_len = 100};

GenerationRequest good(const ParsedRequest& parsed) {
  const auto* error = std::get_if<ApiError>(&parsed);
  EXPECT_EQ(error, nullptr) << error->message;
  return error == nullptr ? std::get<GenerationRequest>(parsed) : GenerationRequest();
}
GenerationRequest completion(std::string_view text) {
  return good(parse_completion(*parse_json(text), kLimits));
}
GenerationRequest chat(std::string_view fields) {
  return good(parse_chat(*parse_json(R"({"messages": [{"role": "user", "content": "hi"}])" +
                                     std::string(fields) + "}"),
                         kLimits));
}
// The parameter that is blamed.
std::string blamed(const ParsedRequest& parsed) {
  const auto* error = std::get_if<ApiError>(&parsed);
  if (error == nullptr) return "nothing";
  EXPECT_EQ(error->status, 400);
  EXPECT_FALSE(error->message.empty());
  return error->param;
}
std::string wrong_completion(std::string_view fields) {
  return blamed(
      parse_completion(*parse_json(R"({"prompt": "x")" + std::string(fields) + "}"), kLimits));
}
std::string wrong_chat(std::string_view fields) {
  return blamed(parse_chat(*parse_json(R"({"messages": [{"role": "user", "content": "hi"}])" +
                                       std::string(fields) + "}"),
                           kLimits));
}

TEST(ParseCompletion, AllFormsOfPrompts) {
  using Ids = std::vector<int32_t>;
  EXPECT_EQ(std::get<std::string>(completion(R"({"prompt": "a"})").prompts.at(0)), "a");
  EXPECT_EQ(completion(R"({"prompt": ["a", "b"]})").prompts.size(), 2u);
  EXPECT_EQ(std::get<Ids>(completion(R"({"prompt": [1, 2]})").prompts.at(0)), (Ids{1, 2}));
  EXPECT_EQ(std::get<Ids>(completion(R"({"prompt": [[1], [2, 3]]})").prompts.at(1)), (Ids{2, 3}));
  for (const char* body :
       {R"({})", R"({"prompt": null})", R"({"prompt": 3})", R"({"prompt": []})",
        R"({"prompt": [[]]})", R"({"prompt": [1, "a"]})", R"({"prompt": [1000]})",
        R"({"prompt": [-1]})", R"({"prompt": ["a", 1]})", R"({"prompt": [1.5]})",
        R"({"prompt": {"a": 1}})"}) {
    EXPECT_EQ(blamed(parse_completion(*parse_json(body), kLimits)), "prompt") << body;
  }
  EXPECT_EQ(blamed(parse_completion(Json::array(), kLimits)), "");
}

TEST(ParseCompletion, DefaultsAreOpenAis) {
  const GenerationRequest request = completion(R"({"prompt": "a", "unknown": {"x": 1}})");
  EXPECT_EQ(request.sampling.max_tokens, 16);
  EXPECT_EQ(request.sampling.temperature, 1.0f);
  EXPECT_EQ(request.sampling.n, 1);
  EXPECT_FALSE(request.stream);
  EXPECT_FALSE(request.logprobs);
  EXPECT_FALSE(request.sampling.seed);
}

TEST(ParseCompletion, Fields) {
  const GenerationRequest request = completion(
      R"({"prompt": "a", "model": "m", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9,
          "top_k": 5, "min_p": 0.1, "seed": -3, "stop": ["x", "y"], "stop_token_ids": [4],
          "ignore_eos": true, "min_tokens": 2, "n": 3, "best_of": 3, "presence_penalty": 1,
          "frequency_penalty": -1, "repetition_penalty": 1.1, "logit_bias": {"5": -100},
          "logprobs": 2, "echo": true, "stream": true, "user": "u", "cache_salt": "s",
          "stream_options": {"include_usage": true, "continuous_usage_stats": true},
          "priority": -2, "return_token_ids": true, "suffix": null})");
  const SamplingParams& sampling = request.sampling;
  EXPECT_EQ(request.model, "m");
  EXPECT_EQ(sampling.max_tokens, 7);
  EXPECT_EQ(sampling.temperature, 0.5f);
  EXPECT_EQ(sampling.seed, static_cast<uint64_t>(-3));
  EXPECT_EQ(sampling.stop, (std::vector<std::string>{"x", "y"}));
  EXPECT_EQ(sampling.stop_token_ids, std::vector<int32_t>{4});
  EXPECT_TRUE(sampling.ignore_eos);
  EXPECT_EQ(sampling.n, 3);
  EXPECT_EQ(sampling.logit_bias.at(0), std::make_pair(5, -100.0f));
  EXPECT_EQ(sampling.logprobs, 2);
  EXPECT_EQ(sampling.prompt_logprobs, 2);
  EXPECT_TRUE(request.echo && request.stream && request.include_usage);
  EXPECT_TRUE(request.continuous_usage && request.return_token_ids);
  EXPECT_EQ(request.priority, -2);
  EXPECT_EQ(request.cache_salt, "s");
}

TEST(ParseCompletion, BlamesTheFieldThatIsWrong) {
  EXPECT_EQ(wrong_completion(R"(, "best_of": 2)"), "best_of");
  EXPECT_EQ(wrong_completion(R"(, "suffix": "x")"), "suffix");
  EXPECT_EQ(wrong_completion(R"(, "max_tokens": 0)"), "max_tokens");
  EXPECT_EQ(wrong_completion(R"(, "max_tokens": -1)"), "max_tokens");
  EXPECT_EQ(wrong_completion(R"(, "max_tokens": "7")"), "max_tokens");
  EXPECT_EQ(wrong_completion(R"(, "temperature": -1)"), "temperature");
  EXPECT_EQ(wrong_completion(R"(, "temperature": 1e300)"), "temperature");
  EXPECT_EQ(wrong_completion(R"(, "n": 0)"), "n");
  EXPECT_EQ(wrong_completion(R"(, "n": 1000000)"), "n");
  EXPECT_EQ(wrong_completion(R"(, "stop": 3)"), "stop");
  EXPECT_EQ(wrong_completion(R"(, "stop": [""])"), "stop");
  EXPECT_EQ(wrong_completion(R"(, "stream_options": {"include_usage": true})"), "stream_options");
  EXPECT_EQ(wrong_completion(R"(, "logit_bias": {"x": 1})"), "logit_bias");
  EXPECT_EQ(wrong_completion(R"(, "logit_bias": {"99999999999": 1})"), "logit_bias");
  EXPECT_EQ(wrong_completion(R"(, "logprobs": 100000)"), "logprobs");
  EXPECT_EQ(wrong_completion(R"(, "use_beam_search": true)"), "use_beam_search");
  EXPECT_EQ(wrong_completion(R"(, "kv_transfer_params": [])"), "kv_transfer_params");
  EXPECT_EQ(wrong_completion(R"(, "response_format": {"type": "yaml"})"), "response_format.type");
  EXPECT_EQ(wrong_completion(R"(, "max_tokens": 0, "echo": true)"), "nothing");
}

TEST(ParseChat, MaxTokensAndLogprobs) {
  EXPECT_EQ(chat("").sampling.max_tokens, std::nullopt);
  EXPECT_EQ(chat(R"(, "max_tokens": 5)").sampling.max_tokens, 5);
  EXPECT_EQ(chat(R"(, "max_tokens": 5, "max_completion_tokens": 6)").sampling.max_tokens, 6);
  EXPECT_EQ(chat(R"(, "logprobs": true)").sampling.logprobs, 0);
  EXPECT_EQ(chat(R"(, "logprobs": true, "top_logprobs": 4)").sampling.logprobs, 4);
  EXPECT_EQ(wrong_chat(R"(, "top_logprobs": 4)"), "top_logprobs");
  EXPECT_EQ(wrong_chat(R"(, "echo": true)"), "echo");
}

TEST(ParseChat, MessagesBecomeWhatTemplatesExpect) {
  const Json body = *parse_json(R"({"messages": [
      {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
      {"role": "assistant", "content": null, "tool_calls": [{"id": "c1", "type": "function",
          "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
      {"role": "tool", "tool_call_id": "c1", "content": "2"}]})");
  const GenerationRequest request = good(parse_chat(body, kLimits));
  const Json messages = *parse_json(request.messages_json);
  EXPECT_EQ(messages[0]["content"], "a\nb");
  EXPECT_EQ(messages[1]["content"], "");
  EXPECT_EQ(messages[1]["tool_calls"][0]["function"]["arguments"]["x"], 1);
  EXPECT_EQ(messages[2]["content"], "2");
}

TEST(ParseChat, WrongMessages) {
  for (const char* messages :
       {R"(null)", R"([])", R"("hi")", R"(["hi"])", R"([{"content": "x"}])",
        R"([{"role": "user"}])", R"([{"role": "user", "content": 3}])",
        R"([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])",
        R"([{"role": "assistant", "tool_calls": 3}])"}) {
    const Json body = *parse_json(R"({"messages": )" + std::string(messages) + "}");
    EXPECT_EQ(blamed(parse_chat(body, kLimits)), "messages") << messages;
  }
}

TEST(ParseChat, Tools) {
  const std::string tools = R"(, "tools": [{"type": "function", "function": {"name": "f"}}])";
  EXPECT_EQ(chat("").tool_choice, ToolChoice::kNone);
  EXPECT_EQ(chat(tools).tool_choice, ToolChoice::kAuto);
  EXPECT_EQ(chat(tools + R"(, "tool_choice": "none")").tool_choice, ToolChoice::kNone);
  EXPECT_EQ(chat(tools + R"(, "tool_choice": "required")").tool_choice, ToolChoice::kRequired);
  const GenerationRequest named =
      chat(tools + R"(, "tool_choice": {"type": "function", "function": {"name": "f"}})");
  EXPECT_EQ(named.tool_choice, ToolChoice::kNamed);
  EXPECT_EQ(named.tool_name, "f");
  EXPECT_EQ(wrong_chat(R"(, "tool_choice": "required")"), "tool_choice");
  EXPECT_EQ(wrong_chat(tools + R"(, "tool_choice": {"function": {"name": "g"}})"), "tool_choice");
  EXPECT_EQ(wrong_chat(tools + R"(, "tool_choice": "maybe")"), "tool_choice");
  EXPECT_EQ(wrong_chat(R"(, "tools": [{"name": "f"}])"), "tools");
}

TEST(ParseChat, FormsOfTheAnswer) {
  EXPECT_EQ(chat(R"(, "response_format": {"type": "text"})").response_format,
            ResponseFormat::kText);
  EXPECT_EQ(chat(R"(, "response_format": {"type": "json_object"})").response_format,
            ResponseFormat::kJsonObject);
  const GenerationRequest schema = chat(
      R"(, "response_format": {"type": "json_schema", "json_schema": {"name": "n",
          "schema": {"type": "object"}}})");
  EXPECT_EQ(schema.response_format, ResponseFormat::kJsonSchema);
  EXPECT_EQ(schema.schema_json, R"({"type":"object"})");
  EXPECT_EQ(chat(R"(, "structured_outputs": {"regex": "a+"})").regex, "a+");
  EXPECT_EQ(chat(R"(, "guided_choice": ["a", "b"])").choices.size(), 2u);
  EXPECT_EQ(wrong_chat(R"(, "response_format": {"type": "json_schema"})"),
            "response_format.json_schema");
  EXPECT_EQ(wrong_chat(R"(, "guided_regex": "a", "guided_choice": ["a"])"), "structured_outputs");
  EXPECT_EQ(wrong_chat(R"(, "guided_grammar": "a")"), "guided_grammar");
}

}  // namespace
}  // namespace kvant::serve::openai
