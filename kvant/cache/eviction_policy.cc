#include "kvant/cache/eviction_policy.h"

#include <algorithm>
#include <cmath>

namespace kvant::cache {

namespace {

EvictionOrder lru(const EvictionCosts&, const PageFacts& facts) {
  return {.value = facts.last_use};
}

EvictionOrder by_priority(const EvictionCosts&, const PageFacts& facts) {
  return {.priority = facts.priority, .value = facts.last_use};
}

// Worth per byte is cost / bytes * exp(-(now - last_use) / tau). Its logarithm times tau, less the
// `now` that all pages share, is last_use + tau * log(cost / bytes).
EvictionOrder by_cost(const EvictionCosts& costs, const PageFacts& facts) {
  const double context = static_cast<double>(facts.first_position);
  const double seconds =
      facts.page_tokens * (costs.token_seconds + costs.token_context_seconds * context);
  const double worth =
      std::max(seconds, 1e-12) / static_cast<double>(std::max<int64_t>(1, facts.bytes));
  return {.value = facts.last_use + costs.recency_seconds * std::log(worth)};
}

struct Policy {
  EvictionPolicy policy;
  std::string_view name;
  EvictionOrder (*order)(const EvictionCosts&, const PageFacts&);
};

constexpr Policy kPolicies[] = {
    {EvictionPolicy::kLru, "lru", lru},
    {EvictionPolicy::kPriority, "priority", by_priority},
    {EvictionPolicy::kCostAware, "cost", by_cost},
};

const Policy& row(EvictionPolicy policy) {
  return kPolicies[static_cast<size_t>(policy)];
}

}  // namespace

Result<EvictionPolicy> parse_eviction_policy(std::string_view name) {
  std::string known;
  for (const Policy& policy : kPolicies) {
    if (policy.name == name) return policy.policy;
    known += (known.empty() ? "" : ", ") + std::string(policy.name);
  }
  return Error(ErrorCode::kInvalidArgument,
               "no eviction policy '" + std::string(name) + "'; there are: " + known);
}

std::string_view eviction_policy_name(EvictionPolicy policy) {
  return row(policy).name;
}

EvictionOrder eviction_order(EvictionPolicy policy, const EvictionCosts& costs,
                             const PageFacts& facts, uint64_t stamp) {
  EvictionOrder order = row(policy).order(costs, facts);
  order.stamp = stamp;
  return order;
}

}  // namespace kvant::cache
