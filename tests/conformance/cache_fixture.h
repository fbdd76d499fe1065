// A small cache with its model (kvant/cache/testing/cache_harness.h) for one cache format string.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "kvant/cache/testing/cache_harness.h"

#define CHECK_OK(expression)                                                  \
  do {                                                                        \
    const auto& check_result = (expression);                                  \
    if (!check_result) {                                                      \
      ADD_FAILURE() << #expression << ": " << check_result.error().message(); \
      return;                                                                 \
    }                                                                         \
  } while (false)

namespace kvant::conformance {

constexpr int kPage = 16;

// A full-attention layer and a window layer of another geometry.
struct Fixture {
  cache::CacheConfig config;
  formats::QuantPlan plan;
  std::unique_ptr<cache::testing::CacheHarness> harness;

  explicit Fixture(const std::string& spec) {
    config.layers = {{.num_kv_heads = 2, .head_dim = 32},
                     {.num_kv_heads = 1, .head_dim = 48, .window = 20}};
    const auto format = formats::parse_cache_format(spec);
    if (format) config.format = *format;
    config.page_tokens = kPage;
    config.max_tokens = 160;
    config.max_sequences = 4;
    config.max_step_tokens = 100;
  }

  // Creates the cache after the caller's changes to the configuration.
  bool create() {
    plan = cache::testing::make_test_plan(config.layers);
    config.plan = &plan;
    auto created = cache::testing::CacheHarness::create(config);
    if (!created) {
      ADD_FAILURE() << created.error().message();
      return false;
    }
    harness = std::move(*created);
    return true;
  }

  bool recent() const { return config.format.recent_tokens > 0; }
  // Pages of a sequence that can be exported.
  int64_t closed_pages(int64_t length) const {
    const int64_t t = config.page_tokens;
    return std::max<int64_t>(0, length / t - (config.format.recent_tokens + t - 1) / t);
  }
};

}  // namespace kvant::conformance
