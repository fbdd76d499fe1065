// How KV events are published: vLLM's KVEventsConfig (`--kv-events-config JSON`), and its short
// form (`--kv-events tcp://*:5557`). Plain values, thread-safe.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "kvant/base/result.h"
#include "kvant/serve/events/kv_event.h"

namespace kvant::serve {

// Names and defaults are vLLM's; `encoding` is kvant's own.
struct KvEventsConfig {
  bool enable_kv_cache_events = false;
  std::string publisher;                  // "zmq" or "null"; empty: zmq if enabled
  std::string endpoint = "tcp://*:5557";  // of the PUB socket: see kv_endpoint_binds
  std::string replay_endpoint;            // of the ROUTER socket, always bound; empty: none
  int64_t buffer_steps = 10'000;          // batches kept for replay
  int hwm = 100'000;                      // messages queued per subscriber; more are dropped
  int64_t max_queue_size = 100'000;       // batches between engine and publisher
  std::string topic;                      // first frame; {address}, {model}: see kv_topic
  KvEventEncoding encoding = KvEventEncoding::kMap;  // "map" or "array"

  bool publishes() const { return enable_kv_cache_events && publisher != "null"; }
};

// A JSON object with these names. kInvalidArgument names the key that is unknown, of another type
// or out of range, and what is allowed.
Result<KvEventsConfig> parse_kv_events_config(std::string_view json);

// The short form: an endpoint, enabled.
Result<KvEventsConfig> kv_events_config_for(std::string_view endpoint);

// kInvalidArgument: values that no publisher could start with.
Status check_kv_events_config(const KvEventsConfig& config);

// vLLM's rule: a PUB socket binds to endpoints with '*' or "::" in them and to ipc:// and
// inproc:// ones, and connects to any other (the subscriber binds then).
bool kv_endpoint_binds(std::string_view endpoint);

// The endpoint of one data-parallel rank: TCP ports are base + rank, inproc names end in _dp<rank>.
// kInvalidArgument if rank > 0 and the endpoint has no number to count from.
Result<std::string> kv_endpoint_of_rank(const std::string& endpoint, int rank);

// The topic with {address} (ip:port at which gateways reach this server) and {model} filled in.
// llm-d reads `kv@{address}@{model}` and splits it at '@': kInvalidArgument if a topic that begins
// with "kv@" does not have exactly these two parts after it.
Result<std::string> kv_topic(std::string_view topic, std::string_view address,
                             std::string_view model);

}  // namespace kvant::serve
