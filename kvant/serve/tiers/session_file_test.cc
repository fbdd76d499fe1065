#include "kvant/serve/tiers/session_file.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "kvant/cache/testing/cache_harness.h"
#include "kvant/serve/tiers/testing/test_pages.h"

namespace kvant::serve {
namespace {

using cache::SequenceId;
using cache::testing::CacheHarness;
using testing::TemporaryFolder;

std::unique_ptr<CacheHarness> harness_of(const std::string& spec, int window) {
  cache::CacheConfig config;
  config.layers = {{.num_kv_heads = 2, .head_dim = 32}};
  if (window > 0) config.layers.push_back({.num_kv_heads = 1, .head_dim = 16, .window = window});
  config.format = *formats::parse_cache_format(spec);
  config.page_tokens = 16;
  config.max_tokens = 512;
  config.max_sequences = 2;
  auto harness = CacheHarness::create(config);
  EXPECT_TRUE(harness.has_value()) << (harness ? "" : harness.error().message());
  return harness ? std::move(*harness) : nullptr;
}

std::vector<int32_t> tokens_of(const std::vector<uint32_t>& ids) {
  return {ids.begin(), ids.end()};
}

TEST(SessionFile, ASessionGoesOnInAnotherCache) {
  const TemporaryFolder folder;
  const std::string path = folder.path() + "/session";
  for (const char* spec : {"4bit", "8bit", "bf16", "k=fp8,v=nvfp4"}) {
    for (const int window : {0, 40}) {
      SCOPED_TRACE(std::string(spec) + ", window " + std::to_string(window));
      const auto h = harness_of(spec, window);
      uint64_t seed = 4;
      const auto ids = cache::testing::random_tokens(seed, 150);
      const SequenceId id = *h->add();
      ASSERT_TRUE(h->extend(id, ids).has_value());
      const auto saved = save_session(path, h->cache(), id, tokens_of(ids), "salt");
      ASSERT_TRUE(saved.has_value()) << saved.error().message();
      EXPECT_EQ(*saved, 144);

      const auto other = harness_of(spec, window);
      const SequenceId copy = *other->add();
      EXPECT_FALSE(restore_session(path, other->cache(), copy, "pepper").has_value());
      EXPECT_EQ(other->cache().length(copy), 0);
      const auto restored = restore_session(path, other->cache(), copy, "salt");
      ASSERT_TRUE(restored.has_value()) << restored.error().message();
      EXPECT_EQ(*restored, tokens_of({ids.begin(), ids.begin() + 144}));
      other->note(copy, std::span(ids).first(144));
      // The harness compares every page that the next tokens read.
      ASSERT_TRUE(other->extend(copy, std::span(ids).subspan(144)).has_value());
      EXPECT_EQ(other->check(), "");
    }
  }
}

TEST(SessionFile, DamagedOrForeignFilesAreRefused) {
  const TemporaryFolder folder;
  const std::string path = folder.path() + "/session";
  const auto h = harness_of("4bit", 0);
  uint64_t seed = 4;
  const auto ids = cache::testing::random_tokens(seed, 70);
  const SequenceId id = *h->add();
  ASSERT_TRUE(h->extend(id, std::span(ids).first(10)).has_value());
  EXPECT_FALSE(save_session(path, h->cache(), id, tokens_of(ids)).has_value()) << "nothing closed";
  ASSERT_TRUE(h->extend(id, std::span(ids).subspan(10)).has_value());
  ASSERT_TRUE(save_session(path, h->cache(), id, tokens_of(ids)).has_value());
  const auto size = std::filesystem::file_size(path);
  const SequenceId copy = *h->add();
  const auto refused = [&](const std::string& file, ErrorCode code) {
    const auto restored = restore_session(file, h->cache(), copy);
    ASSERT_FALSE(restored.has_value());
    EXPECT_EQ(restored.error().code(), code) << restored.error().message();
    EXPECT_EQ(h->cache().length(copy), 0);
    EXPECT_EQ(h->check(), "");
  };
  refused(folder.path() + "/none", ErrorCode::kNotFound);
  const std::string cut = folder.path() + "/cut";
  for (const auto bytes : {size - 1, size / 2, uintmax_t{1}}) {
    std::filesystem::copy_file(path, cut, std::filesystem::copy_options::overwrite_existing);
    std::filesystem::resize_file(cut, bytes);
    refused(cut, ErrorCode::kCorruptData);
  }
  std::filesystem::copy_file(path, cut, std::filesystem::copy_options::overwrite_existing);
  {
    std::fstream file(cut, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(size / 2));
    file.put('\x55');
    file.put('\xaa');
  }
  refused(cut, ErrorCode::kCorruptData);
  // A longer session than a sequence of the cache may have.
  cache::CacheConfig config = h->cache().config();
  config.max_tokens = config.max_sequence_tokens = 48;
  const auto small = CacheHarness::create(config);
  ASSERT_TRUE(small.has_value());
  const SequenceId one = *(*small)->add();
  EXPECT_EQ(restore_session(path, (*small)->cache(), one).error().code(),
            ErrorCode::kResourceExhausted);
  EXPECT_EQ((*small)->cache().length(one), 0);
  // Another format.
  const auto other = harness_of("8bit", 0);
  const SequenceId there = *other->add();
  EXPECT_EQ(restore_session(path, other->cache(), there).error().code(),
            ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvant::serve
