// Arbitrary config.json files (--weights dummy): a configuration that parses describes a model.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "kvant/model/config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvant;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const Result<model::ModelConfig> config = model::parse_config_json(text);
  if (!config) return 0;
  if (config->num_layers < 1 || config->head_dim < 1 || config->geometry_id().empty()) std::abort();
  return 0;
}
