// Gemma 3: norms before and after each half of a block, norms on queries and keys, a scaled
// embedding, and five layers with a window for each layer with full attention.
#include <cmath>

#include "kvant/model/arch/registry.h"

namespace kvant::model {
namespace {

constexpr int kLayersOf27b =
    62;  // the size that scales its scores by dim / heads instead of head_dim

Status configure(const ConfigSource& source, ModelConfig& config) {
  config.gate = backend::GateKind::kGeluTanh;
  config.qk_norm = true;
  config.post_norms = true;
  config.embedding_scale = std::sqrt(static_cast<float>(config.dim));
  const int score_dim =
      config.num_layers == kLayersOf27b ? config.dim / config.num_query_heads : config.head_dim;
  config.attention_scale = 1.0f / std::sqrt(static_cast<float>(score_dim));
  KVANT_ASSIGN(const double softcap, source.number_or("final_logit_softcapping", 0));
  config.logit_softcap = static_cast<float>(softcap);

  // Neither the pattern nor the local base is in every file.
  KVANT_ASSIGN(const int window, source.integer("attention.sliding_window", {1, 1 << 30}));
  KVANT_ASSIGN(const int pattern,
               source.integer("attention.sliding_window_pattern", {1, 1 << 16}, 6));
  KVANT_ASSIGN(const double local_base, source.number_or("rope.freq_base_swa", 10000));
  config.rope.local_base = static_cast<float>(local_base);
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const bool global = (layer + 1) % pattern == 0;
    config.layer_window[layer] = global ? 0 : window;
  }
  return {};
}

}  // namespace

const Architecture gemma3_architecture = {
    .name = "gemma3",
    .hf_type = "gemma3_text",
    .summary = "Gemma 3, text",
    .configure = configure,
};

}  // namespace kvant::model
