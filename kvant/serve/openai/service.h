// The HTTP interface of an engine: OpenAI's API with vLLM's additions (docs/serving.md lists it).
//
//   Service service({.engine = engine, .tokenizer = tokenizer, .chat = chat}, options, observer);
//   service.add_page("GET", "/metrics", [&](const HttpRequest&) { return ...; });
//   KVANT_ASSIGN(auto server, http::Server::start(http_options, service.handler()));
//
// The server must end before the service, the service before the engine... but not before the
// engine has told the end of every request: drain the engine first.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/model/chat_template.h"
#include "kvant/model/tokenizer.h"
#include "kvant/serve/engine.h"
#include "kvant/serve/grammar/constraint.h"
#include "kvant/serve/http/message.h"
#include "kvant/serve/openai/api_error.h"
#include "kvant/serve/openai/api_keys.h"
#include "kvant/serve/openai/generation.h"
#include "kvant/serve/openai/generation_request.h"
#include "kvant/serve/openai/task_threads.h"
#include "kvant/serve/tools.h"

namespace kvant::serve::openai {

struct ServiceOptions {
  std::vector<std::string> model_names;  // at least one; requests may name any of them
  std::string version;
  ApiKeys keys;
  int task_threads = 1;
  size_t max_queued_tasks = 1024;
  std::optional<ToolCallStyle> tool_calls;  // how the model writes them; absent: by its template
  size_t inline_bytes = 8 << 10;  // longer bodies are parsed and tokenised on a task thread
};

// Metrics. Called on I/O and task threads; must be quick.
class ServiceObserver {
 public:
  virtual ~ServiceObserver() = default;
  // From the first byte of a request to its entry into the engine's queue.
  virtual void on_enqueued(double seconds) { static_cast<void>(seconds); }
};

// What is served; everything outlives the service.
struct ServedModel {
  Engine* engine = nullptr;
  const model::Tokenizer* tokenizer = nullptr;
  const model::ChatTemplate* chat = nullptr;  // null: a base model without one
};

class Service {
 public:
  using RequestPtr = std::shared_ptr<const http::HttpRequest>;
  using WriterPtr = std::shared_ptr<http::ResponseWriter>;
  using Page = std::function<http::HttpResponse(const http::HttpRequest&)>;

  Service(const ServedModel& served, ServiceOptions options, ServiceObserver* observer = nullptr);
  ~Service();

  // Before the first request: a page that something else makes, on an I/O thread. `guarded`: only
  // with a key, where there are any.
  void add_page(std::string method, std::string path, Page page, bool guarded = false);

  // Valid as long as the service.
  http::Handler handler();

 private:
  using Action = void (Service::*)(const RequestPtr&, const Tenant&, const WriterPtr&);
  struct Route {
    std::string method;
    std::string path;
    bool guarded;
    bool may_take_long;  // by the length of its body
    Action action;       // null: a page
    Page page;
  };

  void handle(RequestPtr request, WriterPtr writer);
  const Route* find_route(std::string_view method, std::string_view path, ApiError& error) const;
  void run(const Route& route, const RequestPtr& request, const Tenant& tenant,
           const WriterPtr& writer);

  void complete(const RequestPtr& request, const Tenant& tenant, const WriterPtr& writer);
  void chat(const RequestPtr& request, const Tenant& tenant, const WriterPtr& writer);
  void generate(ParsedRequest parsed, const RequestPtr& request, const Tenant& tenant,
                const WriterPtr& writer);
  void models(const RequestPtr& request, const Tenant& tenant, const WriterPtr& writer);
  void tokenize(const RequestPtr& request, const Tenant& tenant, const WriterPtr& writer);
  void detokenize(const RequestPtr& request, const Tenant& tenant, const WriterPtr& writer);
  void tokenizer_info(const RequestPtr& request, const Tenant& tenant, const WriterPtr& writer);
  void health(const RequestPtr& request, const Tenant& tenant, const WriterPtr& writer);
  void ping(const RequestPtr& request, const Tenant& tenant, const WriterPtr& writer);
  void version(const RequestPtr& request, const Tenant& tenant, const WriterPtr& writer);
  void load(const RequestPtr& request, const Tenant& tenant, const WriterPtr& writer);
  void reset_prefix_cache(const RequestPtr& request, const Tenant& tenant, const WriterPtr& writer);

  bool knows_model(const std::string& name) const;
  Json model_json(const std::string& name) const;
  Result<std::vector<int32_t>> encode(std::string_view text, bool add_special_tokens) const;
  Result<std::vector<int32_t>> encode_messages(const GenerationRequest& request) const;
  Status check_text_size(size_t bytes) const;
  std::optional<ToolCallParserOptions> tool_parser(const GenerationRequest& request);
  // What the form that the request asks for allows; null: anything.
  Result<std::shared_ptr<const ConstraintSource>> constraint(const GenerationRequest& request);
  // The prompts as ids, checked against the context; an error to send otherwise.
  std::variant<std::vector<std::vector<int32_t>>, ApiError> encode_prompts(
      const GenerationRequest& request) const;

  const ServedModel served_;
  const ServiceOptions options_;
  ServiceObserver* const observer_;
  const int64_t started_;  // seconds since 1970
  RequestLimits limits_;
  size_t longest_token_ = 1;  // bytes
  ToolCallStyle tool_calls_ = ToolCallStyle::kHermes;
  bool template_knows_tools_ = false;
  grammar::ConstraintCompiler constraints_;
  std::vector<Route> routes_;
  std::atomic<uint64_t> next_tool_seed_;
  GenerationContext generations_;
  TaskThreads tasks_;  // ends first: tasks use the rest
};

}  // namespace kvant::serve::openai
