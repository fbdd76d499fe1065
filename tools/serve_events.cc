#include "tools/serve_events.h"

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <optional>
#include <utility>

namespace kvant::tools {
namespace {

using serve::KvEventsConfig;

Result<std::optional<KvEventsConfig>> read_config(const EventOptions& options) {
  if (!options.endpoint.empty() && !options.config.empty()) {
    return Error(ErrorCode::kInvalidArgument,
                 "--kv-events and --kv-events-config exclude each other; the endpoint can stand in "
                 "the latter");
  }
  if (!options.endpoint.empty()) {
    KVANT_ASSIGN(KvEventsConfig config, serve::kv_events_config_for(options.endpoint));
    return std::optional(std::move(config));
  }
  if (options.config.empty()) return std::optional<KvEventsConfig>();
  KVANT_ASSIGN(KvEventsConfig config, serve::parse_kv_events_config(options.config));
  if (!config.publishes()) return std::optional<KvEventsConfig>();
  return std::optional(std::move(config));
}

// An address that says "any" cannot be what a gateway knows the server by.
Result<std::string> address_of(const EventOptions& options, const EventSubject& subject,
                               std::string_view topic) {
  if (!options.address.empty()) return options.address;
  const bool any = subject.listens_at.starts_with("0.0.0.0:") ||
                   subject.listens_at.starts_with("[::]:") || subject.listens_at.ends_with(":0");
  if (any && topic.find("{address}") != std::string_view::npos) {
    return Error(ErrorCode::kInvalidArgument,
                 fmt::format("the topic '{}' needs --kv-events-address IP:PORT: the server listens "
                             "at {}, which no gateway knows it by",
                             topic, subject.listens_at));
  }
  return subject.listens_at;
}

}  // namespace

void add_event_group(CLI::App& app, EventOptions& options) {
  const std::string group = "KV events";
  app.add_option("--kv-events", options.endpoint,
                 "Publish what the prefix cache holds at this ZMQ endpoint, e.g. tcp://*:5557")
      ->type_name("ENDPOINT")
      ->group(group);
  app.add_option("--kv-events-config", options.config,
                 "The same in full: a JSON object with vLLM's keys (docs/kv-events.md)")
      ->type_name("JSON")
      ->group(group);
  app.add_option("--kv-events-address", options.address,
                 "What {address} in the topic stands for: IP:PORT by which gateways know this "
                 "server (default: where it listens)")
      ->type_name("IP:PORT")
      ->group(group);
}

Result<std::unique_ptr<EventSender>> start_events(const EventOptions& options,
                                                  const EventSubject& subject) {
  KVANT_ASSIGN(std::optional<KvEventsConfig> config, read_config(options));
  if (!config) return std::unique_ptr<EventSender>();
  KVANT_ASSIGN(const std::string address, address_of(options, subject, config->topic));
  KVANT_ASSIGN(config->topic, serve::kv_topic(config->topic, address, subject.model_name));
  auto sender = std::make_unique<EventSender>();
  KVANT_ASSIGN(sender->publisher, serve::KvEventPublisher::create(*config));
  sender->source = std::make_unique<serve::KvEventSource>(*sender->publisher, subject.page_tokens,
                                                          subject.num_groups);
  return sender;
}

void EventSender::watch(serve::EngineObservers& engine, serve::PageObservers& pages,
                        serve::Metrics& metrics) {
  pages.add(*source);
  engine.after_step([told = source.get()] { told->end_step(); });
  metrics.watch_events([from = publisher.get()] {
    const serve::KvEventStats stats = from->stats();
    return serve::EventCounts{.batches = stats.batches_published,
                              .events = stats.events_published,
                              .dropped = stats.batches_dropped,
                              .missed = stats.batches_missed,
                              .replays = stats.replays,
                              .queue = stats.queue_batches,
                              .subscriptions = stats.subscriptions};
  });
}

}  // namespace kvant::tools
