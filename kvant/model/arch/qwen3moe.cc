// Qwen3 mixture of experts: Qwen3's attention, experts in place of the feed-forward part.
#include "kvant/model/arch/registry.h"

namespace kvant::model {
namespace {

Status configure(const ConfigSource& source, ModelConfig& config) {
  (void)source;
  config.qk_norm = true;
  if (config.num_experts == 0) {
    return Error(ErrorCode::kCorruptData,
                 "expert_count is absent or 0; a qwen3moe model has at least one expert");
  }
  return {};
}

}  // namespace

const Architecture qwen3moe_architecture = {
    .name = "qwen3moe",
    .hf_type = "qwen3_moe",
    .summary = "Qwen3, mixture of experts",
    .configure = configure,
};

}  // namespace kvant::model
