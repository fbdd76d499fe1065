#include "kvant/serve/openai/service.h"

#include <fmt/format.h>

#include <algorithm>
#include <ctime>
#include <random>

#include "kvant/base/check.h"

namespace kvant::serve::openai {
namespace {

using http::HttpRequest;
using http::HttpResponse;

constexpr std::string_view kModelPrefix = "/v1/models/";

HttpResponse json_response(const Json& json) {
  return {.body = dump_json(json)};
}

// Browsers do not send this type to another site without asking it first, so that a web page
// cannot use a server that only its visitor reaches.
bool is_json_type(std::string_view type) {
  return type.empty() || type.starts_with("application/json");
}

bool demands_call(const GenerationRequest& request) {
  return request.tool_choice == ToolChoice::kRequired || request.tool_choice == ToolChoice::kNamed;
}

// For models whose template says nothing of tools: what Hermes' format looks like.
std::string tools_in_words(std::string_view tools_json) {
  return fmt::format(
      "You may call functions. These are their signatures, in JSON:\n<tools>\n{}\n</tools>\n"
      "To call one, answer with its name and arguments as JSON in these tags:\n"
      "<tool_call>\n{{\"name\": \"...\", \"arguments\": {{...}}}}\n</tool_call>",
      tools_json);
}

// `messages` (a JSON array) with `text` at the end of the system message, or as one.
std::string with_system_text(const std::string& messages_json, const std::string& text) {
  Json messages = Json::parse(messages_json);
  if (messages[0].value("role", "") == "system") {
    messages[0]["content"] = messages[0].value("content", "") + "\n\n" + text;
  } else {
    messages.insert(messages.begin(), Json{{"role", "system"}, {"content", text}});
  }
  return dump_json(messages);
}

// Answers a body that is a JSON object with what `read` makes of its fields, or with the error.
template <typename Read>
void answer_object(const HttpRequest& request, http::ResponseWriter& writer, const Read& read) {
  const Result<Json> body = parse_json(request.body);
  std::optional<ApiError> error;
  Json json;
  if (!body) {
    error = to_api_error(body.error());
  } else if (!body->is_object()) {
    error = ApiError{.message = "expected a JSON object"};
  } else {
    FieldReader reader(*body, "", error);
    json = read(reader, error);
  }
  writer.send(error ? error_response(*error) : json_response(json));
}

double seconds_since(http::Clock::time_point time) {
  return std::chrono::duration<double>(http::Clock::now() - time).count();
}

}  // namespace

Service::Service(const ServedModel& served, ServiceOptions options, ServiceObserver* observer)
    : served_(served),
      options_(std::move(options)),
      observer_(observer),
      started_(std::time(nullptr)),
      constraints_(grammar::Vocabulary::create(*served_.tokenizer)),
      tasks_(options_.task_threads, options_.max_queued_tasks) {
  KVANT_CHECK(!options_.model_names.empty(), "a served model has a name");
  limits_.sampling = served_.engine->limits();
  limits_.sampling.vocab_size = served_.tokenizer->vocabulary_size();
  limits_.max_model_len = served_.engine->options().runtime.context_tokens;
  for (int32_t id = 0; id < served_.tokenizer->vocabulary_size(); ++id) {
    longest_token_ = std::max(longest_token_, served_.tokenizer->token_bytes(id).size());
  }
  if (served_.chat != nullptr) {
    template_knows_tools_ = template_knows_tools(served_.chat->source());
    if (template_knows_tools_) tool_calls_ = tool_call_style_of(served_.chat->source());
  }
  tool_calls_ = options_.tool_calls.value_or(tool_calls_);
  std::random_device random;
  next_tool_seed_ = (uint64_t{random()} << 32) | random();
  generations_.engine = served_.engine;
  generations_.tokenizer = served_.tokenizer;
  generations_.tasks = &tasks_;

  const auto add = [this](std::string method, std::string path, bool guarded, bool may_take_long,
                          Action action) {
    routes_.push_back(
        {std::move(method), std::move(path), guarded, may_take_long, action, nullptr});
  };
  add("POST", "/v1/chat/completions", true, true, &Service::chat);
  add("POST", "/v1/completions", true, true, &Service::complete);
  add("GET", "/v1/models", true, false, &Service::models);
  add("POST", "/tokenize", true, true, &Service::tokenize);
  add("POST", "/detokenize", true, true, &Service::detokenize);
  add("GET", "/tokenizer_info", true, false, &Service::tokenizer_info);
  add("POST", "/reset_prefix_cache", true, false, &Service::reset_prefix_cache);
  add("GET", "/health", false, false, &Service::health);
  add("GET", "/ping", false, false, &Service::ping);
  add("POST", "/ping", false, false, &Service::ping);
  add("GET", "/version", false, false, &Service::version);
  add("GET", "/load", false, false, &Service::load);
}

Service::~Service() = default;

void Service::add_page(std::string method, std::string path, Page page, bool guarded) {
  routes_.push_back({std::move(method), std::move(path), guarded, false, nullptr, std::move(page)});
}

http::Handler Service::handler() {
  return [this](RequestPtr request, WriterPtr writer) {
    handle(std::move(request), std::move(writer));
  };
}

const Service::Route* Service::find_route(std::string_view method, std::string_view path,
                                          ApiError& error) const {
  if (path.starts_with(kModelPrefix)) path = "/v1/models";
  if (method == "HEAD") method = "GET";
  bool path_known = false;
  for (const Route& route : routes_) {
    if (route.path != path) continue;
    path_known = true;
    if (route.method == method) return &route;
  }
  if (path_known) {
    error = {.status = 405, .message = fmt::format("{} is not for {}", path, method)};
  } else {
    error = {.status = 404, .message = fmt::format("there is nothing at {}", path)};
  }
  return nullptr;
}

void Service::handle(RequestPtr request, WriterPtr writer) {
  ApiError error;
  const Route* route = find_route(request->method, request->path, error);
  if (route == nullptr) {
    writer->send(error_response(error));
    return;
  }
  std::optional<Tenant> tenant = Tenant{};
  if (route->guarded) tenant = options_.keys.check(request->header("Authorization"));
  if (!tenant) {
    writer->send(error_response(
        {.status = 401,
         .message = "this needs a key that the server knows: Authorization: Bearer KEY",
         .code = "invalid_api_key"}));
    return;
  }
  if (request->method == "POST" && !request->body.empty() &&
      !is_json_type(request->header("Content-Type"))) {
    writer->send(error_response(
        {.status = 415, .message = "expected the header Content-Type: application/json"}));
    return;
  }
  // Schemas and tools are compiled, which takes longer than reading them.
  const bool is_long = request->body.size() > options_.inline_bytes ||
                       request->body.find("schema") != std::string::npos ||
                       request->body.find("\"tools\"") != std::string::npos;
  if (!route->may_take_long || !is_long) {
    run(*route, request, *tenant, writer);
    return;
  }
  const bool taken = tasks_.post([this, route, request, tenant = *std::move(tenant), writer] {
    run(*route, request, tenant, writer);
  });
  if (!taken) {
    writer->send(error_response({.status = 503,
                                 .message = "too many requests wait to be read; try again later",
                                 .retry_after_seconds = 1}));
  }
}

void Service::run(const Route& route, const RequestPtr& request, const Tenant& tenant,
                  const WriterPtr& writer) {
  try {
    if (route.action == nullptr) {
      writer->send(route.page(*request));
    } else {
      (this->*route.action)(request, tenant, writer);
    }
  } catch (const std::exception& exception) {
    writer->send(error_response({.status = 500, .message = exception.what()}));
  }
}

// ---- completions

bool Service::knows_model(const std::string& name) const {
  const auto& names = options_.model_names;
  return name.empty() || std::find(names.begin(), names.end(), name) != names.end();
}

void Service::complete(const RequestPtr& request, const Tenant& tenant, const WriterPtr& writer) {
  const Result<Json> body = parse_json(request->body);
  generate(body ? parse_completion(*body, limits_) : to_api_error(body.error()), request, tenant,
           writer);
}

void Service::chat(const RequestPtr& request, const Tenant& tenant, const WriterPtr& writer) {
  const Result<Json> body = parse_json(request->body);
  generate(body ? parse_chat(*body, limits_) : to_api_error(body.error()), request, tenant, writer);
}

void Service::generate(ParsedRequest parsed, const RequestPtr& request, const Tenant& tenant,
                       const WriterPtr& writer) {
  if (const auto* error = std::get_if<ApiError>(&parsed)) {
    writer->send(error_response(*error));
    return;
  }
  GenerationInput input{.request = std::get<GenerationRequest>(std::move(parsed)),
                        .model_name = {},
                        .prompts = {},
                        .constraint = nullptr,
                        .tools = std::nullopt,
                        .tenant = tenant,
                        .http = request};
  const std::string& model = input.request.model;
  if (!knows_model(model)) {
    writer->send(error_response({.status = 404,
                                 .message = fmt::format("the model '{}' is not served here", model),
                                 .param = "model",
                                 .code = "model_not_found"}));
    return;
  }
  input.model_name = model.empty() ? options_.model_names.front() : model;
  auto prompts = encode_prompts(input.request);
  if (const auto* error = std::get_if<ApiError>(&prompts)) {
    writer->send(error_response(*error));
    return;
  }
  input.prompts = std::get<std::vector<std::vector<int32_t>>>(std::move(prompts));
  input.tools = tool_parser(input.request);
  auto allowed = constraint(input.request);
  if (!allowed) {
    ApiError error = to_api_error(allowed.error());
    const bool other = !input.request.regex.empty() || !input.request.choices.empty();
    error.param = demands_call(input.request) ? "tools"
                  : other                     ? "structured_outputs"
                                              : "response_format";
    writer->send(error_response(error));
    return;
  }
  input.constraint = *std::move(allowed);
  const Status started = Generation::start(generations_, std::move(input), writer);
  if (started && observer_ != nullptr) observer_->on_enqueued(seconds_since(request->received));
}

Result<std::shared_ptr<const ConstraintSource>> Service::constraint(
    const GenerationRequest& request) {
  using Kind = grammar::ConstraintSpec::Kind;
  grammar::ConstraintSpec spec;
  if (demands_call(request)) {
    KVANT_ASSIGN(spec, tool_call_constraint({.style = tool_calls_,
                                             .tools_json = request.tools_json,
                                             .only = request.tool_name,
                                             .parallel = request.parallel_tool_calls}));
  } else if (request.response_format == ResponseFormat::kJsonSchema) {
    spec.kind = Kind::kJsonSchema;
    spec.text = request.schema_json;
  } else if (!request.regex.empty()) {
    spec.kind = Kind::kRegex;
    spec.text = request.regex;
  } else if (!request.choices.empty()) {
    spec.kind = Kind::kChoice;
    spec.choices = request.choices;
  } else if (request.response_format != ResponseFormat::kJsonObject) {
    return std::shared_ptr<const ConstraintSource>();
  }
  return constraints_.compile(spec);
}

std::optional<ToolCallParserOptions> Service::tool_parser(const GenerationRequest& request) {
  if (request.tool_choice == ToolChoice::kNone || request.tools_json.empty()) return std::nullopt;
  ToolCallParserOptions options{.style = tool_calls_};
  for (const Json& tool : Json::parse(request.tools_json)) {
    options.names.push_back(tool["function"]["name"].get<std::string>());
  }
  // Choices add their index.
  options.id_seed = next_tool_seed_.fetch_add(static_cast<uint64_t>(request.sampling.n));
  return options;
}

Status Service::check_text_size(size_t bytes) const {
  const auto most = static_cast<size_t>(limits_.max_model_len) * longest_token_;
  if (bytes <= most) return {};
  return Error(ErrorCode::kInvalidArgument,
               fmt::format("{} bytes of text are more than {} tokens, which this server takes at "
                           "most",
                           bytes, limits_.max_model_len));
}

Result<std::vector<int32_t>> Service::encode(std::string_view text, bool add_special_tokens) const {
  KVANT_TRY(check_text_size(text.size()));
  return served_.tokenizer->encode(
      text, {.bos = add_special_tokens ? model::Bos::kAsModel : model::Bos::kNone});
}

Result<std::vector<int32_t>> Service::encode_messages(const GenerationRequest& request) const {
  if (served_.chat == nullptr) {
    return Error(ErrorCode::kInvalidArgument,
                 "the model has no chat template (it is a base model): use /v1/completions");
  }
  KVANT_TRY(check_text_size(request.messages_json.size() / 6));  // escapes take up to 6 bytes
  model::ChatOptions options{.add_generation_prompt = request.add_generation_prompt,
                             .now = std::time(nullptr)};
  options.variables_json = request.variables_json;
  std::string messages = request.messages_json;
  if (request.tool_choice != ToolChoice::kNone && !request.tools_json.empty()) {
    options.tools_json = request.tools_json;
    if (!template_knows_tools_) {
      messages = with_system_text(messages, tools_in_words(request.tools_json));
    }
  }
  KVANT_ASSIGN(const std::string text, served_.chat->render_json(messages, options));
  KVANT_TRY(check_text_size(text.size()));
  return model::encode_chat(*served_.tokenizer, text);
}

std::variant<std::vector<std::vector<int32_t>>, ApiError> Service::encode_prompts(
    const GenerationRequest& request) const {
  std::vector<std::vector<int32_t>> prompts;
  const auto wrong = [&](const Error& error) {
    ApiError api = to_api_error(error);
    api.param = request.chat ? "messages" : "prompt";
    return api;
  };
  if (request.chat) {
    auto ids = encode_messages(request);
    if (!ids) return wrong(ids.error());
    prompts.push_back(*std::move(ids));
  }
  for (const PromptInput& input : request.prompts) {
    if (const auto* ids = std::get_if<std::vector<int32_t>>(&input)) {
      prompts.push_back(*ids);
      continue;
    }
    auto ids = encode(std::get<std::string>(input), request.add_special_tokens);
    if (!ids) return wrong(ids.error());
    prompts.push_back(*std::move(ids));
  }
  // A prompt that is only scored needs no room for an answer, but the engine's rule is simple.
  for (const std::vector<int32_t>& prompt : prompts) {
    const auto tokens = static_cast<int64_t>(prompt.size());
    if (tokens == 0) return wrong(Error(ErrorCode::kInvalidArgument, "the prompt is empty"));
    const int64_t wanted = request.sampling.max_tokens.value_or(1);
    if (tokens >= limits_.max_model_len || tokens + wanted > limits_.max_model_len) {
      ApiError error = wrong(Error(
          ErrorCode::kInvalidArgument,
          fmt::format("this server's longest context is {} tokens; {} were asked for, {} of them "
                      "in the prompt",
                      limits_.max_model_len, tokens + wanted, tokens)));
      error.code = "context_length_exceeded";
      return error;
    }
  }
  return prompts;
}

// ---- the rest

Json Service::model_json(const std::string& name) const {
  Json json;
  json["id"] = name;
  json["object"] = "model";
  json["created"] = started_;
  json["owned_by"] = "kvant";
  json["root"] = options_.model_names.front();
  json["parent"] = nullptr;
  json["max_model_len"] = limits_.max_model_len;
  return json;
}

void Service::models(const RequestPtr& request, const Tenant&, const WriterPtr& writer) {
  if (request->path.size() > kModelPrefix.size()) {
    const std::string name =
        http::decode_percent(std::string_view(request->path).substr(kModelPrefix.size()), false);
    if (knows_model(name)) {
      writer->send(json_response(model_json(name)));
    } else {
      writer->send(
          error_response({.status = 404,
                          .message = fmt::format("the model '{}' is not served here", name),
                          .code = "model_not_found"}));
    }
    return;
  }
  Json list = Json::array();
  for (const std::string& name : options_.model_names) list.push_back(model_json(name));
  writer->send(json_response(Json{{"object", "list"}, {"data", std::move(list)}}));
}

void Service::tokenize(const RequestPtr& request, const Tenant&, const WriterPtr& writer) {
  answer_object(*request, *writer, [this](FieldReader& reader, std::optional<ApiError>& error) {
    const bool with_strings = reader.boolean("return_token_strs").value_or(false);
    const bool add_special = reader.boolean("add_special_tokens").value_or(true);
    Result<std::vector<int32_t>> ids = std::vector<int32_t>();
    if (reader.find("messages") != nullptr) {
      GenerationRequest chat;
      chat.messages_json = dump_json(read_messages(reader, limits_));
      chat.add_generation_prompt = reader.boolean("add_generation_prompt").value_or(true);
      if (!error) ids = encode_messages(chat);
    } else if (const auto text = reader.text("prompt")) {
      ids = encode(*text, add_special);
    } else {
      reader.fail("prompt", "expected a prompt or messages");
    }
    if (!ids && !error) error = to_api_error(ids.error());
    if (error) return Json();
    Json strings;
    for (const int32_t id : with_strings ? *ids : std::vector<int32_t>()) {
      strings.push_back(std::string(served_.tokenizer->token_text(id)));
    }
    return Json{{"count", ids->size()},
                {"max_model_len", limits_.max_model_len},
                {"tokens", *ids},
                {"token_strs", std::move(strings)}};
  });
}

void Service::detokenize(const RequestPtr& request, const Tenant&, const WriterPtr& writer) {
  answer_object(*request, *writer, [this](FieldReader& reader, std::optional<ApiError>& error) {
    if (reader.find("tokens") == nullptr) reader.fail("tokens", "expected an array of token ids");
    const Result<std::string> text = served_.tokenizer->decode(reader.integers("tokens"));
    if (!text && !error) error = to_api_error(text.error());
    return error ? Json() : Json{{"prompt", *text}};
  });
}

void Service::tokenizer_info(const RequestPtr&, const Tenant&, const WriterPtr& writer) {
  const model::Tokenizer& tokenizer = *served_.tokenizer;
  Json json{{"tokenizer_class", tokenizer.family()},
            {"vocab_size", tokenizer.vocabulary_size()},
            {"model_max_length", limits_.max_model_len}};
  const auto add_token = [&](const char* name, std::optional<model::TokenId> id) {
    json[name] = id ? Json(std::string(tokenizer.token_text(*id))) : Json();
  };
  add_token("bos_token", tokenizer.bos());
  add_token("eos_token", tokenizer.eos());
  add_token("unk_token", tokenizer.unknown());
  add_token("pad_token", tokenizer.padding());
  json["chat_template"] = served_.chat != nullptr ? Json(served_.chat->source()) : Json();
  writer->send(json_response(json));
}

void Service::health(const RequestPtr&, const Tenant&, const WriterPtr& writer) {
  if (served_.engine->draining()) {
    writer->send(error_response({.status = 503, .message = "the server is shutting down"}));
    return;
  }
  writer->send(json_response(Json{{"status", "ok"}}));
}

void Service::ping(const RequestPtr& request, const Tenant& tenant, const WriterPtr& writer) {
  health(request, tenant, writer);
}

void Service::version(const RequestPtr&, const Tenant&, const WriterPtr& writer) {
  writer->send(json_response(Json{{"version", options_.version}}));
}

void Service::load(const RequestPtr&, const Tenant&, const WriterPtr& writer) {
  writer->send(json_response(Json{{"server_load", generations_.active->load()}}));
}

void Service::reset_prefix_cache(const RequestPtr&, const Tenant&, const WriterPtr& writer) {
  // The engine answers between two steps, which may take a while.
  tasks_.post_always([this, writer] {
    const Status reset = served_.engine->reset_prefix_cache();
    writer->send(reset ? json_response(Json{{"status", "ok"}})
                       : error_response(to_api_error(reset.error())));
  });
}

}  // namespace kvant::serve::openai
