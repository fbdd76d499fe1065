#include "kvant/cache/cache_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "kvant/formats/codec.h"

namespace kvant::cache {

using formats::CacheFormat;
using formats::SideFormat;

namespace {

Error invalid(std::string message) {
  return Error(ErrorCode::kInvalidArgument, std::move(message));
}

std::string layer_name(int layer) {
  return "layer " + std::to_string(layer);
}

// ---- validation ----

Status check_plan_vector(const std::vector<float>& values, size_t expected, bool positive,
                         const std::string& name) {
  if (values.size() != expected) {
    return invalid(name + ": the plan has " + std::to_string(values.size()) + " values, " +
                   std::to_string(expected) + " are needed; calibrate this model for this format");
  }
  for (const float value : values) {
    if (!std::isfinite(value) || (positive && value <= 0.0f))
      return invalid(name + ": " + std::to_string(value) + " is not " +
                     (positive ? "finite and positive" : "finite"));
  }
  return {};
}

// Every term that the side declares must be in the plan and plausible.
Status check_side_plan(const CacheConfig& config, int layer, const SideFormat& side, bool keys) {
  const std::string name = layer_name(layer) + (keys ? " k" : " v");
  if (!side.bias && !side.smooth && config.plan == nullptr) return {};
  if (config.plan == nullptr)
    return invalid(name +
                   ": +bias and +smooth need a quantisation plan; pass one made for this model");
  if (config.plan->layers.size() != config.layers.size()) {
    return invalid("the plan is for " + std::to_string(config.plan->layers.size()) +
                   " layers, the model has " + std::to_string(config.layers.size()));
  }
  const LayerGeometry& geometry = config.layers[layer];
  const formats::SidePlan& plan =
      keys ? config.plan->layers[layer].k : config.plan->layers[layer].v;
  const size_t vector = static_cast<size_t>(geometry.num_kv_heads) * geometry.head_dim;
  if (side.bias) KVANT_TRY(check_plan_vector(plan.bias, vector, false, name + " bias"));
  if (side.smooth) KVANT_TRY(check_plan_vector(plan.smooth, vector, true, name + " smooth"));
  const size_t scales = plan.global_scale.size();
  if (scales > 1)
    return check_plan_vector(plan.global_scale, geometry.num_kv_heads, true,
                             name + " global_scale");
  if (scales == 1) return check_plan_vector(plan.global_scale, 1, true, name + " global_scale");
  return {};
}

Status check_side(const CacheConfig& config, int layer, const SideFormat& side, bool keys) {
  const formats::FormatInfo& info = formats::format_info(side.base);
  const std::string name = layer_name(layer) + (keys ? " k=" : " v=") + std::string(info.name);
  const auto codec = formats::Codec::create(side, config.layers[layer].head_dim);
  if (!codec) return codec.error().with_context(name);
  return check_side_plan(config, layer, side, keys);
}

Status check_layer(const CacheConfig& config, int layer) {
  const LayerGeometry& g = config.layers[layer];
  if (g.head_dim % 16 != 0 || g.head_dim < 16 || g.head_dim > 512) {
    return Error(ErrorCode::kUnsupported, layer_name(layer) + ": head_dim is " +
                                              std::to_string(g.head_dim) +
                                              "; multiples of 16 from 16 to 512 are supported");
  }
  if (g.num_kv_heads < 1 || g.window < 0)
    return invalid(layer_name(layer) +
                   ": needs at least one KV head and a window that is not negative");
  const CacheFormat& format = layer_format(config, layer);
  if (format.sink != config.format.sink || format.recent_tokens != config.format.recent_tokens ||
      format.strict != config.format.strict) {
    return invalid(layer_name(layer) +
                   ": +sink, +recentN and +strict belong to the sequence: equal in all layers");
  }
  const Status known = formats::check_cache_format(format);
  if (!known) return known.error().with_context(layer_name(layer));
  KVANT_TRY(check_side(config, layer, format.k, true));
  return check_side(config, layer, format.v, false);
}

Status check_config(const CacheConfig& config) {
  const int t = config.page_tokens;
  if (t != 16 && t != 32 && t != 64 && t != 128)
    return invalid("page_tokens is " + std::to_string(t) + "; 16, 32, 64 and 128 are supported");
  if (config.layers.empty()) return invalid("a cache needs at least one layer");
  if (!config.layer_formats.empty() && config.layer_formats.size() != config.layers.size()) {
    return invalid(std::to_string(config.layer_formats.size()) + " layer formats for " +
                   std::to_string(config.layers.size()) + " layers");
  }
  constexpr int64_t kMaxTokens = int64_t{1} << 31;
  if (config.max_tokens < 1 || config.max_tokens > kMaxTokens) {
    return invalid("a context of " + std::to_string(config.max_tokens) +
                   " tokens is not possible; 1 to " + std::to_string(kMaxTokens) + " are");
  }
  if (config.max_sequences < 1 || config.max_step_tokens < 1)
    return invalid("max_sequences and max_step_tokens must be at least 1");
  if (config.max_sequence_tokens < 0 || config.held_sink_pages < 0 || config.held_windows < 0)
    return invalid("max_sequence_tokens, held_sink_pages and held_windows must not be negative");
  if (config.held_sink_pages > PagePool::kMaxSlots || config.held_windows > PagePool::kMaxSlots)
    return invalid("at most " + std::to_string(PagePool::kMaxSlots) + " pages can be held");
  if (config.format.recent_tokens < 0) return invalid("+recentN needs N >= 1");
  for (int layer = 0; layer < static_cast<int>(config.layers.size()); ++layer)
    KVANT_TRY(check_layer(config, layer));
  return {};
}

// ---- geometry of pages ----

void lay_out_pages(GroupPlan& plan, int page_tokens) {
  const LayerGeometry& g = plan.group.geometry;
  for (size_t i = 0; i < plan.group.layers.size(); ++i) {
    plan.bf16.push_back({});
    plan.stored_units.push_back(
        formats::unit_sections(plan.k[i], plan.v[i], page_tokens, g.head_dim));
    plan.bf16_units.push_back(formats::unit_sections({}, {}, page_tokens, g.head_dim));
    plan.stored_offset.push_back(plan.stored_page_bytes);
    plan.bf16_offset.push_back(plan.bf16_page_bytes);
    plan.staging_offset.push_back(0);
    plan.stored_page_bytes += plan.stored_units.back().bytes * g.num_kv_heads;
    plan.bf16_page_bytes += plan.bf16_units.back().bytes * g.num_kv_heads;
  }
  plan.staging_page_bytes = plan.bf16_units[0].bytes * g.num_kv_heads;
}

// ---- how many slots no sequence of legal steps can exceed ----

// Pages that begin in a step while as many BF16 pages as a resting sequence may hold are still
// there, all sequences together. In one sequence the first costs 2 new tokens (one fills the old
// page), each of up to `more` further ones page_tokens.
int64_t extra_open_pages(int64_t step_tokens, int64_t sequences, int64_t more, int page_tokens) {
  if (step_tokens <= 2 * sequences) return step_tokens / 2;
  return sequences + std::min(sequences * more, (step_tokens - 2 * sequences) / page_tokens);
}

// Pages that fill in a step: the first of a sequence costs one token.
int64_t filled_pages(int64_t step_tokens, int64_t sequences, int page_tokens) {
  if (step_tokens <= sequences) return step_tokens;
  return sequences + (step_tokens - sequences) / page_tokens;
}

// Full pages before its own that a query can reach.
int64_t window_pages(int64_t window, int page_tokens) {
  return (window - 1 + page_tokens - 1) / page_tokens;
}

void count_slots(GroupPlan& plan, const CacheConfig& config) {
  const int t = config.page_tokens;
  const int64_t s = config.max_sequences;
  const int64_t window = plan.group.geometry.window;
  const int64_t step = std::min<int64_t>(config.max_step_tokens, config.max_tokens);
  const int64_t full_pages = config.max_tokens / t;
  const int64_t all_pages = (config.max_tokens + s * (t - 1)) / t;  // partly filled ones included
  if (plan.plain) {
    plan.bf16_slots = all_pages;
    if (window > 0) {
      const int64_t extra = extra_open_pages(step, s, step, t);
      const int64_t pages = window_pages(window, t);
      plan.bf16_slots = std::min(all_pages, (s + config.held_windows) * pages + s + extra);
    }
    return;
  }
  const int64_t r = plan.recent_pages;
  const int64_t sink = plan.sink ? 1 : 0;
  plan.bf16_slots = std::min(all_pages, s * (r + 1 + sink) + extra_open_pages(step, s, r, t));
  if (plan.sink) plan.bf16_slots += config.held_sink_pages;
  plan.stored_slots = std::max<int64_t>(0, full_pages - r - sink);
  if (window > 0) {
    plan.stored_slots =
        std::min(plan.stored_slots,
                 (s + config.held_windows) * window_pages(window, t) + filled_pages(step, s, t));
  }
  plan.staging_slots = step / t;
}

Result<int> slab_class(CachePlan& plan, int64_t page_bytes, int64_t num_slots) {
  size_t i = 0;
  while (i < plan.classes.size() && plan.classes[i].page_bytes != page_bytes) ++i;
  if (i == plan.classes.size()) plan.classes.push_back({page_bytes, 0});
  PagePool::ClassSpec& spec = plan.classes[i];
  spec.num_slots += num_slots;
  if (spec.num_slots > PagePool::kMaxSlots ||
      spec.num_slots > std::numeric_limits<int64_t>::max() / 4 / page_bytes) {
    return invalid("this context needs " + std::to_string(spec.num_slots) + " pages of " +
                   std::to_string(page_bytes) + " bytes, at most " +
                   std::to_string(PagePool::kMaxSlots) +
                   " are possible; lower the context or use larger pages");
  }
  return static_cast<int>(i);
}

Result<GroupPlan> plan_group(const CacheConfig& config, LayerGroup group) {
  GroupPlan plan;
  plan.group = std::move(group);
  plan.plain = true;
  for (const int layer : plan.group.layers) {
    const CacheFormat& format = layer_format(config, layer);
    plan.k.push_back(format.k);
    plan.v.push_back(format.v);
    if (!format.is_bf16()) plan.plain = false;
  }
  const int t = config.page_tokens;
  const int window = plan.group.geometry.window;
  plan.recent_pages = (static_cast<int64_t>(config.format.recent_tokens) + t - 1) / t;
  // Where the recent pages cover the window nothing is ever read as stored, so nothing is encoded.
  if (window > 0 && plan.recent_pages >= window_pages(window, t)) plan.plain = true;
  if (plan.plain) plan.recent_pages = 0;
  plan.sink = !plan.plain && config.format.sink && window == 0;
  lay_out_pages(plan, config.page_tokens);
  count_slots(plan, config);
  return plan;
}

void sum_bytes(CachePlan& plan, const CacheConfig& config) {
  for (const GroupPlan& group : plan.groups) {
    plan.bytes.stored_pages_reserved += group.stored_slots * group.stored_page_bytes;
    plan.bytes.bf16_pages_reserved += group.bf16_slots * group.bf16_page_bytes;
    // One layer at a time uses the staging pages, so the groups share them.
    plan.staging_bytes =
        std::max(plan.staging_bytes, group.staging_slots * group.staging_page_bytes);
  }
  plan.bytes.staging = plan.staging_bytes;
  plan.pool_bytes = PagePool::metadata_bytes(plan.classes);
  plan.entry_bytes = static_cast<int64_t>(plan.groups.size()) * config.max_sequences * 2 *
                     plan.pages_per_sequence * static_cast<int64_t>(sizeof(PageEntry));
  for (int layer = 0; layer < static_cast<int>(config.layers.size()); ++layer)
    plan.param_bytes += layer_param_floats(config, layer) * static_cast<int64_t>(sizeof(float));
  plan.bytes.tables = plan.pool_bytes + plan.entry_bytes + plan.param_bytes;
}

}  // namespace

const CacheFormat& layer_format(const CacheConfig& config, int layer) {
  return config.layer_formats.empty() ? config.format : config.layer_formats[layer];
}

int64_t layer_param_floats(const CacheConfig& config, int layer) {
  const CacheFormat& format = layer_format(config, layer);
  const LayerGeometry& g = config.layers[layer];
  const int vectors = (format.k.bias ? 1 : 0) + (format.k.smooth ? 1 : 0) +
                      (format.v.bias ? 1 : 0) + (format.v.smooth ? 1 : 0);
  return static_cast<int64_t>(vectors) * g.num_kv_heads * g.head_dim;
}

std::vector<LayerGroup> make_layer_groups(std::span<const LayerGeometry> layers) {
  std::vector<LayerGroup> groups;
  for (int layer = 0; layer < static_cast<int>(layers.size()); ++layer) {
    const auto same = [&](const LayerGroup& group) { return group.geometry == layers[layer]; };
    auto found = std::find_if(groups.begin(), groups.end(), same);
    if (found == groups.end()) found = groups.insert(groups.end(), {layers[layer], {}});
    found->layers.push_back(layer);
  }
  return groups;
}

Result<CachePlan> make_cache_plan(const CacheConfig& config) {
  KVANT_TRY(check_config(config));
  CachePlan plan;
  plan.max_sequence_tokens = config.max_sequence_tokens == 0
                                 ? config.max_tokens
                                 : std::min(config.max_sequence_tokens, config.max_tokens);
  plan.pages_per_sequence =
      (plan.max_sequence_tokens + config.page_tokens - 1) / config.page_tokens;
  plan.places.resize(config.layers.size());
  for (LayerGroup& group : make_layer_groups(config.layers)) {
    const int index = static_cast<int>(plan.groups.size());
    for (int i = 0; i < static_cast<int>(group.layers.size()); ++i)
      plan.places[group.layers[i]] = {index, i};
    KVANT_ASSIGN(GroupPlan planned, plan_group(config, std::move(group)));
    KVANT_ASSIGN(planned.bf16_class, slab_class(plan, planned.bf16_page_bytes, planned.bf16_slots));
    if (!planned.plain) {
      KVANT_ASSIGN(planned.stored_class,
                   slab_class(plan, planned.stored_page_bytes, planned.stored_slots));
    }
    plan.groups.push_back(std::move(planned));
  }
  sum_bytes(plan, config);
  return plan;
}

}  // namespace kvant::cache
