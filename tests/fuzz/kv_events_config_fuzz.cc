// Arbitrary text as --kv-events-config: it is refused with a message, or a publisher could start
// with it.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "kvant/serve/events/kv_events_config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvant::serve;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  if (const kvant::Result<KvEventsConfig> config = parse_kv_events_config(text)) {
    if (!check_kv_events_config(*config)) std::abort();
    (void)kv_endpoint_of_rank(config->endpoint, 1);
    (void)kv_topic(config->topic, "127.0.0.1:8000", "model");
  }
  (void)kv_events_config_for(text);
  return 0;
}
