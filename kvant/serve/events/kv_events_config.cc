#include "kvant/serve/events/kv_events_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>

namespace kvant::serve {
namespace {

using Json = nlohmann::json;

constexpr std::string_view kKeys =
    "enable_kv_cache_events, publisher, endpoint, replay_endpoint, buffer_steps, hwm, "
    "max_queue_size, topic, encoding";

Error invalid(std::string message) {
  return Error(ErrorCode::kInvalidArgument, std::move(message));
}

Error wrong_type(const std::string& key, const char* expected, const Json& value) {
  return invalid(fmt::format("KV events: \"{}\" is {}; expected {}", key,
                             value.dump(-1, ' ', true, Json::error_handler_t::replace), expected));
}

Status take(const std::string& key, const Json& value, bool& out) {
  if (!value.is_boolean()) return wrong_type(key, "true or false", value);
  out = value.get<bool>();
  return {};
}

Status take(const std::string& key, const Json& value, std::string& out) {
  if (value.is_null()) return {};
  if (!value.is_string()) return wrong_type(key, "a string", value);
  out = value.get<std::string>();
  return {};
}

template <typename Int>
Status take_number(const std::string& key, const Json& value, Int lowest, Int& out) {
  constexpr int64_t kMost = 100'000'000;
  if (!value.is_number_integer() || value < lowest || value > kMost) {
    return wrong_type(key, fmt::format("a whole number from {} to {}", lowest, kMost).c_str(),
                      value);
  }
  out = value.get<Int>();
  return {};
}

Status take_encoding(const std::string& key, const Json& value, KvEventEncoding& out) {
  if (value == "map") {
    out = KvEventEncoding::kMap;
  } else if (value == "array") {
    out = KvEventEncoding::kArray;
  } else {
    return wrong_type(key, "\"map\" or \"array\"", value);
  }
  return {};
}

Status take_key(const std::string& key, const Json& value, KvEventsConfig& config) {
  if (key == "enable_kv_cache_events") return take(key, value, config.enable_kv_cache_events);
  if (key == "publisher") return take(key, value, config.publisher);
  if (key == "endpoint") return take(key, value, config.endpoint);
  if (key == "replay_endpoint") return take(key, value, config.replay_endpoint);
  if (key == "buffer_steps") return take_number<int64_t>(key, value, 0, config.buffer_steps);
  if (key == "hwm") return take_number<int>(key, value, 1, config.hwm);
  if (key == "max_queue_size") return take_number<int64_t>(key, value, 1, config.max_queue_size);
  if (key == "topic") return take(key, value, config.topic);
  if (key == "encoding") return take_encoding(key, value, config.encoding);
  return invalid(fmt::format("KV events: unknown key \"{}\"; known are {}", key, kKeys));
}

Status check_endpoint(const char* what, std::string_view endpoint) {
  for (const std::string_view scheme : {"tcp://", "ipc://", "inproc://"}) {
    if (endpoint.starts_with(scheme) && endpoint.size() > scheme.size()) return {};
  }
  return invalid(
      fmt::format("KV events: {} is '{}'; expected tcp://HOST:PORT, ipc://PATH or inproc://NAME",
                  what, endpoint));
}

void replace_all(std::string& text, std::string_view what, std::string_view by) {
  for (size_t at = 0; (at = text.find(what, at)) != std::string::npos; at += by.size()) {
    text.replace(at, what.size(), by);
  }
}

}  // namespace

Result<KvEventsConfig> parse_kv_events_config(std::string_view json) {
  const Json object = Json::parse(json, nullptr, false);
  if (!object.is_object()) {
    return invalid(fmt::format("KV events: expected a JSON object with keys of {}", kKeys));
  }
  KvEventsConfig config;
  for (const auto& [key, value] : object.items()) KVANT_TRY(take_key(key, value, config));
  KVANT_TRY(check_kv_events_config(config));
  return config;
}

Result<KvEventsConfig> kv_events_config_for(std::string_view endpoint) {
  KvEventsConfig config;
  config.enable_kv_cache_events = true;
  config.endpoint = endpoint;
  KVANT_TRY(check_kv_events_config(config));
  return config;
}

Status check_kv_events_config(const KvEventsConfig& config) {
  if (!config.publisher.empty() && config.publisher != "zmq" && config.publisher != "null") {
    return invalid(fmt::format("KV events: publisher is '{}'; expected \"zmq\" or \"null\"",
                               config.publisher));
  }
  KVANT_TRY(check_endpoint("endpoint", config.endpoint));
  if (!config.replay_endpoint.empty()) {
    KVANT_TRY(check_endpoint("replay_endpoint", config.replay_endpoint));
  }
  return {};
}

bool kv_endpoint_binds(std::string_view endpoint) {
  return endpoint.find('*') != std::string_view::npos ||
         endpoint.find("::") != std::string_view::npos || endpoint.starts_with("ipc://") ||
         endpoint.starts_with("inproc://");
}

Result<std::string> kv_endpoint_of_rank(const std::string& endpoint, int rank) {
  if (rank == 0) return endpoint;
  if (endpoint.starts_with("inproc://")) return fmt::format("{}_dp{}", endpoint, rank);
  const size_t colon = endpoint.rfind(':');
  int port = 0;
  const char* const first = endpoint.data() + colon + 1;
  const char* const last = endpoint.data() + endpoint.size();
  const auto [end, error] = std::from_chars(first, last, port);
  if (!endpoint.starts_with("tcp://") || error != std::errc() || end != last || port < 1 ||
      port + rank > 65535) {
    return invalid(fmt::format(
        "KV events: rank {} needs its own endpoint, but '{}' has no TCP port to count from", rank,
        endpoint));
  }
  return fmt::format("{}:{}", endpoint.substr(0, colon), port + rank);
}

Result<std::string> kv_topic(std::string_view topic, std::string_view address,
                             std::string_view model) {
  std::string text(topic);
  replace_all(text, "{address}", address);
  replace_all(text, "{model}", model);
  if (text.starts_with("kv@") && (std::count(text.begin(), text.end(), '@') != 2 ||
                                  text.find("@@") != std::string::npos || text.back() == '@')) {
    return invalid(fmt::format(
        "KV events: the topic is '{}'; llm-d expects kv@ADDRESS@MODEL without any other '@' (give "
        "the model a name without one)",
        text));
  }
  return text;
}

}  // namespace kvant::serve
