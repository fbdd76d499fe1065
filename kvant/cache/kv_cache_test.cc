#include "kvant/cache/kv_cache.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "kvant/cache/page_object.h"
#include "kvant/cache/testing/small_caches.h"

namespace kvant::cache {
namespace {

using testing::CacheHarness;
using testing::config_of;
using testing::format_of;
using testing::harness_of;
using testing::NewTokens;
using testing::random_tokens;
using testing::StepEnd;

int64_t closed_pages(int64_t length, int page_tokens, int recent_tokens) {
  return length / page_tokens - (recent_tokens + page_tokens - 1) / page_tokens;
}

TEST(KvCache, LayersAreGroupedByGeometryAndWindow) {
  const LayerGeometry full{1, 256, 0}, window{1, 256, 512};
  const std::vector<LayerGeometry> layers = {window, window, full, window, full};
  const std::vector<LayerGroup> groups = make_layer_groups(layers);
  ASSERT_EQ(groups.size(), 2u);
  EXPECT_EQ(groups[0].geometry, window);
  EXPECT_EQ(groups[0].layers, (std::vector<int>{0, 1, 3}));
  EXPECT_EQ(groups[1].layers, (std::vector<int>{2, 4}));
}

TEST(KvCache, TokensOneByOneFillAndClosePages) {
  const auto h = harness_of(config_of("k=int4:channel,v=nvfp4"));
  const SequenceId id = *h->add();
  uint64_t seed = 1;
  for (int i = 0; i < 40; ++i) ASSERT_OK(h->extend(id, random_tokens(seed, 1)));
  const CacheBytes bytes = h->cache().bytes();
  EXPECT_EQ(h->cache().length(id), 40);
  EXPECT_EQ(bytes.tokens_now, 40);
  EXPECT_EQ(bytes.values_now, 40 * 2 * 2 * 2 * 32);
  // Two pages closed, one open.
  const int64_t closed =
      2 * 2 * 2 * formats::unit_sections(h->config().format.k, h->config().format.v, 16, 32).bytes;
  EXPECT_EQ(bytes.stored_pages_now, closed);
  EXPECT_EQ(bytes.bf16_pages_now, 2 * 2 * 2 * 16 * 32 * 2);
  EXPECT_DOUBLE_EQ(bytes.bits_per_value(),
                   8.0 * static_cast<double>(bytes.stored_pages_now + bytes.bf16_pages_now) /
                       static_cast<double>(bytes.values_now));
  EXPECT_EQ(h->check(), "");
}

TEST(KvCache, ChunksOfAnySizeStoreTheSameBytes) {
  for (const char* spec : {"4bit", "k=fp8+mean,v=nvfp4+46+sink", "nvfp4+recent20", "bf16"}) {
    const auto single = harness_of(config_of(spec, 40));
    const auto chunked = harness_of(config_of(spec, 40));
    const SequenceId a = *single->add(), b = *chunked->add();
    uint64_t seed = 2;
    const std::vector<uint32_t> tokens = random_tokens(seed, 150);
    for (const uint32_t token : tokens) ASSERT_OK(single->extend(a, std::span(&token, 1)));
    size_t done = 0;
    for (const size_t chunk : {5u, 90u, 1u, 54u}) {
      ASSERT_OK(chunked->extend(b, std::span(tokens).subspan(done, chunk)));
      done += chunk;
    }
    const int64_t closed = closed_pages(150, 16, single->config().format.recent_tokens);
    for (int64_t page = 0; page < closed; ++page) {
      const auto from_single = single->export_page(a, page);
      const auto from_chunks = chunked->export_page(b, page);
      ASSERT_OK(from_single);
      ASSERT_OK(from_chunks);
      EXPECT_TRUE(*from_single == *from_chunks) << spec << " page " << page;
    }
    EXPECT_EQ(single->cache().bytes().stored_pages_now, chunked->cache().bytes().stored_pages_now);
    EXPECT_EQ(single->cache().bytes().bf16_pages_now, chunked->cache().bytes().bf16_pages_now);
  }
}

TEST(KvCache, AbortGivesEverythingBack) {
  const auto h = harness_of(config_of("4bit", 40));
  const SequenceId a = *h->add(), b = *h->add();
  uint64_t seed = 3;
  ASSERT_OK(h->extend(a, random_tokens(seed, 25)));
  const CacheBytes before = h->cache().bytes();
  const std::vector<NewTokens> batch = {{a, random_tokens(seed, 50)}, {b, random_tokens(seed, 33)}};
  ASSERT_OK(h->step(batch, StepEnd::kAbort));
  const CacheBytes after = h->cache().bytes();
  EXPECT_EQ(before.stored_pages_now, after.stored_pages_now);
  EXPECT_EQ(before.bf16_pages_now, after.bf16_pages_now);
  EXPECT_EQ(h->cache().length(a), 25);
  EXPECT_EQ(h->cache().length(b), 0);
  EXPECT_EQ(h->check(), "");
  ASSERT_OK(h->step(batch));
  EXPECT_EQ(h->check(), "");
}

TEST(KvCache, ForkedSequencesShareClosedPagesAndCopyTheOpenOne) {
  const auto h = harness_of(config_of("4bit"));
  const SequenceId a = *h->add();
  uint64_t seed = 4;
  ASSERT_OK(h->extend(a, random_tokens(seed, 40)));
  const CacheBytes before = h->cache().bytes();
  const SequenceId b = *h->fork(a);
  EXPECT_EQ(h->cache().bytes().stored_pages_now, before.stored_pages_now);
  EXPECT_EQ(h->cache().bytes().bf16_pages_now, before.bf16_pages_now);
  const std::vector<NewTokens> batch = {{a, random_tokens(seed, 30)}, {b, random_tokens(seed, 3)}};
  ASSERT_OK(h->step(batch));
  EXPECT_EQ(h->check(), "");
  ASSERT_OK(h->extend(b, random_tokens(seed, 20)));
  h->remove(a);
  EXPECT_EQ(h->check(), "");
  ASSERT_OK(h->extend(b, random_tokens(seed, 20)));
  h->remove(b);
  EXPECT_EQ(h->cache().bytes().stored_pages_now, 0);
  EXPECT_EQ(h->cache().bytes().bf16_pages_now, 0);
}

TEST(KvCache, TruncationKeepsOpenTokensAndDropsClosedPages) {
  const auto h = harness_of(config_of("k=int4:channel,v=nvfp4"));
  const SequenceId id = *h->add();
  uint64_t seed = 5;
  ASSERT_OK(h->extend(id, random_tokens(seed, 45)));
  EXPECT_EQ(*h->truncate(id, 100), 45);
  EXPECT_EQ(*h->truncate(id, 33), 33);  // inside the open page
  EXPECT_EQ(*h->truncate(id, 32), 32);  // at a page boundary
  EXPECT_EQ(*h->truncate(id, 30), 16);  // page 1 is encoded: its tokens must be recomputed
  EXPECT_EQ(h->check(), "");
  ASSERT_OK(h->extend(id, random_tokens(seed, 45)));
  EXPECT_EQ(*h->truncate(id, 0), 0);
  EXPECT_EQ(h->cache().bytes().stored_pages_now, 0);
  EXPECT_FALSE(h->truncate(id, -1).has_value());
}

TEST(KvCache, PlainBf16AndSinkPagesCanBeCutAnywhere) {
  const auto plain = harness_of(config_of("bf16"));
  const SequenceId a = *plain->add();
  uint64_t seed = 6;
  ASSERT_OK(plain->extend(a, random_tokens(seed, 70)));
  EXPECT_EQ(*plain->truncate(a, 37), 37);
  ASSERT_OK(plain->extend(a, random_tokens(seed, 40)));
  const auto sink = harness_of(config_of("4bit"));
  const SequenceId b = *sink->add();
  ASSERT_OK(sink->extend(b, random_tokens(seed, 70)));
  EXPECT_EQ(*sink->truncate(b, 7), 7);
  ASSERT_OK(sink->extend(b, random_tokens(seed, 40)));
  EXPECT_EQ(sink->check(), "");
}

TEST(KvCache, RecentPagesStayBf16UntilTheyFallOut) {
  const auto h = harness_of(config_of("nvfp4+recent20"));  // two pages of 16
  const SequenceId id = *h->add();
  uint64_t seed = 7;
  ASSERT_OK(h->extend(id, random_tokens(seed, 47)));
  EXPECT_EQ(h->cache().bytes().stored_pages_now, 0);
  ASSERT_OK(h->extend(id, random_tokens(seed, 1)));
  EXPECT_GT(h->cache().bytes().stored_pages_now, 0);
  // Page 0 is encoded now, so a query in page 1 could no longer read it in BF16.
  EXPECT_EQ(*h->truncate(id, 33), 0);
}

TEST(KvCache, WindowGroupsFreePagesThatLeftTheWindow) {
  CacheConfig config = config_of("4bit", 40);
  config.max_tokens = 1024;
  config.max_sequences = 1;
  const auto h = harness_of(config);
  const SequenceId id = *h->add();
  uint64_t seed = 8;
  for (int i = 0; i < 12; ++i) {
    ASSERT_OK(h->extend(id, random_tokens(seed, 80)));
    EXPECT_EQ(h->check(), "");
  }
  // 960 tokens: the window layer keeps ceil(39 / 16) = 3 pages, 48 tokens.
  const CacheBytes bytes = h->cache().bytes();
  EXPECT_EQ(bytes.values_now, 960 * 2 * 2 * 2 * 32 + 48 * 2 * 16);
  EXPECT_EQ(*h->truncate(id, 950), 0);  // pages that the rest would read are gone
}

TEST(KvCache, RefusesWhatDoesNotFitAndChangesNothing) {
  CacheConfig config = config_of("4bit");
  config.max_tokens = 64;
  const auto h = harness_of(config);
  const SequenceId a = *h->add(), b = *h->add();
  uint64_t seed = 9;
  ASSERT_OK(h->extend(a, random_tokens(seed, 60)));
  const Status too_long = h->extend(a, random_tokens(seed, 5));
  ASSERT_FALSE(too_long.has_value());
  EXPECT_EQ(too_long.error().code(), ErrorCode::kResourceExhausted);
  EXPECT_NE(too_long.error().message().find("context is full"), std::string::npos);
  const CacheBytes before = h->cache().bytes();
  const std::vector<NewTokens> batch = {{a, random_tokens(seed, 4)}, {b, random_tokens(seed, 64)}};
  const Status no_pages = h->step(batch);
  ASSERT_FALSE(no_pages.has_value());
  EXPECT_EQ(no_pages.error().code(), ErrorCode::kResourceExhausted);
  EXPECT_EQ(h->cache().bytes().stored_pages_now, before.stored_pages_now);
  EXPECT_EQ(h->cache().bytes().bf16_pages_now, before.bf16_pages_now);
  EXPECT_EQ(h->check(), "");
  ASSERT_OK(h->extend(a, random_tokens(seed, 4)));
}

TEST(KvCache, CallsThatMakeNoSenseAreErrors) {
  const auto h = harness_of(config_of("4bit"));
  const SequenceId id = *h->add();
  const auto code = [&](const std::vector<StepSequence>& step) {
    const Status status = h->cache().begin_step(step);
    return status ? ErrorCode::kInternal : status.error().code();
  };
  EXPECT_EQ(code({}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code({{id, 0}}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code({{id, 1}, {id, 1}}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code({{id + 1, 1}}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code({{id, 97}}), ErrorCode::kInvalidArgument);
  ASSERT_OK(h->cache().begin_step(std::vector<StepSequence>{{id, 1}}));
  EXPECT_EQ(code({{id, 1}}), ErrorCode::kInvalidArgument);
  EXPECT_FALSE(h->cache().add_sequence().has_value());
  EXPECT_FALSE(h->cache().fork(id).has_value());
  EXPECT_FALSE(h->cache().truncate(id, 0).has_value());
  h->cache().abort_step();
  for (int i = 0; i < 3; ++i) ASSERT_OK(h->cache().add_sequence());
  EXPECT_EQ(h->cache().add_sequence().error().code(), ErrorCode::kResourceExhausted);
}

TEST(KvCache, ConfigurationsThatCannotBeServedAreErrors) {
  HostMemory memory;
  const auto code = [&](auto change) {
    CacheConfig config = config_of("4bit");
    change(config);
    const auto cache = KvCache::create(config, memory);
    return cache ? ErrorCode::kInternal : cache.error().code();
  };
  EXPECT_EQ(code([](CacheConfig& c) { c.page_tokens = 48; }), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code([](CacheConfig& c) { c.layers.clear(); }), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code([](CacheConfig& c) { c.layers[1].head_dim = 40; }), ErrorCode::kUnsupported);
  EXPECT_EQ(code([](CacheConfig& c) { c.max_tokens = 0; }), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code([](CacheConfig& c) { c.max_tokens = int64_t{1} << 40; }),
            ErrorCode::kInvalidArgument);
  EXPECT_EQ(code([](CacheConfig& c) { c.max_tokens = int64_t{1} << 30; }),
            ErrorCode::kInvalidArgument);  // more pages than a table entry can name
  EXPECT_EQ(code([](CacheConfig& c) { c.format = format_of("k=nvfp4+bias,v=nvfp4"); }),
            ErrorCode::kInvalidArgument);  // no plan
  EXPECT_EQ(code([](CacheConfig& c) { c.format.strict = true; }), ErrorCode::kInvalidArgument);
  formats::QuantPlan plan = testing::make_test_plan(config_of("4bit").layers);
  plan.layers[1].k.bias.pop_back();
  EXPECT_EQ(code([&](CacheConfig& c) {
              c.format = format_of("k=nvfp4+bias,v=nvfp4");
              c.plan = &plan;
            }),
            ErrorCode::kInvalidArgument);
  HostMemory small(1 << 20);
  CacheConfig large = config_of("4bit");
  large.max_tokens = 1 << 20;
  const auto refused = KvCache::create(large, small);
  ASSERT_FALSE(refused.has_value());
  EXPECT_EQ(refused.error().code(), ErrorCode::kResourceExhausted);
  EXPECT_EQ(small.stats().total_now, 0);
}

TEST(KvCache, ThePlanIsWhatCreationAllocates) {
  int configs = 0;
  for (const char* spec : {"bf16", "4bit", "8bit", "k=int3:channel,v=int4", "nvfp4+recent100",
                           "k=fp8+smooth,v=mxfp4+bias+sink"}) {
    for (const int page_tokens : {16, 32, 64, 128}) {
      for (const int64_t max_tokens : {1, 63, 64, 1000, 100000}) {
        for (const int max_sequences : {1, 3, 64}) {
          for (const int window : {0, 1, 512}) {
            for (const int max_step_tokens : {1, 100, 2048}) {
              CacheConfig config = config_of(spec, window);
              config.page_tokens = page_tokens;
              config.max_tokens = max_tokens;
              config.max_sequences = max_sequences;
              config.max_step_tokens = max_step_tokens;
              const formats::QuantPlan plan = testing::make_test_plan(config.layers);
              config.plan = &plan;
              const auto planned = plan_cache_bytes(config);
              ASSERT_OK(planned);
              HostMemory memory;
              const auto cache = KvCache::create(config, memory);
              ASSERT_OK(cache);
              const MemoryStats stats = memory.stats();
              ASSERT_EQ(stats.total_peak, planned->total_reserved());
              const auto groups = plan_group_bytes(config);
              ASSERT_OK(groups);
              int64_t stored = 0;
              int64_t bf16 = 0;
              for (const GroupBytes& group : *groups) {
                ASSERT_GE(group.padding_bytes(), 0);
                ASSERT_TRUE(group.code_bytes > 0 || group.stored_page_bytes == 0);
                stored += group.stored_pages * group.stored_page_bytes;
                bf16 += group.bf16_pages * group.bf16_page_bytes;
              }
              ASSERT_EQ(stored, planned->stored_pages_reserved);
              ASSERT_EQ(bf16, planned->bf16_pages_reserved);
              ASSERT_EQ(stats.bytes_now[static_cast<int>(MemoryUse::kPages)],
                        planned->pages_reserved());
              ASSERT_EQ(stats.bytes_now[static_cast<int>(MemoryUse::kTables)], planned->tables);
              const CacheBytes bytes = (*cache)->bytes();
              ASSERT_EQ(bytes.stored_pages_reserved, planned->stored_pages_reserved);
              ASSERT_EQ(bytes.bf16_pages_reserved, planned->bf16_pages_reserved);
              ++configs;
            }
          }
        }
      }
    }
  }
  EXPECT_GT(configs, 3000);
}

TEST(KvCache, LayersMayHaveFormatsOfTheirOwn) {
  CacheConfig config = config_of("4bit", 40);
  config.layer_formats = {format_of("k=bf16,v=bf16+sink"), format_of("4bit"), format_of("8bit")};
  const auto h = harness_of(config);
  const SequenceId id = *h->add();
  uint64_t seed = 11;
  ASSERT_OK(h->extend(id, random_tokens(seed, 90)));
  EXPECT_EQ(h->check(), "");
  config.layer_formats[1].sink = false;
  EXPECT_FALSE(CacheHarness::create(config).has_value());
}

TEST(KvCache, FingerprintChangesWithEverythingThatDecidesBytes) {
  HostMemory memory;
  std::vector<std::vector<uint8_t>> seen;
  const auto distinct = [&](const CacheConfig& config) {
    const auto cache = KvCache::create(config, memory);
    EXPECT_TRUE(cache.has_value());
    const auto bytes = (*cache)->fingerprint();
    std::vector<uint8_t> fingerprint(bytes.begin(), bytes.end());
    for (const auto& other : seen) {
      if (other == fingerprint) return false;
    }
    seen.push_back(fingerprint);
    return true;
  };
  CacheConfig config = config_of("k=fp8+bias,v=fp8");
  formats::QuantPlan plan = testing::make_test_plan(config.layers);
  config.plan = &plan;
  EXPECT_TRUE(distinct(config));
  EXPECT_FALSE(distinct(config));
  config.max_tokens = 512;  // decides nothing
  EXPECT_FALSE(distinct(config));
  plan.layers[0].k.smooth[0] *= 2.0f;  // not used by this format
  EXPECT_FALSE(distinct(config));
  plan.layers[0].k.bias[0] *= 2.0f;
  EXPECT_TRUE(distinct(config));
  config.page_tokens = 32;
  EXPECT_TRUE(distinct(config));
  config.fingerprint_model[31] = 1;
  EXPECT_TRUE(distinct(config));
  config.layers[1].window = 32;
  EXPECT_TRUE(distinct(config));
  config.format = format_of("k=fp8+bias,v=fp8+sink");
  EXPECT_TRUE(distinct(config));
}

}  // namespace
}  // namespace kvant::cache
