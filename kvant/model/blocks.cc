#include "kvant/model/blocks.h"

#include <fmt/format.h>

#include <array>

namespace kvant::model {
namespace {

using backend::LinearTarget;

backend::RmsNormArgs norm_args(const StepContext& step, const void* x, const float* weight,
                               void* out) {
  return {.x = x,
          .weight = weight,
          .out = out,
          .num_rows = step.num_rows,
          .dim = step.config.dim,
          .epsilon = step.config.norm_epsilon};
}

Status norm(const StepContext& step, const void* x, const float* weight, void* out) {
  return step.backend.rms_norm(norm_args(step, x, weight, out));
}

// Norms each head of q or k in place: a head is a row.
Status norm_heads(const StepContext& step, void* heads, int num_heads, const float* weight) {
  return step.backend.rms_norm({.x = heads,
                                .weight = weight,
                                .out = heads,
                                .num_rows = step.num_rows * num_heads,
                                .dim = step.config.head_dim,
                                .epsilon = step.config.norm_epsilon});
}

// x += matrix(from), with a norm between if the architecture has one.
Status join(const StepContext& step, const void* from, const backend::Matrix* matrix,
            const float* post_norm) {
  const Activations& act = step.act;
  if (post_norm == nullptr) {
    const LinearTarget target{.matrix = matrix, .out = act.x, .accumulate = true};
    return step.backend.linear(from, step.num_rows, std::span(&target, 1));
  }
  const LinearTarget target{.matrix = matrix, .out = act.branch};
  KVANT_TRY(step.backend.linear(from, step.num_rows, std::span(&target, 1)));
  KVANT_TRY(norm(step, act.branch, post_norm, act.branch));
  return step.backend.add(act.branch, act.x, step.num_rows * step.config.dim);
}

Status mixture_of_experts(const StepContext& step, const LayerWeights& layer) {
  const Activations& act = step.act;
  const ModelConfig& config = step.config;
  KVANT_TRY(step.backend.moe({.x = act.normed,
                              .out = act.branch,
                              .num_rows = step.num_rows,
                              .num_experts = config.num_experts,
                              .num_experts_used = config.num_experts_used,
                              .normalize_weights = config.normalize_expert_weights,
                              .gate = config.gate,
                              .router = layer.router.get(),
                              .gate_proj = layer.expert_gate_list,
                              .up_proj = layer.expert_up_list,
                              .down_proj = layer.expert_down_list}));
  if (layer.post_ffn_norm != nullptr) {
    KVANT_TRY(norm(step, act.branch, layer.post_ffn_norm, act.branch));
  }
  return step.backend.add(act.branch, act.x, step.num_rows * config.dim);
}

Status join_feed_forward(const StepContext& step, const LayerWeights& layer) {
  const Activations& act = step.act;
  if (layer.router != nullptr) {
    KVANT_TRY(norm(step, act.x, layer.ffn_norm, act.normed));
    return mixture_of_experts(step, layer);
  }
  KVANT_TRY(step.backend.norm_gated({.norm = norm_args(step, act.x, layer.ffn_norm, act.normed),
                                     .kind = step.config.gate,
                                     .gate = layer.gate.get(),
                                     .up = layer.up.get(),
                                     .out = act.gate,
                                     .up_scratch = act.up}));
  return join(step, act.gate, layer.down.get(), layer.post_ffn_norm);
}

}  // namespace

int64_t layout_activations(const ModelConfig& config, backend::ActivationType type,
                           int64_t max_rows, int64_t max_logit_rows, std::byte* base,
                           Activations* out) {
  int64_t bytes = 0;
  const auto take = [&](int64_t num_rows, int64_t width) -> void* {
    void* at = base == nullptr ? nullptr : base + bytes;
    bytes += (backend::activation_bytes(type, num_rows * width) + 127) / 128 * 128;
    return at;
  };
  const int64_t q_width = static_cast<int64_t>(config.num_query_heads) * config.head_dim;
  const int64_t kv_width = static_cast<int64_t>(config.num_kv_heads) * config.head_dim;
  Activations act;
  act.x = take(max_rows, config.dim);
  act.normed = take(max_rows, config.dim);
  act.branch = take(max_rows, config.dim);
  act.q = take(max_rows, q_width);
  act.k = take(max_rows, kv_width);
  act.v = take(max_rows, kv_width);
  act.attended = take(max_rows, q_width);
  if (config.num_experts == 0) {
    act.gate = take(max_rows, config.ffn_dim);
    act.up = take(max_rows, config.ffn_dim);
  }
  act.logits = take(max_logit_rows, config.vocab_size);
  if (out != nullptr) *out = act;
  return bytes;
}

Status project(const StepContext& step, const LayerWeights& layer, Projections projections) {
  const Activations& act = step.act;
  const ModelConfig& config = step.config;
  const bool queries = projections == Projections::kAll;
  const std::array<LinearTarget, 3> targets = {{
      {.matrix = layer.k.get(), .bias = layer.k_bias, .out = act.k},
      {.matrix = layer.v.get(), .bias = layer.v_bias, .out = act.v},
      {.matrix = layer.q.get(), .bias = layer.q_bias, .out = act.q},
  }};
  KVANT_TRY(step.backend.norm_linear(norm_args(step, act.x, layer.attention_norm, act.normed),
                                     std::span(targets).first(queries ? 3 : 2)));
  if (layer.q_norm != nullptr && queries) {
    KVANT_TRY(norm_heads(step, act.q, config.num_query_heads, layer.q_norm));
  }
  if (layer.k_norm != nullptr) {
    KVANT_TRY(norm_heads(step, act.k, config.num_kv_heads, layer.k_norm));
  }
  return {};
}

Status append_rotated(const StepContext& step, const attention::RopeParams& rope,
                      const cache::KvCache& cache, int index, Projections projections) {
  const Activations& act = step.act;
  const ModelConfig& config = step.config;
  const bool queries = projections == Projections::kAll;
  const cache::KvCache::LayerPlace place = cache.place(index);
  const cache::GroupView& view = cache.view(place.group);
  // With +prerope the cache holds keys as they are here; attention rotates what it reads.
  const bool rotate_keys = !view.kinds[cache::kKindStored].k_format[place.index].pre_rope;
  return step.backend.rope_append(
      {.q = act.q,
       .k = act.k,
       .positions = step.positions.data(),
       .num_rows = step.num_rows,
       .num_query_heads = queries ? config.num_query_heads : 0,
       .num_kv_heads = rotate_keys ? config.num_kv_heads : 0,
       .head_dim = config.head_dim,
       .rope = rope},
      {.view = &view, .group_layer = place.index, .k = act.k, .v = act.v});
}

Status attend(const StepContext& step, const attention::RopeParams& rope,
              const cache::KvCache& cache, int index) {
  const cache::KvCache::LayerPlace place = cache.place(index);
  backend::AttentionArgs args;
  args.view = &cache.view(place.group);
  args.group_layer = place.index;
  args.params.num_query_heads = step.config.num_query_heads;
  args.params.scale = step.config.attention_scale;
  args.params.softcap = step.config.attention_softcap;
  args.params.rope = rope;
  args.q = step.act.q;
  args.out = step.act.attended;
  return step.backend.attention(args);
}

Status join_layer(const StepContext& step, const LayerWeights& layer) {
  KVANT_TRY(join(step, step.act.attended, layer.attention_out.get(), layer.post_attention_norm));
  return join_feed_forward(step, layer);
}

}  // namespace kvant::model
