// Pages held outside sequences, and the room for them.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <string>
#include <vector>

#include "kvant/cache/kv_cache.h"
#include "kvant/cache/testing/small_caches.h"

namespace kvant::cache {
namespace {

using testing::config_of;
using testing::harness_of;
using testing::random_tokens;

TEST(HeldPages, HeldPagesOutliveTheirSequenceAndServeAnother) {
  const auto h = harness_of(config_of("4bit", 40));
  uint64_t seed = 5;
  const SequenceId first = *h->add();
  const std::vector<uint32_t> tokens = random_tokens(seed, 80);
  ASSERT_OK(h->extend(first, tokens));
  std::vector<HeldPage> held;
  for (int64_t page = 0; page < 5; ++page) {
    auto one = h->cache().hold_page(first, page);
    ASSERT_OK(one);
    held.push_back(std::move(*one));
  }
  h->remove(first);
  EXPECT_EQ(h->check(), "");
  EXPECT_TRUE(held[0].has(0));
  EXPECT_FALSE(held[0].has(1)) << "left the window of 40 tokens";
  EXPECT_TRUE(held[4].has(1));
  EXPECT_TRUE(held[4].sole_holder(1));

  const SequenceId second = *h->add();
  std::vector<const HeldPage*> pages;
  for (const HeldPage& page : held) pages.push_back(&page);
  const CacheBytes before = h->cache().bytes();
  EXPECT_FALSE(h->cache().attach_pages(second, std::span(pages).subspan(1)).has_value());
  ASSERT_OK(h->attach(second, pages, tokens));
  EXPECT_EQ(h->cache().bytes().stored_pages_now, before.stored_pages_now) << "nothing is copied";
  EXPECT_FALSE(held[4].sole_holder(1));
  ASSERT_OK(h->extend(second, random_tokens(seed, 30)));
  // A prefix of two pages lacks the window's pages, which the first sequence had given back.
  const SequenceId third = *h->add();
  ASSERT_OK(h->attach(third, std::span(pages).first(2), std::span(tokens).first(32)));
  EXPECT_EQ(h->extend(third, random_tokens(seed, 1)).error().code(), ErrorCode::kInvalidArgument);
  held.clear();
  EXPECT_EQ(h->check(), "");
  ASSERT_OK(h->extend(second, random_tokens(seed, 30)));
}

TEST(HeldPages, AHeldSinkPageIsNotWrittenByWhoeverTruncatesIntoIt) {
  const auto h = harness_of(config_of("4bit"));
  uint64_t seed = 6;
  const SequenceId first = *h->add();
  const std::vector<uint32_t> tokens = random_tokens(seed, 16);
  ASSERT_OK(h->extend(first, tokens));
  const auto held = h->cache().hold_page(first, 0);
  ASSERT_OK(held);
  const auto before = h->export_held(*held, tokens);
  ASSERT_EQ(*h->truncate(first, 10), 10);
  ASSERT_OK(h->extend(first, random_tokens(seed, 20)));
  EXPECT_EQ(*h->export_held(*held, tokens), *before);
  EXPECT_EQ(h->check(), "");
}

TEST(HeldPages, RoomForHeldPagesIsWhatThePlanSays) {
  CacheConfig config = config_of("4bit", 40);
  config.max_tokens = 100000;
  const auto before = plan_group_bytes(config);
  config.held_sink_pages = 7;
  config.held_windows = 5;
  const auto after = plan_group_bytes(config);
  ASSERT_OK(before);
  ASSERT_OK(after);
  EXPECT_EQ((*after)[0].bf16_pages, (*before)[0].bf16_pages + 7);
  EXPECT_EQ((*after)[0].stored_pages, (*before)[0].stored_pages);
  EXPECT_EQ((*after)[1].bf16_pages, (*before)[1].bf16_pages) << "no sink page in a window group";
  EXPECT_EQ((*after)[1].stored_pages, (*before)[1].stored_pages + 5 * 3);
  const auto h = harness_of(config);
  const auto plan = plan_cache_bytes(config);
  EXPECT_EQ(h->memory().stats().total_now, plan->total_reserved());
}

TEST(HeldPages, ALongestSequenceBelowTheTotalNarrowsThePageTables) {
  CacheConfig config = config_of("int8");
  const auto wide = plan_cache_bytes(config);
  config.max_sequence_tokens = 64;
  const auto narrow = plan_cache_bytes(config);
  // Two entries of 4 bytes for each of 16 or 4 pages of 4 sequences.
  EXPECT_EQ(wide->tables - narrow->tables, 4 * 2 * 4 * (16 - 4));
  EXPECT_EQ(wide->pages_reserved(), narrow->pages_reserved());
  const auto h = harness_of(config);
  const SequenceId id = *h->add();
  uint64_t seed = 3;
  ASSERT_OK(h->extend(id, random_tokens(seed, 64)));
  EXPECT_EQ(h->extend(id, random_tokens(seed, 1)).error().code(), ErrorCode::kResourceExhausted);
}

TEST(HeldPages, ABudgetBuysTheLargestCacheThatFits) {
  for (const char* spec : {"4bit", "bf16", "k=int8+mean,v=int8", "k=fp8,v=nvfp4"}) {
    SCOPED_TRACE(spec);
    CacheConfig config = config_of(spec, 40);
    config.max_sequence_tokens = 512;
    const HeldShares shares{.tokens_per_sink_page = 128, .tokens_per_window = 256};
    for (const int64_t budget : {int64_t{2} << 20, int64_t{3000001}, int64_t{64} << 20}) {
      const auto fitted = fit_cache_bytes(config, budget, shares);
      ASSERT_OK(fitted);
      EXPECT_EQ(fitted->max_tokens % 16, 0);
      EXPECT_EQ(fitted->held_sink_pages, (fitted->max_tokens + 127) / 128);
      EXPECT_EQ(fitted->held_windows, (fitted->max_tokens + 255) / 256);
      EXPECT_LE(plan_cache_bytes(*fitted)->total_reserved(), budget);
      CacheConfig more = *fitted;
      more.max_tokens += 16;
      more.held_sink_pages = (more.max_tokens + 127) / 128;
      more.held_windows = (more.max_tokens + 255) / 256;
      EXPECT_GT(plan_cache_bytes(more)->total_reserved(), budget);
    }
    const auto none = fit_cache_bytes(config, 1000, shares);
    ASSERT_FALSE(none.has_value());
    EXPECT_EQ(none.error().code(), ErrorCode::kResourceExhausted);
  }
}

// Memory whose pages the host cannot touch, as a device's: only copy and read reach them.
class FencedMemory final : public MemoryResource {
 public:
  Result<void*> allocate(int64_t bytes, MemoryUse use) override {
    if (use != MemoryUse::kPages) return host_.allocate(bytes, use);
    const int file = ::memfd_create("pages", 0);
    if (file < 0 || ::ftruncate(file, bytes) != 0)
      return Error(ErrorCode::kResourceExhausted, "no memory file");
    const size_t size = static_cast<size_t>(bytes);
    void* const fenced = ::mmap(nullptr, size, PROT_NONE, MAP_SHARED, file, 0);
    void* const open = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    ::close(file);
    areas_.push_back({static_cast<std::byte*>(fenced), static_cast<std::byte*>(open), size});
    return fenced;
  }
  void deallocate(void* pointer, int64_t bytes, MemoryUse use) override {
    if (use != MemoryUse::kPages) return host_.deallocate(pointer, bytes, use);
    for (const Area& area : areas_) {
      if (area.fenced != pointer) continue;
      ::munmap(area.fenced, area.size);
      ::munmap(area.open, area.size);
    }
  }
  MemoryStats stats() const override { return host_.stats(); }
  void copy(void* target, const void* source, int64_t bytes) override {
    std::memcpy(reach(target), reach(const_cast<void*>(source)), static_cast<size_t>(bytes));
  }
  void read(void* target, const void* source, int64_t bytes) override {
    std::memcpy(target, reach(const_cast<void*>(source)), static_cast<size_t>(bytes));
  }
  // Every page gets bytes of its own, as if a step had written them.
  void fill() {
    for (const Area& area : areas_) {
      for (size_t i = 0; i < area.size; ++i)
        area.open[i] = static_cast<std::byte>(i * 2654435761u >> 13);
    }
  }

 private:
  struct Area {
    std::byte* fenced;
    std::byte* open;
    size_t size;
  };
  void* reach(void* pointer) const {
    std::byte* const at = static_cast<std::byte*>(pointer);
    for (const Area& area : areas_) {
      if (at >= area.fenced && at < area.fenced + area.size) return area.open + (at - area.fenced);
    }
    return pointer;
  }
  HostMemory host_;
  std::vector<Area> areas_;
};

TEST(HeldPages, AreMovedOnlyByTheMemoryTheyLieIn) {
  for (const char* spec : {"4bit", "bf16", "k=fp8+mean,v=nvfp4"}) {
    SCOPED_TRACE(spec);
    FencedMemory memory;
    auto cache = KvCache::create(config_of(spec, 40), memory);
    ASSERT_OK(cache);
    KvCache& kv = **cache;
    const SequenceId id = *kv.add_sequence();
    const StepSequence step{id, 70};
    ASSERT_OK(kv.begin_step(std::span(&step, 1)));
    memory.fill();
    kv.commit_step();
    std::vector<HeldPage> held;
    std::vector<const HeldPage*> pages;
    for (int64_t page = 0; page < 4; ++page) held.push_back(std::move(*kv.hold_page(id, page)));
    KvCache::PageIdentity identity{};
    const std::vector<uint32_t> ids(16, 5);
    identity.token_ids = ids;
    for (HeldPage& page : held) {
      std::vector<std::vector<std::byte>> objects(2);
      std::vector<std::span<const std::byte>> spans(2);
      for (int g = 0; g < 2; ++g) {
        if (page.has(g)) objects[g] = *kv.export_held(page, g, identity, Layout::kCpu);
        spans[g] = objects[g];
      }
      auto back = kv.import_held(spans);
      ASSERT_OK(back);
      for (int g = 0; g < 2; ++g) {
        if (!page.has(g)) continue;
        EXPECT_EQ(*kv.export_held(*back, g, identity, Layout::kCpu), objects[g]);
        EXPECT_TRUE(kv.export_held(*back, g, identity).has_value()) << "planar";
      }
      page = std::move(*back);
      pages.push_back(&page);
    }
    const SequenceId copy = *kv.add_sequence();
    ASSERT_OK(kv.attach_pages(copy, pages));
    // Back into the first page where it is BF16: it is copied before it is written.
    ASSERT_OK(kv.truncate(copy, 10));
    const StepSequence more{copy, 3};
    ASSERT_OK(kv.begin_step(std::span(&more, 1)));
    kv.abort_step();
    ASSERT_OK(kv.check_integrity());
  }
}

}  // namespace
}  // namespace kvant::cache
