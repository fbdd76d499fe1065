#include "kvant/model/memory_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "kvant/model/blocks.h"

namespace kvant::model {

Status check_runtime(const RuntimeOptions& runtime) {
  const auto bad = [](std::string text) {
    return Error(ErrorCode::kInvalidArgument, std::move(text));
  };
  if (runtime.context_tokens < 1 || runtime.context_tokens > (int64_t{1} << 30)) {
    return bad(fmt::format("a context of {} tokens; expected 1 to 2^30", runtime.context_tokens));
  }
  if (runtime.max_sequences < 1 || runtime.max_step_tokens < 1 || runtime.max_logit_rows < 1 ||
      runtime.total_tokens < 0) {
    return bad("sequences, tokens and rows of logits of a step must be at least 1");
  }
  return {};
}

int step_tokens(const RuntimeOptions& runtime) {
  // A step never holds more than the context of all sequences.
  return static_cast<int>(
      std::min<int64_t>(runtime.max_step_tokens, runtime.context_tokens * runtime.max_sequences));
}

backend::WorkspaceNeeds workspace_needs(const ModelConfig& config, const RuntimeOptions& runtime) {
  backend::WorkspaceNeeds needs;
  needs.num_layers = config.num_layers;
  needs.max_rows = std::max(step_tokens(runtime), runtime.max_logit_rows);
  needs.max_context = runtime.context_tokens;
  needs.max_cols = std::max({config.dim, config.num_query_heads * config.head_dim,
                             config.num_experts > 0 ? config.expert_dim : config.ffn_dim});
  needs.num_query_heads = config.num_query_heads;
  needs.num_kv_heads = config.num_kv_heads;
  needs.head_dim = config.head_dim;
  needs.page_tokens = runtime.page_tokens;
  needs.max_sequences = runtime.max_sequences;
  needs.num_experts = config.num_experts;
  needs.num_experts_used = config.num_experts_used;
  needs.expert_dim = config.expert_dim;
  const auto transforms = [](const formats::CacheFormat& format) {
    return format.k.smooth || format.k.rotate || format.k.bias || format.v.rotate || format.v.bias;
  };
  needs.transforms =
      transforms(runtime.format) || std::ranges::any_of(runtime.layer_formats, transforms);
  const auto pre_rope = [](const formats::CacheFormat& format) { return format.k.pre_rope; };
  needs.pre_rope = pre_rope(runtime.format) || std::ranges::any_of(runtime.layer_formats, pre_rope);
  return needs;
}

HostRowBytes host_row_bytes(const ModelConfig& config, const backend::Backend& backend,
                            const RuntimeOptions& runtime) {
  const backend::BackendInfo& info = backend.info();
  if (info.host_memory && info.activation_type == backend::ActivationType::kF32) return {};
  const int64_t rows = runtime.max_logit_rows;
  const auto aligned = [rows](size_t bytes_of_row) {
    return (rows * static_cast<int64_t>(bytes_of_row) + 255) / 256 * 256;
  };
  HostRowBytes bytes;
  bytes.maxima = aligned(sizeof(backend::RowMaximum));
  if (info.has_queries) {
    bytes.queries = aligned(sizeof(backend::RowQuery));
    bytes.choices = aligned(sizeof(backend::RowChoice));
    bytes.candidates = aligned(backend::kMostCandidates * sizeof(backend::RowMaximum));
  }
  bytes.logits = rows * config.vocab_size * int64_t{sizeof(float)};
  return bytes;
}

Status check_formats(const backend::Backend& backend, const ModelConfig& config,
                     const RuntimeOptions& runtime) {
  const auto check = [&](const formats::CacheFormat& format) {
    return backend.supports(format, config.head_dim, config.query_heads_per_kv_head());
  };
  KVANT_TRY(check(runtime.format));
  for (const formats::CacheFormat& format : runtime.layer_formats) KVANT_TRY(check(format));
  return {};
}

Result<std::optional<formats::QuantPlan>> fitted_plan(const ModelConfig& config,
                                                      const RuntimeOptions& runtime) {
  if (runtime.plan == nullptr) return std::optional<formats::QuantPlan>();
  KVANT_TRY(check_plan_geometry(*runtime.plan, config));
  const auto fit = [&](const formats::CacheFormat& format) -> Result<formats::QuantPlan> {
    KVANT_ASSIGN(formats::FittedPlan fitted, formats::fit_plan(*runtime.plan, format));
    KVANT_TRY(formats::check_plan(fitted.plan, format, config.num_layers, config.num_kv_heads,
                                  config.head_dim));
    fitted.plan.layers.resize(config.num_layers);  // a file lists only layers that have something
    return std::move(fitted.plan);
  };
  KVANT_ASSIGN(formats::QuantPlan plan, fit(runtime.format));
  const size_t layers = std::min(runtime.layer_formats.size(), plan.layers.size());
  for (size_t i = 0; i < layers; ++i) {
    if (runtime.layer_formats[i] == runtime.format) continue;
    KVANT_ASSIGN(const formats::QuantPlan other, fit(runtime.layer_formats[i]));
    plan.layers[i] = other.layers[i];
  }
  return std::optional(std::move(plan));
}

cache::CacheConfig cache_config(const ModelConfig& config, const backend::Backend& backend,
                                const RuntimeOptions& runtime,
                                const std::optional<formats::QuantPlan>& plan) {
  cache::CacheConfig cache;
  cache.layers = config.layer_geometry();
  cache.format = runtime.format;
  cache.layer_formats = runtime.layer_formats;
  cache.plan = plan ? &*plan : nullptr;
  cache.page_tokens = runtime.page_tokens;
  cache.layout = backend.info().page_layout;
  cache.max_tokens = runtime.total_tokens > 0 ? runtime.total_tokens
                                              : runtime.context_tokens * runtime.max_sequences;
  cache.max_sequence_tokens = runtime.context_tokens;
  cache.held_sink_pages = runtime.held_sink_pages;
  cache.held_windows = runtime.held_windows;
  cache.max_sequences = runtime.max_sequences;
  cache.max_step_tokens = step_tokens(runtime);
  return cache;
}

Result<RuntimeOptions> fit_cache_memory(const ModelSource& source, const backend::Backend& backend,
                                        const RuntimeOptions& runtime, int64_t cache_bytes,
                                        const cache::HeldShares& shares) {
  KVANT_TRY(check_runtime(runtime));
  KVANT_TRY(check_formats(backend, source.config(), runtime));
  KVANT_ASSIGN(const auto quant_plan, fitted_plan(source.config(), runtime));
  KVANT_ASSIGN(const cache::CacheConfig fitted,
               cache::fit_cache_bytes(cache_config(source.config(), backend, runtime, quant_plan),
                                      cache_bytes, shares));
  RuntimeOptions result = runtime;
  result.total_tokens = fitted.max_tokens;
  result.held_sink_pages = fitted.held_sink_pages;
  result.held_windows = fitted.held_windows;
  return result;
}

Status check_plan_geometry(const formats::QuantPlan& plan, const ModelConfig& config) {
  if (plan.geometry_id == config.geometry_id()) return {};
  return Error(ErrorCode::kInvalidArgument,
               fmt::format("the plan was made for a model of geometry '{}', this one is '{}'; use "
                           "the plan of this model, or make one (`kvant calibrate`)",
                           plan.geometry_id, config.geometry_id()));
}

int64_t MemoryPlan::total() const {
  return weights.matrices + weights.parameters + cache.stored_pages_reserved +
         cache.bf16_pages_reserved + cache.staging + cache.tables + activations + backend_workspace;
}

int64_t MemoryPlan::peak() const {
  return std::max(total(), weights.loading_peak);
}

Result<MemoryPlan> plan_memory(const ModelSource& source, const backend::Backend& backend,
                               const RuntimeOptions& runtime) {
  KVANT_TRY(check_runtime(runtime));
  const ModelConfig& config = source.config();
  KVANT_TRY(check_formats(backend, config, runtime));
  MemoryPlan plan;
  KVANT_ASSIGN(plan.weights, plan_weights(source, backend));
  KVANT_ASSIGN(const auto quant_plan, fitted_plan(config, runtime));
  const cache::CacheConfig cache = cache_config(config, backend, runtime, quant_plan);
  KVANT_ASSIGN(plan.cache, cache::plan_cache_bytes(cache));
  KVANT_ASSIGN(plan.groups, cache::plan_group_bytes(cache));
  plan.activations =
      layout_activations(config, backend.info().activation_type, step_tokens(runtime),
                         runtime.max_logit_rows, nullptr, nullptr) +
      host_row_bytes(config, backend, runtime).total();
  plan.backend_workspace = backend.workspace_bytes(workspace_needs(config, runtime));
  return plan;
}

}  // namespace kvant::model
