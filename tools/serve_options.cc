#include "tools/serve_options.h"

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <chrono>

namespace kvant::tools {
namespace {

constexpr int kDefaultSeqsOnHost = 16;
constexpr int kDefaultSeqsOnDevice = 64;
constexpr int kMaxLogitRows = 64;  // rows of logits in memory at once
// Of free memory, what pages take by default: a host has other work to do, a GPU has not.
constexpr double kHostShare = 0.5;
constexpr double kDeviceShare = 0.9;
// And at most so many times what all requests at their longest take: more helps only servers that
// see many different prefixes, and they are told how to ask for it.
constexpr int64_t kDefaultFills = 4;

void add_model_group(CLI::App& app, ServeOptions& options) {
  add_model_options(app, options.model);
  app.get_option("MODEL")->required(false);  // the file of --config may name it
  app.add_option("--max-model-len", options.model.context,
                 "Longest prompt and answer together, in tokens; the same as --context")
      ->check(CLI::Range(int64_t{2}, int64_t{1} << 30));
  for (const char* name :
       {"--plan", "--context", "--threads", "--deterministic", "--weights", "--device",
        "--memory-limit", "--prefill-workspace", "--attn", "--max-model-len"}) {
    app.get_option(name)->group("Model");
  }
  app.get_option("--page-tokens")->group("Cache");
}

void add_cache_group(CLI::App& app, CacheOptions& options) {
  add_kv_option(app, options.kv, KvOption::kOne);
  app.get_option("--kv")->group("Cache");
  app.add_option("--cache-memory", options.memory,
                 "Memory for the cache's pages (default: half of what is free, on a GPU 90 %; at "
                 "most 4 times what --max-num-seqs requests at their longest take)")
      ->type_name("SIZE")
      ->group("Cache");
  app.add_flag("--no-enable-prefix-caching", options.no_prefix_caching,
               "Compute every prompt anew instead of sharing pages between requests")
      ->group("Cache");
  app.add_option("--eviction", options.eviction,
                 "Which cached page goes first: lru, priority or cost")
      ->capture_default_str()
      ->group("Cache");
}

void add_scheduler_group(CLI::App& app, SchedulerOptions& options) {
  const char* group = "Scheduler";
  app.add_option("--max-num-seqs", options.max_num_seqs,
                 "Requests computed at a time (default: 16, on a GPU 64)")
      ->check(CLI::Range(1, 4096))
      ->group(group);
  app.add_option("--max-num-batched-tokens", options.max_num_batched_tokens,
                 "New tokens of one step: longer prompts are computed in chunks (default: 512, on "
                 "a GPU more)")
      ->check(CLI::Range(16, 1 << 20))
      ->group(group);
  app.add_option("--max-waiting", options.max_waiting, "Requests that may wait; more are told 429")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str()
      ->group(group);
  app.add_option("--speculative-tokens", options.speculative_tokens,
                 "Tokens proposed at a time from what the text said before; 0: none")
      ->check(CLI::Range(0, 32))
      ->capture_default_str()
      ->group(group);
}

void add_network_group(CLI::App& app, NetworkOptions& options) {
  const char* group = "Network";
  app.add_option("--host", options.host, "Address to listen on; 0.0.0.0: all")
      ->capture_default_str()
      ->group(group);
  app.add_option("--port", options.port, "Port to listen on; 0: any free one")
      ->check(CLI::Range(0, 65535))
      ->capture_default_str()
      ->group(group);
  app.add_option("--http-threads", options.threads, "Threads that read and write")
      ->check(CLI::Range(1, 64))
      ->capture_default_str()
      ->group(group);
  app.add_option("--max-connections", options.max_connections, "More are told 503")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str()
      ->group(group);
  app.add_option("--max-body", options.max_body, "Longest request body; longer ones are told 413")
      ->type_name("SIZE")
      ->capture_default_str()
      ->group(group);
  app.add_option("--header-timeout", options.header_seconds,
                 "Seconds in which the headers of a request must arrive; later ones are told 408")
      ->check(CLI::Range(0.1, 1e6))
      ->capture_default_str()
      ->group(group);
  app.add_option("--body-timeout", options.body_seconds, "The same for its body")
      ->check(CLI::Range(0.1, 1e6))
      ->capture_default_str()
      ->group(group);
  app.add_option("--drain-timeout", options.drain_seconds,
                 "Seconds that requests get to end after SIGTERM or Ctrl-C")
      ->check(CLI::Range(0.0, 1e6))
      ->capture_default_str()
      ->group(group);
}

void add_access_group(CLI::App& app, AccessOptions& options) {
  const char* group = "Access";
  app.add_option("--served-model-name", options.served_model_names,
                 "Names of the model in the API (default: the file's name)")
      ->type_name("NAME")
      ->group(group);
  app.add_option("--tool-call-parser", options.tool_call_parser,
                 "How the model writes calls of tools: hermes or llama3_json (default: as its chat "
                 "template says)")
      ->group(group);
  app.add_option("--api-key-file", options.api_key_file,
                 "File with a line KEY [NAME [SALT]] for each key (default: no key is needed)")
      ->type_name("FILE")
      ->group(group);
}

void add_log_group(CLI::App& app, LogOptions& options) {
  const char* group = "Log";
  app.add_option("--log-level", options.level, "debug, info, warning, error or off")
      ->check(CLI::IsMember({"debug", "info", "warning", "error", "off"}))
      ->capture_default_str()
      ->group(group);
  app.add_flag("--no-access-log", options.no_access_log, "No line for each request")->group(group);
}

void add_monitor_group(CLI::App& app, MonitorOptions& options) {
  app.add_option("--quality-sample", options.quality_prompts,
                 "Measure the quantisation error of one page in every so many prompts; 0: never")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 40))
      ->capture_default_str()
      ->group("Monitoring");
}

std::chrono::milliseconds milliseconds(double seconds) {
  return std::chrono::milliseconds(static_cast<int64_t>(seconds * 1000));
}

// The bytes that pages may take by default.
Result<int64_t> default_cache_bytes(const OpenModel& open, const model::RuntimeOptions& runtime) {
  const backend::BackendInfo info = open.backend->info();
  const double share = info.host_memory ? kHostShare : kDeviceShare;
  model::RuntimeOptions full = runtime;
  full.total_tokens = runtime.context_tokens * runtime.max_sequences * kDefaultFills;
  KVANT_ASSIGN(const model::MemoryPlan plan,
               model::plan_memory(open.model->source(), *open.backend, full));
  const int64_t most = plan.cache.total_reserved();
  if (info.memory_free == 0) return most;
  const auto free = static_cast<int64_t>(static_cast<double>(info.memory_free) * share);
  return std::min(most, free - plan.activations - plan.backend_workspace);
}

}  // namespace

void add_serve_options(CLI::App& app, ServeOptions& options) {
  add_model_group(app, options);
  add_cache_group(app, options.cache);
  add_tier_options(app, options.tiers);
  add_scheduler_group(app, options.scheduler);
  add_network_group(app, options.network);
  add_access_group(app, options.access);
  add_log_group(app, options.log);
  add_monitor_group(app, options.monitor);
  add_event_group(app, options.events);
  app.add_option("--config", options.config,
                 "YAML file with these options by their long names; the command line wins")
      ->type_name("FILE");
}

Result<serve::EngineOptions> engine_options(const ServeOptions& options, const OpenModel& open,
                                            const KvChoice& kv) {
  serve::EngineOptions engine;
  KVANT_ASSIGN(engine.runtime, runtime_options(options.model, open, kv.format));
  model::RuntimeOptions& runtime = engine.runtime;
  const SchedulerOptions& scheduler = options.scheduler;
  const bool on_host = open.backend->info().host_memory;
  runtime.max_sequences = scheduler.max_num_seqs > 0 ? scheduler.max_num_seqs
                          : on_host                  ? kDefaultSeqsOnHost
                                                     : kDefaultSeqsOnDevice;
  if (scheduler.max_num_batched_tokens > 0) {
    runtime.max_step_tokens = scheduler.max_num_batched_tokens;
  }
  // Every running request has a row in each step.
  runtime.max_step_tokens = std::max(runtime.max_step_tokens, runtime.max_sequences);
  runtime.max_logit_rows =
      std::min(kMaxLogitRows, runtime.max_sequences * (1 + scheduler.speculative_tokens));
  KVANT_ASSIGN(int64_t bytes, parse_optional_bytes(options.cache.memory));
  if (bytes == 0) {
    KVANT_ASSIGN(bytes, default_cache_bytes(open, runtime));
  }
  engine.prefix_caching = !options.cache.no_prefix_caching;
  KVANT_ASSIGN(engine.eviction, cache::parse_eviction_policy(options.cache.eviction));
  KVANT_ASSIGN(runtime,
               model::fit_cache_memory(open.model->source(), *open.backend, runtime, bytes));
  const auto ends = open.tokenizer->end_of_generation();
  engine.end_ids.assign(ends.begin(), ends.end());
  engine.max_waiting = scheduler.max_waiting;
  engine.load_by_cost = !options.tiers.load_always;
  if (options.tiers.leaves_process()) {
    engine.identity = model::Model::Identity::kWithWeights;
  }
  engine.speculation.max_draft_tokens = scheduler.speculative_tokens;
  return engine;
}

Result<serve::http::ServerOptions> server_options(const NetworkOptions& options) {
  serve::http::ServerOptions server;
  server.host = options.host;
  server.port = options.port;
  server.num_threads = options.threads;
  server.max_connections = options.max_connections;
  KVANT_ASSIGN(const int64_t body, parse_bytes(options.max_body));
  server.max_body_bytes = static_cast<size_t>(body);
  server.max_bodies_bytes = std::max(server.max_bodies_bytes, 4 * body);
  server.header_timeout = milliseconds(options.header_seconds);
  server.body_timeout = milliseconds(options.body_seconds);
  return server;
}

}  // namespace kvant::tools
