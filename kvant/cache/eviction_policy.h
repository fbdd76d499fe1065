// Which page of the prefix tree goes first. A policy is a function from what is known of a page to
// a place in an order that does not change with time, so that finding the next victim costs O(log
// n). Thread-safe (pure functions).
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <tuple>

#include "kvant/base/result.h"

namespace kvant::cache {

enum class EvictionPolicy { kLru, kPriority, kCostAware };

// "lru", "priority", "cost"; kInvalidArgument names them.
Result<EvictionPolicy> parse_eviction_policy(std::string_view name);
std::string_view eviction_policy_name(EvictionPolicy policy);

// How long and how strongly a request's pages should stay (kPriority).
struct Retention {
  static constexpr int kDefaultPriority = 35;
  int priority = kDefaultPriority;                           // 0 to 100; higher stays longer
  double seconds = std::numeric_limits<double>::infinity();  // then kDefaultPriority holds, at most
};

// What it would take to compute a page again: prefill seconds of a token, and of a token for each
// token of context before it. Only their ratio decides. And how fast old pages lose worth: a page
// is `e` times less likely to be asked for again after each recency_seconds (kCostAware).
struct EvictionCosts {
  double token_seconds = 1e-3;
  double token_context_seconds = 1e-7;
  double recency_seconds = 300;
};

// What is known of a page when it was used last.
struct PageFacts {
  double last_use = 0;  // seconds of the tree's clock
  int priority = Retention::kDefaultPriority;
  int64_t first_position = 0;
  int page_tokens = 0;
  int64_t bytes = 0;  // of all layer groups
};

// Smaller goes first; `stamp` counts uses and decides between equals.
struct EvictionOrder {
  int priority = 0;
  double value = 0;
  uint64_t stamp = 0;

  bool operator==(const EvictionOrder&) const = default;
  bool operator<(const EvictionOrder& other) const {
    return std::tie(priority, value, stamp) < std::tie(other.priority, other.value, other.stamp);
  }
};

EvictionOrder eviction_order(EvictionPolicy policy, const EvictionCosts& costs,
                             const PageFacts& facts, uint64_t stamp);

}  // namespace kvant::cache
