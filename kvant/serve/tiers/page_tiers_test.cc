#include "kvant/serve/tiers/page_tiers.h"

#include <gtest/gtest.h>

#include <atomic>
#include <fstream>
#include <string>
#include <vector>

#include "kvant/cache/testing/cache_harness.h"
#include "kvant/cache/testing/tree_mirror.h"
#include "kvant/serve/tiers/disk_store.h"
#include "kvant/serve/tiers/host_store.h"
#include "kvant/serve/tiers/testing/test_pages.h"

namespace kvant::serve {
namespace {

using cache::HeldPage;
using cache::Medium;
using cache::PrefixLease;
using cache::PrefixMatch;
using cache::PrefixTree;
using cache::SequenceId;
using cache::testing::CacheHarness;
using cache::testing::TreeMirror;
using testing::TemporaryFolder;

constexpr int kPageTokens = 16;

std::vector<int32_t> tokens_of(const std::vector<int32_t>& pages, int rest = 0) {
  std::vector<int32_t> tokens;
  for (const int32_t page : pages) {
    for (int i = 0; i < kPageTokens; ++i) tokens.push_back(page * 100 + i);
  }
  for (int i = 0; i < rest; ++i) tokens.push_back(7000 + i);
  return tokens;
}

class PageTiersTest : public ::testing::TestWithParam<std::string> {
 protected:
  void build(std::vector<TierSetup> setups, int window = 40,
             const std::vector<std::string>& known_salts = {}) {
    cache::CacheConfig config;
    config.layers = {{.num_kv_heads = 1, .head_dim = 32},
                     {.num_kv_heads = 2, .head_dim = 16, .window = window}};
    config.format = *formats::parse_cache_format(GetParam());
    config.page_tokens = kPageTokens;
    config.max_tokens = 512;
    config.max_sequences = 3;
    config.held_sink_pages = 8;
    config.held_windows = 8;
    auto harness = CacheHarness::create(config);
    ASSERT_TRUE(harness.has_value()) << harness.error().message();
    h_ = std::move(*harness);
    mirror_ = std::make_unique<TreeMirror>();
    tree_ = std::move(*PrefixTree::create(h_->cache()));
    tiers_ = std::make_unique<PageTiers>(h_->cache(), std::move(setups));
    tree_->set_observer(mirror_.get());
    tiers_->set_known_salts(known_salts);
    tiers_->set_observer(mirror_.get());
    tree_->set_listener(tiers_.get());
  }

  static TierSetup host(int64_t bytes = 1 << 20, TierOptions options = {}) {
    return {std::make_unique<HostStore>(bytes), options};
  }
  static TierSetup disk(const std::string& folder, TierOptions options = {}) {
    auto store = DiskStore::open(folder, 16 << 20);
    EXPECT_TRUE(store.has_value());
    return {std::move(*store), options};
  }

  // Serves one request: the tree, then the tiers, then computing. Returns the tokens not computed.
  int64_t serve(const std::vector<int32_t>& tokens, const std::string& salt = "") {
    const int64_t limit = static_cast<int64_t>(tokens.size()) - 1;
    PrefixMatch match = tree_->match(tokens, salt, limit);
    PrefixLease lease = tree_->acquire(match);
    const int64_t whole = limit / kPageTokens * kPageTokens;
    const int64_t first = match.num_pages * kPageTokens;
    const auto id = tiers_->prefetch({.first_page = match.num_pages,
                                      .parent_key = tree_->key(match),
                                      .tokens = {tokens.begin() + first, tokens.begin() + whole},
                                      .salt = salt});
    tiers_->wait_idle();
    EXPECT_TRUE(tiers_->ready(id));
    const int64_t expected = tiers_->expected_pages(id);
    loaded_ = tiers_->install(id, *tree_, lease);
    EXPECT_LE(loaded_, expected);
    match = tree_->match(tokens, salt, limit);
    lease = tree_->acquire(match);
    const SequenceId sequence = *h_->add();
    must(tree_->attach(lease, sequence));
    const int64_t hit = match.num_pages * kPageTokens;
    const std::vector<uint32_t> ids(tokens.begin(), tokens.end());
    h_->note(sequence, std::span(ids).first(hit));
    const cache::StepSequence step{sequence, static_cast<int32_t>(limit + 1 - hit)};
    const auto needed = h_->cache().needed_pages(std::span(&step, 1));
    EXPECT_TRUE(needed.has_value() && tree_->make_room(*needed));
    must(h_->extend(sequence, std::span(ids).subspan(hit)));
    must(tree_->insert(lease, sequence, tokens, salt));
    h_->remove(sequence);
    lease = {};
    must(tree_->check_invariants());
    EXPECT_EQ(h_->check(), "");
    EXPECT_EQ(mirror_->error(), "");
    return hit;
  }

  void evict_all() {
    for (int c = 0; c < h_->cache().num_page_classes(); ++c) tree_->evict(c, 1 << 20);
    // A group's last pages may be of a class that others keep.
    EXPECT_EQ(tree_->stats().nodes, 0);
    tiers_->wait_idle();
  }

  int64_t told(Medium medium) const {
    int64_t pages = 0;
    for (const auto& [place, page] : mirror_->pages())
      pages += std::get<0>(place) == medium ? 1 : 0;
    return pages;
  }
  // Every page's key follows from the salt that it is told with.
  void expect_salts() const {
    for (const auto& [place, page] : mirror_->pages()) {
      EXPECT_EQ(std::get<2>(place),
                cache::page_key(page.parent, h_->cache().fingerprint(), page.salt, page.tokens))
          << "medium " << static_cast<int>(std::get<0>(place)) << ", salt '" << page.salt << "'";
    }
  }
  int64_t loaded_from(Medium medium) const {
    return tiers_->prefetch_stats().loaded_tokens[static_cast<size_t>(medium)];
  }

  static void must(const Status& status) {
    ASSERT_TRUE(status.has_value()) << status.error().message();
  }

  std::unique_ptr<TreeMirror> mirror_;
  std::unique_ptr<CacheHarness> h_;
  std::unique_ptr<PageTiers> tiers_;
  std::unique_ptr<PrefixTree> tree_;
  int64_t loaded_ = 0;
};

std::vector<TierSetup> setups(TierSetup a) {
  std::vector<TierSetup> list;
  list.push_back(std::move(a));
  return list;
}
std::vector<TierSetup> setups(TierSetup a, TierSetup b) {
  std::vector<TierSetup> list = setups(std::move(a));
  list.push_back(std::move(b));
  return list;
}

TEST_P(PageTiersTest, WhatTheTreeEvictsComesBackFromTheHost) {
  build(setups(host()));
  EXPECT_EQ(serve(tokens_of({1, 2, 3, 4, 5}, 3)), 0);
  evict_all();
  EXPECT_GE(told(Medium::kHost), 5);
  EXPECT_EQ(serve(tokens_of({1, 2, 3, 4, 5}, 3)), 5 * kPageTokens);
  EXPECT_EQ(loaded_, 5);
  EXPECT_EQ(loaded_from(Medium::kHost), 5 * kPageTokens);
  EXPECT_EQ(serve(tokens_of({1, 2, 3, 4, 5}, 3), "other salt"), 0);
  EXPECT_GT(tiers_->tier(0).stats().hits, 0);
  EXPECT_EQ(tiers_->tier(0).stats().failures, 0);
}

TEST_P(PageTiersTest, PagesGoFromHostToDiskAndSurviveARestart) {
  const TemporaryFolder folder;
  build(setups(host(20000), disk(folder.path())));
  serve(tokens_of({1, 2, 3, 4, 5, 6, 7, 8}, 3));
  evict_all();
  serve(tokens_of({9, 10, 11, 12, 13, 14}, 3));
  evict_all();
  EXPECT_GT(tiers_->tier(0).stats().evictions, 0);
  EXPECT_GT(tiers_->tier(1).stats().puts, 0);
  EXPECT_EQ(told(Medium::kDisk), tiers_->tier(1).stats().usage.pages);
  EXPECT_EQ(told(Medium::kHost), tiers_->tier(0).stats().usage.pages);
  EXPECT_EQ(serve(tokens_of({1, 2, 3, 4, 5, 6, 7, 8}, 3)), 8 * kPageTokens);
  EXPECT_EQ(serve(tokens_of({9, 10, 11, 12, 13, 14}, 3)), 6 * kPageTokens);
  tiers_->store_all(*tree_);
  tiers_->wait_idle();

  tree_.reset();
  tiers_.reset();
  build(setups(host(), disk(folder.path())));
  EXPECT_GE(told(Medium::kDisk), 14) << "a restart tells what the disk kept";
  EXPECT_EQ(serve(tokens_of({1, 2, 3, 4, 5, 6, 7, 8}, 3)), 8 * kPageTokens);
  EXPECT_EQ(loaded_from(Medium::kDisk), 8 * kPageTokens);
}

// The same tokens of two tenants and of nobody: each page is told with its own salt, and after a
// restart only once that is known.
TEST_P(PageTiersTest, PagesAreToldWithTheirSalts) {
  const TemporaryFolder folder;
  const auto tokens = tokens_of({1, 2, 3, 4, 5, 6, 7, 8}, 3);
  const auto pages_of = [&](Medium medium, const std::string& salt) {
    int64_t pages = 0;
    for (const auto& [place, page] : mirror_->pages())
      pages += std::get<0>(place) == medium && page.salt == salt ? 1 : 0;
    return pages;
  };
  build(setups(host(20000), disk(folder.path())));
  for (const char* salt : {"", "alice", "bob"}) {
    serve(tokens, salt);
    evict_all();
  }
  expect_salts();
  tiers_->store_all(*tree_);
  tiers_->wait_idle();
  for (const char* salt : {"", "alice", "bob"}) {
    EXPECT_EQ(serve(tokens, salt), 8 * kPageTokens);
    EXPECT_GT(pages_of(Medium::kHost, salt) + pages_of(Medium::kDisk, salt), 0) << salt;
  }
  tiers_->store_all(*tree_);
  tiers_->wait_idle();
  expect_salts();
  EXPECT_EQ(told(Medium::kDisk), tiers_->tier(1).stats().usage.pages);
  const int64_t of_alice = pages_of(Medium::kDisk, "alice");
  const int64_t of_nobody = pages_of(Medium::kDisk, "");
  EXPECT_GT(of_alice, 0);

  tree_.reset();
  tiers_.reset();
  build(setups(host(), disk(folder.path())));
  EXPECT_EQ(told(Medium::kDisk), of_nobody);
  expect_salts();
  EXPECT_EQ(serve(tokens, "alice"), 8 * kPageTokens);
  EXPECT_EQ(pages_of(Medium::kDisk, "alice"), of_alice);
  EXPECT_EQ(pages_of(Medium::kDisk, "bob"), 0) << "nobody has said that salt yet";
  EXPECT_EQ(serve(tokens, "carol"), 0);
  EXPECT_EQ(serve(tokens, "bob"), 8 * kPageTokens);
  expect_salts();
  EXPECT_EQ(told(Medium::kDisk), tiers_->tier(1).stats().usage.pages);

  tree_.reset();
  tiers_.reset();
  build(setups(host(), disk(folder.path())), 40, {"bob", "eve"});
  EXPECT_EQ(pages_of(Medium::kDisk, ""), of_nobody);
  EXPECT_GT(pages_of(Medium::kDisk, "bob"), 0) << "a salt that is known from the start";
  EXPECT_EQ(pages_of(Medium::kDisk, "alice"), 0);
  expect_salts();
}

TEST_P(PageTiersTest, SelectiveTiersTakeWhatWasAskedForAgain) {
  const TemporaryFolder folder;
  TierOptions selective;
  selective.policy = WritePolicy::kSelective;
  selective.min_hits = 2;
  build(setups(disk(folder.path(), selective)));
  serve(tokens_of({1, 2, 3}, 3));
  tiers_->wait_idle();
  EXPECT_EQ(told(Medium::kDisk), 0);
  serve(tokens_of({1, 2, 4}, 3));
  tiers_->wait_idle();
  EXPECT_EQ(told(Medium::kDisk), 0);
  serve(tokens_of({1, 2, 3}, 3));
  tiers_->wait_idle();
  EXPECT_GE(told(Medium::kDisk), 2);
  evict_all();
  EXPECT_EQ(tiers_->tier(0).stats().usage.pages, told(Medium::kDisk)) << "not written back";
}

TEST_P(PageTiersTest, WriteThroughKeepsEveryClosedPage) {
  const TemporaryFolder folder;
  TierOptions through;
  through.policy = WritePolicy::kWriteThrough;
  build(setups(disk(folder.path(), through)));
  serve(tokens_of({1, 2, 3}, 3));
  tiers_->wait_idle();
  // The tree holds the same pages.
  EXPECT_EQ(told(Medium::kDisk), told(Medium::kDevice));
}

TEST_P(PageTiersTest, APlannedStopKeepsTheWholeTreeWhateverTheQueueHolds) {
  const TemporaryFolder folder;
  TierOptions small;
  small.max_queued_bytes = 40000;  // a few pages
  build(setups(host(), disk(folder.path(), small)));
  serve(tokens_of({1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, 3));
  serve(tokens_of({1, 2, 11, 12, 13, 14, 15, 16, 17, 18}, 3));
  tiers_->store_all(*tree_);
  tiers_->wait_idle();
  EXPECT_EQ(tiers_->tier(1).stats().dropped, 0);
  EXPECT_EQ(told(Medium::kDisk), told(Medium::kDevice));
}

TEST_P(PageTiersTest, DamageOnDiskIsAMissAndCounted) {
  const TemporaryFolder folder;
  build(setups(disk(folder.path())));
  serve(tokens_of({1, 2, 3, 4, 5}, 3));
  evict_all();
  // The payload of every slot.
  for (const auto& entry : std::filesystem::directory_iterator(folder.path())) {
    if (entry.path().extension() != ".slab") continue;
    const int64_t slot_bytes = *SlabFile::read_slot_bytes(entry.path().string());
    const int64_t size = static_cast<int64_t>(entry.file_size());
    std::fstream file(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
    for (int64_t slot = kSlabAlignment; slot < size; slot += slot_bytes) {
      file.seekp(slot + 1030);
      file.put('\x77');
      file.put('\x78');
    }
  }
  EXPECT_EQ(serve(tokens_of({1, 2, 3, 4, 5}, 3)), 0);
  EXPECT_GT(tiers_->tier(0).stats().failures, 0);
  EXPECT_EQ(tiers_->prefetch_stats().failed_pages, 5);
  EXPECT_EQ(told(Medium::kDisk), tiers_->tier(0).stats().usage.pages) << "and removed";
}

TEST_P(PageTiersTest, WhatIsFasterToComputeIsNotLoaded) {
  TierOptions slow;
  slow.expected_bytes_per_second = 1000;
  build(setups(host(1 << 20, slow)));
  serve(tokens_of({1, 2, 3, 4, 5}, 3));
  evict_all();
  tiers_->set_costs({.token_seconds = 1e-6, .token_context_seconds = 0});
  EXPECT_EQ(serve(tokens_of({1, 2, 3, 4, 5}, 3)), 0);
  EXPECT_EQ(tiers_->prefetch_stats().skipped_by_cost, 1);
  evict_all();
  tiers_->set_costs({.token_seconds = 100, .token_context_seconds = 0});
  EXPECT_EQ(serve(tokens_of({1, 2, 3, 4, 5}, 3)), 5 * kPageTokens);
  // Measured now: host memory is faster than was expected.
  EXPECT_LT(tiers_->tier(0).load_seconds(100000), 1);
}

TEST_P(PageTiersTest, LoadedPagesPushOutOthersAndStopWhereNoneCanGo) {
  build(setups(host()));
  serve(tokens_of({1, 2, 3, 4, 5, 6, 7, 8}, 3));
  evict_all();
  // Sequences take nearly everything.
  std::vector<SequenceId> busy = {*h_->add(), *h_->add()};
  uint64_t seed = 9;
  must(h_->extend(busy[0], cache::testing::random_tokens(seed, 240)));
  must(h_->extend(busy[1], cache::testing::random_tokens(seed, 170)));
  const int64_t hit = serve(tokens_of({1, 2, 3, 4, 5, 6}, 1));
  EXPECT_EQ(hit, loaded_ * kPageTokens);
  h_->remove(busy[0]);
  EXPECT_EQ(serve(tokens_of({1, 2, 3, 4, 5, 6, 7, 8}, 3)), 8 * kPageTokens);
}

TEST_P(PageTiersTest, ACancelledPrefetchLeavesNothingBehind) {
  build(setups(host()));
  std::atomic<int> woken = 0;
  tiers_->set_wakeup([&] { ++woken; });
  serve(tokens_of({1, 2, 3}, 3));
  evict_all();
  const auto id = tiers_->prefetch(
      {.first_page = 0, .parent_key = {}, .tokens = tokens_of({1, 2, 3}), .salt = ""});
  tiers_->cancel(id);
  tiers_->wait_idle();
  PrefixLease lease;
  EXPECT_EQ(tiers_->install(id, *tree_, lease), 0);
  EXPECT_GT(woken, 0);
  must(tiers_->clear());
  EXPECT_EQ(told(Medium::kHost), 0);
  EXPECT_EQ(serve(tokens_of({1, 2, 3}, 3)), 0);
}

TEST_P(PageTiersTest, WhatComesTooLateIsCounted) {
  build(setups(host()));
  serve(tokens_of({1, 2, 3}, 3));
  evict_all();
  const auto late = [&] {
    return tiers_->prefetch_stats().late_answers[static_cast<size_t>(Medium::kHost)];
  };
  const auto ask = [&] {
    return tiers_->prefetch(
        {.first_page = 0, .parent_key = {}, .tokens = tokens_of({1, 2, 3}), .salt = ""});
  };
  tiers_->give_up(ask());  // before the tier has said what it holds
  EXPECT_EQ(late(), 1);
  const auto id = ask();
  while (tiers_->expected_pages(id) == 0) tiers_->poll();
  tiers_->give_up(id);  // before any page is taken in
  EXPECT_GE(late(), 1 + 3);
  const int64_t counted = late();
  EXPECT_EQ(serve(tokens_of({1, 2, 3}, 3)), 3 * kPageTokens);
  EXPECT_EQ(late(), counted);
}

// Many requests over small tiers: what readers of the events know is what the tiers hold, and every
// page that comes back holds what its tokens say.
TEST_P(PageTiersTest, EventsFollowSmallTiersThroughManyRequests) {
  const TemporaryFolder folder;
  auto store = DiskStore::open(folder.path(), 24 * kSlabAlignment);
  ASSERT_TRUE(store.has_value());
  build(setups(host(24000), {std::move(*store), {}}));
  uint64_t seed = 11;
  const auto below = [&](uint64_t n) { return cache::testing::next_random(seed) % n; };
  int64_t hits = 0, most_hidden = 0;
  for (int i = 0; i < 200; ++i) {
    SCOPED_TRACE("request " + std::to_string(i));
    std::vector<int32_t> pages = {static_cast<int32_t>(below(3))};
    while (pages.size() < 8 && below(6) != 0) pages.push_back(static_cast<int32_t>(3 + below(2)));
    hits += serve(tokens_of(pages, static_cast<int>(1 + below(9))), below(5) == 0 ? "salt" : "");
    // Part of the tree goes down.
    const int page_class = static_cast<int>(below(h_->cache().num_page_classes()));
    tree_->evict(page_class, h_->cache().page_class(page_class).free_pages + 1 +
                                 static_cast<int64_t>(below(6)));
    tiers_->wait_idle();
    ASSERT_EQ(mirror_->error(), "");
    // Pages whose parents are gone are held and not told; that is rare.
    const int64_t hidden = tiers_->tier(0).stats().usage.pages - told(Medium::kHost) +
                           tiers_->tier(1).stats().usage.pages - told(Medium::kDisk);
    ASSERT_GE(hidden, 0);
    most_hidden = std::max(most_hidden, hidden);
    ASSERT_LE(told(Medium::kHost), tiers_->tier(0).stats().usage.pages);
    ASSERT_LE(told(Medium::kDisk), tiers_->tier(1).stats().usage.pages);
    int64_t in_tree = 0;
    for (int g = 0; g < h_->cache().num_groups(); ++g) in_tree += tree_->group_pages(g);
    ASSERT_EQ(told(Medium::kDevice), in_tree);
    expect_salts();
    if (HasFailure()) return;
  }
  EXPECT_LE(most_hidden, 6);
  EXPECT_GT(hits, 100 * kPageTokens);
  EXPECT_GT(loaded_from(Medium::kHost), 0);
  EXPECT_GT(loaded_from(Medium::kDisk), 0);
  EXPECT_GT(tiers_->tier(0).stats().evictions, 20);
  EXPECT_GT(tiers_->tier(1).stats().evictions, 20);
}

INSTANTIATE_TEST_SUITE_P(Formats, PageTiersTest,
                         ::testing::Values("4bit", "8bit", "bf16", "k=nvfp4+mean,v=nvfp4"),
                         [](const auto& format) {
                           std::string name;
                           for (const char c : format.param)
                             if (std::isalnum(static_cast<unsigned char>(c))) name += c;
                           return name;
                         });

}  // namespace
}  // namespace kvant::serve
