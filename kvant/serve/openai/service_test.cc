// The whole way: real sockets, the real engine, a small random model.
#include "kvant/serve/openai/service.h"

#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "kvant/model/testing/engine.h"
#include "kvant/model/testing/tiny_models.h"
#include "kvant/serve/http/server.h"
#include "kvant/serve/http/testing/client.h"

namespace kvant::serve::openai {
namespace {

using namespace std::chrono_literals;
using http::testing::Client;
using http::testing::Reply;
using model::testing::must;

constexpr std::string_view kTemplate =
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}";

template <typename Condition>
bool wait_for(Condition condition) {
  for (int i = 0; i < 1000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(10ms);
  }
  return false;
}

// The objects of an event stream; the last "data: " must be [DONE].
std::vector<Json> events(const std::string& body) {
  std::vector<Json> out;
  size_t at = 0;
  bool done = false;
  while (at < body.size()) {
    const size_t end = body.find("\n\n", at);
    EXPECT_NE(end, std::string::npos);
    if (end == std::string::npos) break;
    const std::string line = body.substr(at, end - at);
    at = end + 2;
    EXPECT_TRUE(line.starts_with("data: ")) << line;
    EXPECT_FALSE(done);
    done = line == "data: [DONE]";
    if (!done) out.push_back(*parse_json(line.substr(6)));
  }
  EXPECT_TRUE(done);
  return out;
}

class Latency : public ServiceObserver {
 public:
  void on_enqueued(double seconds) override {
    EXPECT_GE(seconds, 0);
    ++count;
  }
  std::atomic<int> count{0};
};

class OpenAiService : public ::testing::Test {
 protected:
  void start(const std::string& keys = {}, http::ServerOptions http = {},
             const std::function<void(EngineOptions&)>& adjust = {}) {
    file_ =
        model::testing::tiny_model("llama", {.vocab = 128, .context = 65536, .tokenizer = true});
    backend_ = must(backend::create_backend({.name = "cpu", .num_threads = 1}));
    auto source = must(model::ModelSource::parse(file_, "test"));
    tokenizer_.emplace(must(model::Tokenizer::create(*source->gguf())));
    model_ = must(model::Model::load(std::move(source), *backend_, {}));
    chat_.emplace(must(model::ChatTemplate::parse(kTemplate, "<s>", "</s>")));
    EngineOptions options;
    options.runtime = model::testing::small_runtime("4bit");
    options.runtime.context_tokens = 512;
    options.runtime.total_tokens = 4096;
    const auto ends = tokenizer_->end_of_generation();
    options.end_ids.assign(ends.begin(), ends.end());
    if (adjust) adjust(options);
    engine_ = must(Engine::create(*model_, options));
    ServiceOptions service;
    service.model_names = {"tiny", "alias"};
    service.version = "1.2.3";
    if (!keys.empty()) service.keys = must(ApiKeys::parse(keys));
    service_.emplace(ServedModel{&*engine_, &*tokenizer_, &*chat_}, std::move(service), &latency_);
    service_->add_page("GET", "/metrics", [](const http::HttpRequest&) {
      return http::HttpResponse{.content_type = "text/plain", .body = "x 1\n"};
    });
    http.port = 0;
    server_ = must(http::Server::start(http, service_->handler()));
  }
  // Answers of 30,000 tokens take seconds.
  static void long_answers(EngineOptions& options) {
    options.runtime.context_tokens = 32768;
    options.runtime.total_tokens = 40000;
  }
  // As `kvant serve` ends.
  void stop() {
    if (engine_) engine_->drain(0s);
    server_.reset();
    service_.reset();
    engine_.reset();
  }
  void TearDown() override { stop(); }

  Reply ask(std::string_view method, std::string_view target, const std::string& body = {},
            std::string_view headers = {}) const {
    Client client(server_->port());
    client.request(method, target, body, headers);
    Reply reply = client.reply(60'000);
    EXPECT_TRUE(reply.complete) << target << " " << body;
    return reply;
  }
  Json ask_json(std::string_view method, std::string_view target, const std::string& body = {},
                int status = 200) const {
    const Reply reply = ask(method, target, body);
    EXPECT_EQ(reply.status, status) << reply.body;
    const Result<Json> json = parse_json(reply.body);
    EXPECT_TRUE(json) << reply.body;
    return json ? *json : Json();
  }
  Json complete(const std::string& fields, int status = 200) const {
    return ask_json("POST", "/v1/completions",
                    R"({"prompt": "the quick brown fox", "temperature": 0, "ignore_eos": true, )" +
                        fields + "}",
                    status);
  }
  Json chat(const std::string& fields, int status = 200) const {
    return ask_json("POST", "/v1/chat/completions",
                    R"({"messages": [{"role": "user", "content": "hi"}], "temperature": 0,
                        "ignore_eos": true, )" +
                        fields + "}",
                    status);
  }

  std::vector<std::byte> file_;
  std::unique_ptr<backend::Backend> backend_;
  std::optional<model::Tokenizer> tokenizer_;
  std::unique_ptr<model::Model> model_;
  std::optional<model::ChatTemplate> chat_;
  std::unique_ptr<Engine> engine_;
  Latency latency_;
  std::optional<Service> service_;
  std::unique_ptr<http::Server> server_;
};

TEST_F(OpenAiService, SmallPages) {
  start();
  EXPECT_EQ(ask_json("GET", "/health")["status"], "ok");
  EXPECT_EQ(ask_json("GET", "/version")["version"], "1.2.3");
  EXPECT_EQ(ask_json("GET", "/ping")["status"], "ok");
  EXPECT_EQ(ask_json("GET", "/load")["server_load"], 0);
  EXPECT_EQ(ask("GET", "/metrics").body, "x 1\n");
  const Json models = ask_json("GET", "/v1/models");
  EXPECT_EQ(models["data"].size(), 2u);
  EXPECT_EQ(models["data"][0]["id"], "tiny");
  EXPECT_EQ(models["data"][0]["max_model_len"], 512);
  EXPECT_EQ(ask_json("GET", "/v1/models/alias")["id"], "alias");
  EXPECT_EQ(ask_json("GET", "/v1/models/x", {}, 404)["error"]["code"], "model_not_found");
  EXPECT_EQ(ask_json("GET", "/nothing", {}, 404)["error"]["type"], "not_found_error");
  EXPECT_EQ(ask("GET", "/v1/completions").status, 405);
  EXPECT_EQ(ask_json("POST", "/reset_prefix_cache")["status"], "ok");
}

TEST_F(OpenAiService, Completions) {
  start();
  const Json json = complete(R"("max_tokens": 8)");
  EXPECT_EQ(json["object"], "text_completion");
  EXPECT_EQ(json["model"], "tiny");
  EXPECT_EQ(json["choices"].size(), 1u);
  EXPECT_EQ(json["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(json["usage"]["completion_tokens"], 8);
  const int64_t prompt = json["usage"]["prompt_tokens"].get<int64_t>();
  EXPECT_EQ(json["usage"]["total_tokens"], prompt + 8);
  EXPECT_EQ(json["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
  EXPECT_EQ(latency_.count, 1);
  // Greedy again, now from the cache: full pages of 16 tokens of the prompt.
  const Json again = complete(R"("max_tokens": 8, "model": "alias")");
  EXPECT_EQ(again["choices"][0]["text"], json["choices"][0]["text"]);
  EXPECT_EQ(again["usage"]["prompt_tokens_details"]["cached_tokens"], (prompt - 1) / 16 * 16);
  EXPECT_EQ(again["model"], "alias");
}

TEST_F(OpenAiService, ManyPromptsAndChoices) {
  start();
  const Json json = ask_json(
      "POST", "/v1/completions",
      R"({"prompt": ["one", [5, 6, 7]], "n": 2, "max_tokens": 3, "seed": 1, "ignore_eos": true,
          "return_token_ids": true})");
  ASSERT_EQ(json["choices"].size(), 4u);
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(json["choices"][i]["index"], i);
    EXPECT_EQ(json["choices"][i]["token_ids"].size(), 3u);
  }
  EXPECT_EQ(json["choices"][2]["prompt_token_ids"], (Json{5, 6, 7}));
  EXPECT_NE(json["choices"][2]["token_ids"], json["choices"][3]["token_ids"]);
  EXPECT_EQ(json["usage"]["prompt_tokens"], 6);
  EXPECT_EQ(json["usage"]["completion_tokens"], 12);
}

TEST_F(OpenAiService, StreamsSayTheSameAsWholeResponses) {
  start();
  const Json whole = complete(R"("max_tokens": 12, "logprobs": 2, "return_token_ids": true)");
  const std::string body =
      R"({"prompt": "the quick brown fox", "temperature": 0, "ignore_eos": true, "max_tokens": 12,
          "logprobs": 2, "return_token_ids": true, "stream": true,
          "stream_options": {"include_usage": true, "continuous_usage_stats": true}})";
  const Reply reply = ask("POST", "/v1/completions", body);
  EXPECT_EQ(reply.header("Content-Type"), "text/event-stream");
  const std::vector<Json> chunks = events(reply.body);
  std::string text;
  Json ids = Json::array();
  Json logprobs = Json::array();
  for (size_t i = 0; i + 1 < chunks.size(); ++i) {
    const Json& choice = chunks[i]["choices"][0];
    text += choice["text"].get<std::string>();
    for (const Json& id : choice["token_ids"]) ids.push_back(id);
    if (!choice["logprobs"].is_null()) {
      for (const Json& value : choice["logprobs"]["token_logprobs"]) logprobs.push_back(value);
    }
    EXPECT_EQ(choice["finish_reason"].is_null(), i + 2 < chunks.size());
    EXPECT_TRUE(chunks[i].contains("usage"));
  }
  const Json& choice = whole["choices"][0];
  EXPECT_EQ(text, choice["text"].get<std::string>());
  EXPECT_EQ(ids, choice["token_ids"]);
  EXPECT_EQ(logprobs.size(), choice["logprobs"]["token_logprobs"].size());
  EXPECT_EQ(chunks.back()["choices"], Json::array());
  EXPECT_EQ(chunks.back()["usage"]["completion_tokens"], 12);
}

TEST_F(OpenAiService, Chat) {
  start();
  const Json json = chat(R"("max_tokens": 5, "logprobs": true, "top_logprobs": 3)");
  EXPECT_EQ(json["object"], "chat.completion");
  const Json& choice = json["choices"][0];
  EXPECT_EQ(choice["message"]["role"], "assistant");
  ASSERT_EQ(choice["logprobs"]["content"].size(), 5u);
  EXPECT_EQ(choice["logprobs"]["content"][0]["top_logprobs"].size(), 3u);
  EXPECT_LE(choice["logprobs"]["content"][0]["logprob"].get<double>(), 0.0);
  const std::string prompt = "user: hi\nassistant: ";
  EXPECT_EQ(json["usage"]["prompt_tokens"], must(tokenizer_->encode(prompt)).size());

  const Reply stream = ask("POST", "/v1/chat/completions",
                           R"({"messages": [{"role": "user", "content": "hi"}], "temperature": 0,
                               "ignore_eos": true, "max_tokens": 5, "stream": true})");
  const std::vector<Json> chunks = events(stream.body);
  EXPECT_EQ(chunks[0]["choices"][0]["delta"]["role"], "assistant");
  EXPECT_FALSE(chunks[0].contains("usage"));
  std::string text;
  for (const Json& chunk : chunks) {
    EXPECT_EQ(chunk["object"], "chat.completion.chunk");
    text += chunk["choices"][0]["delta"].value("content", "");
  }
  EXPECT_EQ(text, choice["message"]["content"].get<std::string>());
  EXPECT_EQ(chunks.back()["choices"][0]["finish_reason"], "length");
}

TEST_F(OpenAiService, StopStringsEndTheTextBeforeThem) {
  start();
  const std::string text = complete(R"("max_tokens": 40)")["choices"][0]["text"];
  ASSERT_GE(text.size(), 6u);
  const std::string stop = text.substr(4, 2);
  const size_t at = text.find(stop);
  const Json json = complete(R"("max_tokens": 40, "stop": )" + quote_json(stop));
  EXPECT_EQ(json["choices"][0]["text"], text.substr(0, at));
  EXPECT_EQ(json["choices"][0]["finish_reason"], "stop");
  EXPECT_EQ(json["choices"][0]["stop_reason"], stop);
  const Json shown = complete(R"("max_tokens": 40, "include_stop_str_in_output": true, "stop": )" +
                              quote_json(stop));
  EXPECT_EQ(shown["choices"][0]["text"], text.substr(0, at + stop.size()));
}

// What lm-eval's loglikelihood asks for.
TEST_F(OpenAiService, EchoWithLogprobsScoresThePrompt) {
  start();
  const Json json = ask_json("POST", "/v1/completions",
                             R"({"prompt": [[40, 41, 42, 43], [50, 51]], "max_tokens": 1,
                                 "temperature": 0, "logprobs": 1, "echo": true, "seed": 1})");
  ASSERT_EQ(json["choices"].size(), 2u);
  const Json& logprobs = json["choices"][0]["logprobs"];
  ASSERT_EQ(logprobs["tokens"].size(), 5u);
  ASSERT_EQ(logprobs["token_logprobs"].size(), 5u);
  EXPECT_TRUE(logprobs["token_logprobs"][0].is_null());
  EXPECT_TRUE(logprobs["top_logprobs"][0].is_null());
  for (int i = 1; i < 5; ++i) {
    const std::string token = logprobs["tokens"][i];
    EXPECT_EQ(logprobs["top_logprobs"][i][token], logprobs["token_logprobs"][i]);
    EXPECT_LT(logprobs["token_logprobs"][i].get<double>(), 0.0);
  }
  EXPECT_EQ(logprobs["text_offset"], (Json{0, 1, 2, 3, 4}));
  // A prompt that is only scored.
  const Json scored = ask_json("POST", "/v1/completions",
                               R"({"prompt": [40, 41, 42, 43], "max_tokens": 0, "logprobs": 1,
                                   "echo": true})");
  EXPECT_EQ(scored["choices"][0]["logprobs"]["tokens"].size(), 4u);
  for (int i = 1; i < 4; ++i) {
    EXPECT_NEAR(scored["choices"][0]["logprobs"]["token_logprobs"][i].get<double>(),
                logprobs["token_logprobs"][i].get<double>(), 1e-4);
  }
  EXPECT_EQ(scored["usage"]["completion_tokens"], 0);
  const Json ids =
      complete(R"("max_tokens": 1, "logprobs": 1, "return_tokens_as_token_ids": true)");
  EXPECT_TRUE(
      ids["choices"][0]["logprobs"]["tokens"][0].get<std::string>().starts_with("token_id:"));
}

TEST_F(OpenAiService, TheFormOfTheAnswer) {
  start();
  const Json object = complete(
      R"("max_tokens": 200, "response_format": {"type": "json_schema", "json_schema": {"name": "n",
          "schema": {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99,
              "minimum": 0}, "ok": {"type": "boolean"}}, "required": ["n", "ok"]}}})");
  const std::string text = object["choices"][0]["text"];
  const Result<Json> parsed = parse_json(text);
  ASSERT_TRUE(parsed) << text;
  EXPECT_TRUE((*parsed)["n"].is_number_integer()) << text;
  EXPECT_TRUE((*parsed)["ok"].is_boolean()) << text;
  EXPECT_EQ(object["choices"][0]["finish_reason"], "stop");
  const Json choice = chat(R"("structured_outputs": {"choice": ["maybe", "never"]})");
  const std::string word = choice["choices"][0]["message"]["content"];
  EXPECT_TRUE(word == "maybe" || word == "never") << word;
  const Json regex = complete(R"("max_tokens": 50, "guided_regex": "[0-9]{4}-[a-f]{2}")");
  EXPECT_EQ(regex["choices"][0]["text"].get<std::string>().size(), 7u);
  EXPECT_EQ(complete(R"("guided_regex": "(")", 400)["error"]["param"], "structured_outputs");
  EXPECT_EQ(complete(R"("guided_json": {"type": "thing"})", 400)["error"]["param"],
            "response_format");
}

TEST_F(OpenAiService, ToolCalls) {
  start({}, {}, [](EngineOptions& options) {
    options.runtime.context_tokens = 4096;
    options.runtime.total_tokens = 8192;
  });
  const std::string fields =
      R"("max_tokens": 400, "tools": [{"type": "function", "function": {"name": "weather",
          "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]},
              "days": {"type": "integer", "minimum": 1, "maximum": 9}},
              "required": ["city", "days"]}}}], "parallel_tool_calls": false, "tool_choice": )";
  for (const char* choice :
       {R"("required")", R"({"type": "function", "function": {"name": "weather"}})"}) {
    const Json whole = chat(fields + choice);
    EXPECT_EQ(whole["choices"][0]["finish_reason"], "tool_calls");
    const Json& message = whole["choices"][0]["message"];
    EXPECT_TRUE(message["content"].is_null());
    ASSERT_EQ(message["tool_calls"].size(), 1u) << message;
    const Json& call = message["tool_calls"][0];
    EXPECT_EQ(call["type"], "function");
    EXPECT_FALSE(call["id"].get<std::string>().empty());
    EXPECT_EQ(call["function"]["name"], "weather");
    const Json arguments = *parse_json(call["function"]["arguments"].get<std::string>());
    EXPECT_TRUE(arguments["city"] == "Rome" || arguments["city"] == "Oslo") << arguments;

    const Reply reply = ask("POST", "/v1/chat/completions",
                            R"({"messages": [{"role": "user", "content": "hi"}], "stream": true,
                                "temperature": 0, "ignore_eos": true, )" +
                                fields + choice + "}");
    std::string name, text, reason;
    for (const Json& chunk : events(reply.body)) {
      const Json& delta = chunk["choices"][0]["delta"];
      EXPECT_EQ(delta.value("content", ""), "");
      for (const Json& part : delta.value("tool_calls", Json::array())) {
        EXPECT_EQ(part["index"], 0);
        name += part["function"].value("name", "");
        text += part["function"].value("arguments", "");
      }
      if (!chunk["choices"][0]["finish_reason"].is_null()) {
        reason = chunk["choices"][0]["finish_reason"];
      }
    }
    EXPECT_EQ(name, "weather");
    EXPECT_EQ(text, call["function"]["arguments"].get<std::string>());
    EXPECT_EQ(reason, "tool_calls");
  }
  const Json none = chat(fields + R"("none")");
  EXPECT_FALSE(none["choices"][0]["message"].contains("tool_calls"));
}

TEST_F(OpenAiService, TokenizeAndDetokenize) {
  start();
  const Json json =
      ask_json("POST", "/tokenize", R"({"prompt": "the", "return_token_strs": true})");
  EXPECT_EQ(json["count"], 2);
  EXPECT_EQ(json["token_strs"][0], "th");
  EXPECT_EQ(json["max_model_len"], 512);
  const Json back = ask_json("POST", "/detokenize", Json{{"tokens", json["tokens"]}}.dump());
  EXPECT_EQ(back["prompt"], "the");
  const Json messages =
      ask_json("POST", "/tokenize", R"({"messages": [{"role": "user", "content": "x"}]})");
  EXPECT_EQ(messages["count"], must(tokenizer_->encode("user: x\nassistant: ")).size());
  const Json info = ask_json("GET", "/tokenizer_info");
  EXPECT_EQ(info["vocab_size"], tokenizer_->vocabulary_size());
  EXPECT_EQ(info["eos_token"], tokenizer_->token_text(*tokenizer_->eos()));
  EXPECT_TRUE(info["chat_template"].is_string());
  ask_json("POST", "/tokenize", "{}", 400);
  ask_json("POST", "/detokenize", R"({"tokens": [100000]})", 400);
  ask_json("POST", "/detokenize", "[]", 400);
}

TEST_F(OpenAiService, WrongRequestsAre400) {
  start();
  const std::string deep = std::string(10'000, '[') + std::string(10'000, ']');
  for (const std::string& body :
       {std::string("{"), std::string("\"\xff\""), deep, std::string("[]"), std::string(),
        std::string(R"({"prompt": "\ud800"})"), std::string(R"({"prompt": ")") + "\xc3\x28\"}"}) {
    for (const char* path :
         {"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"}) {
      const Json json = ask_json("POST", path, body, 400);
      EXPECT_TRUE(json["error"]["message"].is_string());
    }
  }
  EXPECT_EQ(complete(R"("max_tokens": 1, "model": "gpt")", 404)["error"]["code"],
            "model_not_found");
  EXPECT_EQ(complete(R"("max_tokens": 1000)", 400)["error"]["code"], "context_length_exceeded");
  const Json empty = ask_json("POST", "/v1/completions", R"({"prompt": ""})", 400);
  EXPECT_EQ(empty["error"]["param"], "prompt");
  const std::string long_prompt = R"({"prompt": ")" + std::string(2'000'000, 'x') + "\"}";
  EXPECT_EQ(ask_json("POST", "/v1/completions", long_prompt, 400)["error"]["param"], "prompt");
  Client client(server_->port());
  client.send(
      "POST /v1/completions HTTP/1.1\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}");
  EXPECT_EQ(client.reply().status, 415);
}

TEST_F(OpenAiService, APromptOfTenMegabytesIs413) {
  start();
  EXPECT_EQ(
      ask("POST", "/v1/completions", R"({"prompt": ")" + std::string(10 << 20, 'x') + "\"}").status,
      413);
}

TEST_F(OpenAiService, KeysGuardAndSaltsSeparate) {
  start("sk-a alice salt1\nsk-b bob salt2\nsk-c carol salt1\n");
  const std::string body =
      R"({"prompt": ")" + std::string(80, 'x') + R"(", "max_tokens": 1, "temperature": 0})";
  for (const char* path : {"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize",
                           "/reset_prefix_cache"}) {
    EXPECT_EQ(ask("POST", path, body).status, 401) << path;
    EXPECT_EQ(ask("POST", path, body, "Authorization: Bearer sk-x\r\n").status, 401) << path;
  }
  EXPECT_EQ(ask("GET", "/v1/models").status, 401);
  EXPECT_EQ(ask("GET", "/tokenizer_info").status, 401);
  EXPECT_EQ(ask("GET", "/v1/models/tiny").status, 401);
  EXPECT_EQ(ask("GET", "/health").status, 200);
  const auto cached = [&](const char* key) {
    const Reply reply =
        ask("POST", "/v1/completions", body, std::string("Authorization: Bearer ") + key + "\r\n");
    EXPECT_EQ(reply.status, 200) << reply.body;
    return (*parse_json(reply.body))["usage"]["prompt_tokens_details"]["cached_tokens"]
        .get<int64_t>();
  };
  EXPECT_EQ(cached("sk-a"), 0);
  EXPECT_EQ(cached("sk-b"), 0);
  EXPECT_EQ(cached("sk-a"), 64);
  EXPECT_EQ(cached("sk-b"), 64);
  EXPECT_EQ(cached("sk-c"), 64);  // shares the salt of alice
}

TEST_F(OpenAiService, CacheSaltSeparatesRequests) {
  start();
  const auto cached = [&](const std::string& salt) {
    return ask_json("POST", "/v1/completions",
                    R"({"prompt": ")" + std::string(80, 'x') + R"(", "max_tokens": 1, )" +
                        R"("cache_salt": )" + quote_json(salt) +
                        "}")["usage"]["prompt_tokens_details"]["cached_tokens"]
        .get<int64_t>();
  };
  EXPECT_EQ(cached("a"), 0);
  EXPECT_EQ(cached("b"), 0);
  EXPECT_EQ(cached("a"), 64);
  EXPECT_EQ(cached(""), 0);
}

// A router of separate prefill and decode workers gets the answer, and learns that nothing is kept.
TEST_F(OpenAiService, KvTransferParamsTransferNothing) {
  start();
  const std::string remote =
      R"("max_tokens": 8, "kv_transfer_params": {"do_remote_prefill": true, "do_remote_decode": )"
      R"(false, "remote_engine_id": "e", "remote_block_ids": [1, 2], "remote_host": "h", )"
      R"("remote_port": 5600, "tp_size": 1})";
  const Json plain = complete(R"("max_tokens": 8)");
  const Json json = complete(remote);
  EXPECT_EQ(json["choices"][0]["text"], plain["choices"][0]["text"]);
  for (const Json& response : {plain, json, complete(R"("kv_transfer_params": null)")}) {
    ASSERT_TRUE(response.contains("kv_transfer_params"));
    EXPECT_TRUE(response["kv_transfer_params"].is_null());
  }
  for (const char* wrong : {"[]", "true", "\"x\"", "1"}) {
    const Json error = complete(R"("kv_transfer_params": )" + std::string(wrong), 400);
    EXPECT_EQ(error["error"]["param"], "kv_transfer_params");
  }
}

TEST_F(OpenAiService, AClientThatLeavesFreesItsPages) {
  start({}, {}, long_answers);
  for (const bool stream : {true, false}) {
    const int64_t before = engine_->stats().generation_tokens;
    Client client(server_->port());
    client.request("POST", "/v1/completions",
                   std::string(R"({"prompt": "abc", "max_tokens": 30000, "ignore_eos": true, )") +
                       R"("stream": )" + (stream ? "true" : "false") + "}");
    EXPECT_TRUE(wait_for([&] { return engine_->stats().running == 1; }));
    if (stream) {
      EXPECT_TRUE(client.receive_until("data: "));
    }
    client.close();
    EXPECT_TRUE(wait_for([&] {
      const EngineStats stats = engine_->stats();
      return stats.running == 0 && stats.pages_used == 0;
    }));
    EXPECT_LT(engine_->stats().generation_tokens - before, 30000);
  }
  EXPECT_TRUE(wait_for([&] { return ask_json("GET", "/load")["server_load"] == 0; }));
}

TEST_F(OpenAiService, AFullQueueIs429) {
  start({}, {}, [](EngineOptions& options) {
    long_answers(options);
    options.runtime.max_sequences = 1;
    options.max_waiting = 1;
  });
  std::vector<std::unique_ptr<Client>> clients;
  for (int i = 0; i < 2; ++i) {
    clients.push_back(std::make_unique<Client>(server_->port()));
    clients.back()->request("POST", "/v1/completions",
                            R"({"prompt": "abc", "max_tokens": 30000, "ignore_eos": true})");
    EXPECT_TRUE(wait_for([&] {
      const EngineStats stats = engine_->stats();
      return stats.running == 1 && stats.waiting == i;
    }));
  }
  const Reply reply = ask("POST", "/v1/completions", R"({"prompt": "abc"})");
  EXPECT_EQ(reply.status, 429);
  EXPECT_EQ(reply.header("Retry-After"), "1");
  EXPECT_EQ((*parse_json(reply.body))["error"]["type"], "rate_limit_error");
}

TEST_F(OpenAiService, ADrainFinishesStreamsAndRefusesNewRequests) {
  start();
  Client client(server_->port());
  client.request("POST", "/v1/completions",
                 R"({"prompt": "abc", "max_tokens": 200, "ignore_eos": true, "stream": true})");
  Client other(server_->port());
  EXPECT_TRUE(client.receive_until("data: "));
  std::thread drain([&] { engine_->drain(60s); });
  EXPECT_TRUE(wait_for([&] { return engine_->draining(); }));
  other.request("GET", "/health");
  EXPECT_EQ(other.reply().status, 503);
  other.request("POST", "/v1/completions", R"({"prompt": "abc"})");
  EXPECT_EQ(other.reply().status, 503);
  const Reply reply = client.reply(60'000);
  drain.join();
  EXPECT_TRUE(reply.complete);
  EXPECT_EQ(events(reply.body).back()["choices"][0]["finish_reason"], "length");
}

TEST_F(OpenAiService, ADrainThatRunsOutOfTimeSaysSo) {
  start({}, {}, long_answers);
  Client stream(server_->port());
  const std::string body = R"({"prompt": "abc", "max_tokens": 15000, "ignore_eos": true)";
  stream.request("POST", "/v1/completions", body + R"(, "stream": true})");
  Client whole(server_->port());
  whole.request("POST", "/v1/completions", body + "}");
  EXPECT_TRUE(wait_for([&] { return engine_->stats().running == 2; }));
  engine_->drain(0s);
  EXPECT_EQ(whole.reply().status, 503);
  const std::vector<Json> chunks = events(stream.reply().body);
  EXPECT_TRUE(chunks.back().contains("error"));
}

TEST_F(OpenAiService, ManyStreamsWithClientsThatLeave) {
  start({}, {}, [](EngineOptions& options) { options.runtime.max_sequences = 4; });
  std::atomic<int> good{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 6; ++i) {
        Client client(server_->port());
        client.request("POST", "/v1/chat/completions",
                       R"({"messages": [{"role": "user", "content": "hello there"}], "n": 2,
                           "max_tokens": 20, "ignore_eos": true, "stream": true})");
        if ((t + i) % 3 == 0) {
          client.receive_until("data: ");
          continue;
        }
        const Reply reply = client.reply(60'000);
        if (reply.complete && reply.body.ends_with("data: [DONE]\n\n")) ++good;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(good, 32);
  EXPECT_TRUE(wait_for([&] {
    const EngineStats stats = engine_->stats();
    return stats.running == 0 && stats.waiting == 0 && stats.pages_used == 0;
  }));
  EXPECT_TRUE(wait_for([&] { return ask_json("GET", "/load")["server_load"] == 0; }));
}

}  // namespace
}  // namespace kvant::serve::openai
