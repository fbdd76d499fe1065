// Small caches for tests of kvant/cache: one geometry, any format, pages of 16 tokens.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>

#include "kvant/cache/testing/cache_harness.h"

#define ASSERT_OK(expression)                                          \
  do {                                                                 \
    const auto& ok_result = (expression);                              \
    ASSERT_TRUE(ok_result.has_value()) << ok_result.error().message(); \
  } while (false)

namespace kvant::cache::testing {

inline formats::CacheFormat format_of(const std::string& spec) {
  auto format = formats::parse_cache_format(spec);
  EXPECT_TRUE(format.has_value()) << spec;
  return format ? *format : formats::CacheFormat{};
}

// Two full-attention layers and, if asked, one window layer of other geometry.
inline CacheConfig config_of(const std::string& spec, int window = 0) {
  CacheConfig config;
  config.layers = {{.num_kv_heads = 2, .head_dim = 32}, {.num_kv_heads = 2, .head_dim = 32}};
  if (window > 0) config.layers.push_back({.num_kv_heads = 1, .head_dim = 16, .window = window});
  config.format = format_of(spec);
  config.page_tokens = 16;
  config.max_tokens = 256;
  config.max_sequences = 4;
  config.max_step_tokens = 96;
  return config;
}

inline std::unique_ptr<CacheHarness> harness_of(const CacheConfig& config) {
  auto harness = CacheHarness::create(config);
  EXPECT_TRUE(harness.has_value()) << (harness ? "" : harness.error().message());
  return harness ? std::move(*harness) : nullptr;
}

}  // namespace kvant::cache::testing
