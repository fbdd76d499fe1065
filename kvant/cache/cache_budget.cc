// What a cache costs, asked before it exists, and the largest cache that a budget buys.
#include <algorithm>
#include <string>
#include <utility>

#include "kvant/cache/cache_plan.h"
#include "kvant/cache/kv_cache.h"

namespace kvant::cache {

using formats::SideFormat;

Result<CacheBytes> plan_cache_bytes(const CacheConfig& config) {
  KVANT_ASSIGN(const CachePlan plan, make_cache_plan(config));
  return plan.bytes;
}

Result<std::vector<GroupBytes>> plan_group_bytes(const CacheConfig& config) {
  KVANT_ASSIGN(const CachePlan plan, make_cache_plan(config));
  std::vector<GroupBytes> groups;
  for (const GroupPlan& planned : plan.groups) {
    GroupBytes bytes;
    bytes.group = planned.group;
    bytes.bf16_pages = planned.bf16_slots;
    bytes.bf16_page_bytes = planned.bf16_page_bytes;
    if (!planned.plain) {
      const LayerGeometry& geometry = planned.group.geometry;
      bytes.stored_pages = planned.stored_slots;
      bytes.stored_page_bytes = planned.stored_page_bytes;
      for (size_t i = 0; i < planned.group.layers.size(); ++i) {
        for (const SideFormat& side : {planned.k[i], planned.v[i]}) {
          const formats::SideBytes one =
              formats::side_bytes(side, config.page_tokens, geometry.head_dim);
          bytes.code_bytes += one.codes * geometry.num_kv_heads;
          bytes.scale_bytes += one.scales * geometry.num_kv_heads;
          bytes.mean_bytes += one.mean * geometry.num_kv_heads;
        }
      }
    }
    groups.push_back(std::move(bytes));
  }
  return groups;
}

namespace {

CacheConfig sized(const CacheConfig& config, int64_t num_pages, const HeldShares& shares) {
  const auto share = [](int64_t tokens, int64_t per) {
    return per <= 0 ? 0 : (tokens + per - 1) / per;
  };
  CacheConfig result = config;
  result.max_tokens = num_pages * config.page_tokens;
  result.held_sink_pages = share(result.max_tokens, shares.tokens_per_sink_page);
  result.held_windows = share(result.max_tokens, shares.tokens_per_window);
  return result;
}

}  // namespace

Result<CacheConfig> fit_cache_bytes(const CacheConfig& config, int64_t budget_bytes,
                                    const HeldShares& shares) {
  const int64_t t = std::max(config.page_tokens, 1);
  // Every part of the plan grows with the number of pages, so that the largest is found by halving.
  int64_t fits = std::max<int64_t>(1, (config.max_sequence_tokens + t - 1) / t);
  const CacheConfig smallest = sized(config, fits, shares);
  KVANT_ASSIGN(const CacheBytes least, plan_cache_bytes(smallest));
  if (least.total_reserved() > budget_bytes) {
    return Error(ErrorCode::kResourceExhausted,
                 "a cache of " + std::to_string(smallest.max_tokens) + " tokens for up to " +
                     std::to_string(config.max_sequences) + " sequences needs " +
                     std::to_string(least.total_reserved()) + " bytes, the budget is " +
                     std::to_string(budget_bytes) +
                     "; raise it, or lower the context or the number of sequences");
  }
  int64_t beyond = (int64_t{1} << 31) / t + 1;
  while (beyond - fits > 1) {
    const int64_t pages = fits + (beyond - fits) / 2;
    const auto bytes = plan_cache_bytes(sized(config, pages, shares));
    // More slots than a page table can name is too much as well.
    const bool good = bytes.has_value() && bytes->total_reserved() <= budget_bytes;
    (good ? fits : beyond) = pages;
  }
  return sized(config, fits, shares);
}

}  // namespace kvant::cache
