// `kvant serve`: an OpenAI-compatible HTTP server over one model and one shared cache.
#include <unistd.h>

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kvant/cache/kv_cache.h"
#include "kvant/model/chat_template.h"
#include "kvant/serve/engine.h"
#include "kvant/serve/http/server.h"
#include "kvant/serve/monitor/dashboard.h"
#include "kvant/serve/monitor/metrics.h"
#include "kvant/serve/monitor/observers.h"
#include "kvant/serve/monitor/quality_sampler.h"
#include "kvant/serve/openai/service.h"
#include "tools/command.h"
#include "tools/json_output.h"
#include "tools/option_file.h"
#include "tools/serve_log.h"
#include "tools/serve_options.h"
#include "tools/serve_tiers.h"

namespace kvant::tools {
namespace {

using namespace std::chrono_literals;
using serve::http::AccessRecord;

// Log and metrics of the HTTP side.
class Watcher : public serve::http::ServerObserver, public serve::openai::ServiceObserver {
 public:
  Watcher(ServeLog& log, serve::Metrics& metrics) : log_(log), metrics_(metrics) {}
  void on_connections(int64_t open) override { metrics_.on_connections(open); }
  void on_refused(int status, std::string_view peer) override {
    metrics_.on_refused(status, peer);
    log_.refused(status, peer);
  }
  void on_written(double seconds) override { metrics_.on_written(seconds); }
  void on_response(const AccessRecord& record) override {
    metrics_.on_response(record);
    log_.access(record);
  }
  void on_enqueued(double seconds) override { metrics_.observe_enqueued(seconds); }

 private:
  ServeLog& log_;
  serve::Metrics& metrics_;
};

// In the order in which they need each other; destroyed the other way round.
struct Running {
  OpenModel open;
  KvChoice kv;
  std::optional<model::ChatTemplate> chat;
  std::unique_ptr<ServeLog> log;
  std::unique_ptr<serve::Metrics> metrics;
  std::unique_ptr<Watcher> watcher;
  std::unique_ptr<serve::QualitySampler> sampler;  // may be null
  std::unique_ptr<EventSender> events;             // may be null
  serve::EngineObservers observers;
  serve::PageObservers pages;
  std::unique_ptr<serve::Engine> engine;
  std::unique_ptr<serve::openai::Service> service;
  std::unique_ptr<serve::http::Server> server;
  std::vector<std::string> names;
  std::vector<std::string> salts;  // of tenants
};

Status read_config(CLI::App& app, const ServeOptions& options) {
  if (!options.config.empty()) {
    KVANT_ASSIGN(const std::string text, read_file(options.config));
    auto given = parse_option_file(text);
    if (!given) return given.error().with_context(options.config);
    KVANT_TRY(apply_option_file(app, *given, options.config));
  }
  if (options.model.model.empty()) {
    return Error(ErrorCode::kInvalidArgument, "MODEL is required: a GGUF file");
  }
  return {};
}

Result<serve::openai::ApiKeys> read_keys(const std::string& path) {
  if (path.empty()) return serve::openai::ApiKeys();
  KVANT_ASSIGN(const std::string text, read_file(path));
  auto keys = serve::openai::ApiKeys::parse(text);
  if (!keys) return keys.error().with_context(path);
  return keys;
}

bool is_loopback(std::string_view host) {
  return host.starts_with("127.") || host == "::1" || host == "localhost";
}

std::vector<std::string> model_names(const ServeOptions& options) {
  if (!options.access.served_model_names.empty()) return options.access.served_model_names;
  const std::filesystem::path path(options.model.model);
  return {path.extension() == ".gguf" ? path.stem().string() : path.filename().string()};
}

Status open_chat(Console& console, Running& running) {
  const model::Gguf& gguf = *running.open.model->source().gguf();
  if (!gguf.has("tokenizer.chat_template")) {
    console.note("the model has no chat template (it is a base model): only /v1/completions");
    return {};
  }
  KVANT_ASSIGN(running.chat, model::ChatTemplate::create(gguf, *running.open.tokenizer));
  return {};
}

Status start_metrics(const ServeOptions& options, const serve::EngineOptions& engine, Running& r) {
  const model::RuntimeOptions& runtime = engine.runtime;
  r.metrics = std::make_unique<serve::Metrics>(
      serve::MetricsConfig{.model_name = r.names.front(),
                           .version = KVANT_VERSION,
                           .format = r.kv.asked,
                           .page_tokens = runtime.page_tokens,
                           .pages_total = runtime.total_tokens / runtime.page_tokens,
                           .max_model_len = runtime.context_tokens,
                           .prefix_caching = engine.prefix_caching});
  const int layers = r.open.model->config().num_layers;
  for (const bool keys : {true, false}) {
    r.metrics->set_scale_audit(keys, serve::audit_scales(runtime, layers, keys));
  }
  r.observers.add(*r.metrics);
  if (options.monitor.quality_prompts > 0) {
    serve::Metrics& metrics = *r.metrics;
    KVANT_ASSIGN(r.sampler, serve::QualitySampler::create(
                                *r.open.model, runtime, options.monitor.quality_prompts,
                                [&metrics](const serve::QualitySample& sample) {
                                  metrics.observe_quality(sample);
                                }));
    if (r.sampler) r.observers.add(*r.sampler);
  }
  return {};
}

Status start_event_sender(const ServeOptions& options, const serve::EngineOptions& engine,
                          Running& r) {
  r.pages.add(*r.metrics);
  const std::vector<cache::LayerGeometry> layers = r.open.model->config().layer_geometry();
  const NetworkOptions& network = options.network;
  const bool ipv6 = network.host.find(':') != std::string::npos;
  EventSubject subject;
  subject.listens_at =
      (ipv6 ? "[" + network.host + "]" : network.host) + ":" + std::to_string(network.port);
  subject.model_name = r.names.front();
  subject.page_tokens = engine.runtime.page_tokens;
  subject.num_groups = static_cast<int>(cache::make_layer_groups(layers).size());
  KVANT_ASSIGN(r.events, start_events(options.events, subject));
  if (r.events) r.events->watch(r.observers, r.pages, *r.metrics);
  return {};
}

void add_pages(Running& r) {
  serve::Metrics& metrics = *r.metrics;
  using serve::http::HttpRequest;
  using serve::http::HttpResponse;
  r.service->add_page("GET", "/metrics", [&metrics](const HttpRequest&) {
    return HttpResponse{.content_type = std::string(serve::Metrics::kTextType),
                        .body = metrics.text()};
  });
  r.service->add_page("GET", "/dashboard/data", [&metrics](const HttpRequest&) {
    return HttpResponse{.body = metrics.json()};
  });
  r.service->add_page("GET", "/", [](const HttpRequest&) {
    return HttpResponse{.content_type = std::string(serve::kDashboardType),
                        .body = std::string(serve::dashboard_page())};
  });
}

Status open_all(Console& console, const ServeOptions& options, Running& r) {
  KVANT_ASSIGN(const std::vector<KvChoice> kv, parse_kv(options.cache.kv));
  r.kv = kv.front();
  KVANT_ASSIGN(r.open, open_model(console, options.model));
  KVANT_TRY(need_tokenizer(r.open));
  KVANT_TRY(open_chat(console, r));
  r.names = model_names(options);
  KVANT_ASSIGN(serve::EngineOptions engine, engine_options(options, r.open, r.kv));
  engine.known_salts = r.salts;
  KVANT_TRY(start_metrics(options, engine, r));
  KVANT_TRY(start_event_sender(options, engine, r));
  KVANT_ASSIGN(std::vector<serve::TierSetup> tiers, open_tiers(console, options.tiers));
  KVANT_ASSIGN(r.engine, serve::Engine::create(*r.open.model, engine, &r.observers, &r.pages,
                                               std::move(tiers)));
  serve::Engine& started = *r.engine;
  r.metrics->watch_engine([&started] { return started.stats(); });
  return {};
}

// On a host whose processors all compute, reading requests and writing tokens must not wait for the
// end of a time slice: the threads that compute (those that open_all starts, which inherit from the
// one that runs it) step back by so much. Raising the others instead would need a privilege.
constexpr int kComputeNiceness = 5;

Status open_computing(Console& console, const ServeOptions& options, Running& r) {
  if (options.model.device != "cpu") return open_all(console, options, r);
  Status status;
  std::thread([&] {
    static_cast<void>(::nice(kComputeNiceness));  // Linux: of this thread; no matter if it fails
    status = open_all(console, options, r);
  }).join();
  return status;
}

Result<std::unique_ptr<Running>> start(Console& console, const ServeOptions& options) {
  serve::openai::ServiceOptions service;
  KVANT_ASSIGN(service.keys, read_keys(options.access.api_key_file));
  if (!options.access.tool_call_parser.empty()) {
    KVANT_ASSIGN(service.tool_calls, serve::parse_tool_call_style(options.access.tool_call_parser));
  }
  if (service.keys.empty() && !is_loopback(options.network.host)) {
    console.warn(
        fmt::format("everybody who reaches {} may use the model; --api-key-file asks for keys",
                    options.network.host));
  }
  KVANT_ASSIGN(const serve::http::ServerOptions http, server_options(options.network));
  auto running = std::make_unique<Running>();
  Running& r = *running;
  r.salts = service.keys.salts();
  KVANT_TRY(open_computing(console, options, r));
  r.log = std::make_unique<ServeLog>(parse_log_level(options.log.level),
                                     !options.log.no_access_log && !console.quiet());
  r.watcher = std::make_unique<Watcher>(*r.log, *r.metrics);
  service.model_names = r.names;
  service.version = KVANT_VERSION;
  r.service = std::make_unique<serve::openai::Service>(
      serve::openai::ServedModel{r.engine.get(), &*r.open.tokenizer, r.chat ? &*r.chat : nullptr},
      std::move(service), r.watcher.get());
  add_pages(r);
  KVANT_ASSIGN(r.server, serve::http::Server::start(http, r.service->handler(), r.watcher.get()));
  return running;
}

// Where it is, on stdout: a script that started it waits for this.
Status announce(Console& console, const Running& running) {
  const model::RuntimeOptions& runtime = running.engine->options().runtime;
  const int64_t bytes = running.engine->stats().cache.total_reserved();
  const std::string url = "http://" + running.server->address();
  if (console.json()) {
    Json json = json_object("serve");
    json["models"] = running.names;
    json["url"] = url;
    json["port"] = running.server->port();
    json["kv"] = running.kv.asked;
    json["kv_resolved"] = running.kv.resolved;
    json["cache_tokens"] = runtime.total_tokens;
    json["cache_bytes"] = bytes;
    json["max_model_len"] = runtime.context_tokens;
    json["max_num_seqs"] = runtime.max_sequences;
    json["max_num_batched_tokens"] = runtime.max_step_tokens;
    if (running.events) {
      json["kv_events"] = running.events->publisher->endpoint();
      json["kv_events_replay"] = running.events->publisher->replay_endpoint();
    }
    return print_json(console, json);
  }
  KVANT_TRY(console.print(fmt::format(
      "serving {} with a {} cache of {} tokens ({}); {} requests at a time of up to {} tokens\n"
      "  API        {}/v1\n  dashboard  {}/\n  metrics    {}/metrics\n",
      fmt::join(running.names, ", "), running.kv.asked, runtime.total_tokens, format_bytes(bytes),
      runtime.max_sequences, runtime.context_tokens, url, url, url)));
  return console.flush();
}

// Until a signal comes; then requests get time to end. A second signal ends the program at once.
Status serve_until_stopped(const ServeOptions& options, Running& running) {
  while (!Console::stop_requested()) std::this_thread::sleep_for(50ms);
  const auto limit = std::chrono::duration_cast<std::chrono::milliseconds>(
      std::chrono::duration<double>(options.network.drain_seconds));
  const serve::EngineStats stats = running.engine->stats();
  const int64_t left = stats.running + stats.waiting;
  if (left > 0) {
    running.log->info(fmt::format("stopping: {} requests have {:.0f} s to end", left,
                                  options.network.drain_seconds));
  }
  running.server->stop_accepting();
  const auto begun = std::chrono::steady_clock::now();
  running.engine->drain(limit);
  const bool in_time = std::chrono::steady_clock::now() - begun < limit || left == 0;
  const bool written = running.server->drain(2s);
  running.log->info("stopped");
  if (in_time && written) return {};
  return Error(ErrorCode::kCancelled, "requests were ended before they were done");
}

CommandBody define(CLI::App& app) {
  auto options = std::make_shared<ServeOptions>();
  add_serve_options(app, *options);
  return [options, &app](Console& console) -> Status {
    KVANT_TRY(read_config(app, *options));
    KVANT_ASSIGN(const std::unique_ptr<Running> running, start(console, *options));
    KVANT_TRY(announce(console, *running));
    return serve_until_stopped(*options, *running);
  };
}

}  // namespace

const Command serve_command = {
    .name = "serve",
    .summary = "Serve a model over HTTP as OpenAI's API does, with a shared quantised cache",
    .examples =
        "kvant serve smollm2.gguf\n"
        "kvant serve smollm2.gguf --kv nvfp4 --cache-memory 2GiB --max-num-seqs 32 --port 9000\n"
        "kvant serve smollm2.gguf --host-cache 8GiB --disk-cache /var/cache/kvant\n"
        "kvant serve --config serve.yaml --api-key-file keys.txt --host 0.0.0.0",
    .define = define,
};

}  // namespace kvant::tools
