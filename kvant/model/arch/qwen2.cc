// Qwen2 and Qwen2.5: the Llama block with biases on Q, K and V.
#include "kvant/model/arch/registry.h"

namespace kvant::model {
namespace {

Status configure(const ConfigSource& source, ModelConfig& config) {
  config.qkv_bias = source.has_tensor("blk.0.attn_q.bias").value_or(true);
  return {};
}

}  // namespace

const Architecture qwen2_architecture = {
    .name = "qwen2",
    .hf_type = "qwen2",
    .summary = "Qwen2, Qwen2.5",
    .configure = configure,
};

}  // namespace kvant::model
