// The options of `kvant serve`, in groups. A group of options that something else brings (tiers,
// events) is one more struct here, one more function in serve_options.cc and one line in
// add_serve_options().
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/serve/engine.h"
#include "kvant/serve/http/server.h"
#include "tools/model_options.h"
#include "tools/serve_events.h"
#include "tools/serve_tiers.h"

namespace CLI {
class App;
}

namespace kvant::tools {

struct CacheOptions {
  std::vector<std::string> kv;
  std::string memory;  // size, may be empty
  bool no_prefix_caching = false;
  std::string eviction = "lru";
};

struct SchedulerOptions {
  int max_num_seqs = 0;            // 0: by the backend
  int max_num_batched_tokens = 0;  // 0: by the backend
  int64_t max_waiting = 1024;
  int speculative_tokens = 0;
};

struct NetworkOptions {
  std::string host = "127.0.0.1";
  int port = 8000;
  int threads = 1;
  int64_t max_connections = 1024;
  std::string max_body = "8MiB";
  double header_seconds = 10;
  double body_seconds = 60;
  double drain_seconds = 30;
};

struct AccessOptions {
  std::vector<std::string> served_model_names;
  std::string api_key_file;
  std::string tool_call_parser;  // empty: by the template
};

struct LogOptions {
  std::string level = "info";
  bool no_access_log = false;
};

struct MonitorOptions {
  int64_t quality_prompts = 64;  // one page in so many prompts is measured; 0: none
};

struct ServeOptions {
  ModelOptions model;
  CacheOptions cache;
  SchedulerOptions scheduler;
  NetworkOptions network;
  AccessOptions access;
  LogOptions log;
  MonitorOptions monitor;
  EventOptions events;
  TierOptions tiers;
  std::string config;  // a YAML file with more options
};

// Adds all groups and --config.
void add_serve_options(CLI::App& app, ServeOptions& options);

// What model, cache and batches are sized for: the context, then the pages that the memory for
// them buys. kInvalidArgument, kResourceExhausted.
Result<serve::EngineOptions> engine_options(const ServeOptions& options, const OpenModel& open,
                                            const KvChoice& kv);
Result<serve::http::ServerOptions> server_options(const NetworkOptions& options);

}  // namespace kvant::tools
