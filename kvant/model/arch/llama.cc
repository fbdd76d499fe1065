// Llama 1 to 3, Mistral, SmolLM2 and other models of that shape; Mixtral is the same with experts.
#include "kvant/model/arch/registry.h"

namespace kvant::model {
namespace {

Status configure(const ConfigSource& source, ModelConfig& config) {
  config.qkv_bias = source.has_tensor("blk.0.attn_q.bias").value_or(false);
  // The converter to GGUF permutes the rows of Q and K; other sources have them in our order.
  config.adjacent_rope_rows = source.has_tensor("token_embd.weight").has_value();
  return {};
}

}  // namespace

const Architecture llama_architecture = {
    .name = "llama",
    .hf_type = "llama",
    .summary = "Llama 1 to 3, Mistral, SmolLM2, Mixtral",
    .configure = configure,
};

}  // namespace kvant::model
