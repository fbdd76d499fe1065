// Qwen3: the Llama block with an RMS norm on each head's query and key.
#include "kvant/model/arch/registry.h"

namespace kvant::model {
namespace {

Status configure(const ConfigSource& source, ModelConfig& config) {
  config.qk_norm = true;
  config.qkv_bias = source.has_tensor("blk.0.attn_q.bias").value_or(false);
  return {};
}

}  // namespace

const Architecture qwen3_architecture = {
    .name = "qwen3",
    .hf_type = "qwen3",
    .summary = "Qwen3, dense",
    .configure = configure,
};

}  // namespace kvant::model
