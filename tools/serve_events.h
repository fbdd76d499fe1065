// `kvant serve --kv-events ...`: telling routers what the prefix cache holds (docs/kv-events.md).
#pragma once

#include <memory>
#include <string>

#include "kvant/base/result.h"
#include "kvant/serve/events/kv_event_source.h"
#include "kvant/serve/monitor/metrics.h"
#include "kvant/serve/monitor/observers.h"

namespace CLI {
class App;
}

namespace kvant::tools {

struct EventOptions {
  std::string endpoint;  // empty: none
  std::string config;    // JSON, may be empty
  std::string address;   // HOST:PORT for {address} in the topic; empty: where the server listens
};

void add_event_group(CLI::App& app, EventOptions& options);

// Outlives the engine.
struct EventSender {
  std::unique_ptr<serve::KvEventPublisher> publisher;
  std::unique_ptr<serve::KvEventSource> source;

  // Adds itself to who watches the engine and its pages, and to the metrics.
  void watch(serve::EngineObservers& engine, serve::PageObservers& pages, serve::Metrics& metrics);
};

// What events are about.
struct EventSubject {
  std::string listens_at;  // HOST:PORT of the server
  std::string model_name;
  int page_tokens = 64;
  int num_groups = 1;
};

// Null without --kv-events and --kv-events-config, or with one that is switched off.
// kInvalidArgument, kIoError.
Result<std::unique_ptr<EventSender>> start_events(const EventOptions& options,
                                                  const EventSubject& subject);

}  // namespace kvant::tools
