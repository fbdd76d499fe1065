#include "kvant/cache/prefix_tree.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "kvant/cache/testing/small_caches.h"
#include "kvant/cache/testing/tree_mirror.h"

namespace kvant::cache {
namespace {

using testing::CacheHarness;
using testing::TreeMirror;

constexpr int kPageTokens = 16;

// `pages` whole pages of tokens; equal `first` means equal pages.
std::vector<int32_t> tokens_of(std::vector<int32_t> pages, int rest = 0) {
  std::vector<int32_t> tokens;
  for (const int32_t page : pages) {
    for (int i = 0; i < kPageTokens; ++i) tokens.push_back(page * 100 + i);
  }
  for (int i = 0; i < rest; ++i) tokens.push_back(7000 + i);
  return tokens;
}

class PrefixTreeTest : public ::testing::Test {
 protected:
  void build(const std::string& spec, int window = 0, const PrefixTreeOptions& options = {},
             int64_t max_tokens = 1024) {
    CacheConfig config;
    config.layers = {{.num_kv_heads = 1, .head_dim = 16}};
    if (window > 0) config.layers.push_back({.num_kv_heads = 2, .head_dim = 16, .window = window});
    config.format = *formats::parse_cache_format(spec);
    config.page_tokens = kPageTokens;
    config.max_tokens = max_tokens;
    config.max_sequences = 4;
    config.max_step_tokens = 512;
    config.held_sink_pages = 8;
    config.held_windows = 8;
    auto harness = CacheHarness::create(config);
    ASSERT_TRUE(harness.has_value()) << harness.error().message();
    h_ = std::move(*harness);
    auto tree = PrefixTree::create(h_->cache(), options);
    ASSERT_TRUE(tree.has_value());
    tree_ = std::move(*tree);
    tree_->set_observer(&mirror_);
  }

  // Serves one request and returns the tokens that were hit.
  int64_t serve(const std::vector<int32_t>& tokens, std::string_view salt = "",
                const Retention& retention = {}) {
    const int64_t limit = static_cast<int64_t>(tokens.size()) - 1;
    const PrefixMatch match = tree_->match(tokens, salt, limit);
    PrefixLease lease = tree_->acquire(match);
    const SequenceId id = *h_->add();
    const int64_t hit = match.num_pages * kPageTokens;
    const std::vector<uint32_t> ids(tokens.begin(), tokens.end());
    must(tree_->attach(lease, id));
    h_->note(id, std::span(ids).first(hit));
    must(h_->extend(id, std::span(ids).subspan(hit)));
    must(tree_->insert(lease, id, tokens, salt, retention));
    EXPECT_EQ(lease.num_pages(), static_cast<int64_t>(tokens.size()) / kPageTokens);
    h_->remove(id);
    tree_->count_query(static_cast<int64_t>(tokens.size()), hit);
    must(tree_->check_invariants());
    return hit;
  }

  int64_t hit(const std::vector<int32_t>& tokens, std::string_view salt = "") {
    return tree_->match(tokens, salt, static_cast<int64_t>(tokens.size())).num_pages;
  }

  static void must(const Status& status) {
    ASSERT_TRUE(status.has_value()) << status.error().message();
  }

  TreeMirror mirror_;
  std::unique_ptr<CacheHarness> h_;
  std::unique_ptr<PrefixTree> tree_;
};

TEST_F(PrefixTreeTest, ASecondRequestSharesWholePagesOfTheFirst) {
  build("4bit");
  EXPECT_EQ(serve(tokens_of({1, 2, 3}, 5)), 0);
  EXPECT_EQ(serve(tokens_of({1, 2, 9}, 5)), 2 * kPageTokens);
  EXPECT_EQ(serve(tokens_of({1, 2, 3})), 2 * kPageTokens) << "the last token is computed";
  EXPECT_EQ(serve(tokens_of({2, 1})), 0) << "the same pages in another order";
  EXPECT_EQ(tree_->stats().nodes, 6);
  EXPECT_EQ(tree_->stats().hit_tokens, 4 * kPageTokens);
  EXPECT_EQ(tree_->stats().query_tokens, 53 + 53 + 48 + 32);
  EXPECT_EQ(tree_->stats().leased_nodes, 0);
  EXPECT_EQ(tree_->group_pages(0), 6);
  EXPECT_EQ(h_->cache().bytes().held_pages_now, 6);
}

TEST_F(PrefixTreeTest, SaltsSeeOnlyTheirOwnPages) {
  build("4bit");
  serve(tokens_of({1, 2}, 3), "a");
  EXPECT_EQ(hit(tokens_of({1, 2}), "a"), 2);
  EXPECT_EQ(hit(tokens_of({1, 2}), "b"), 0);
  EXPECT_EQ(hit(tokens_of({1, 2}), ""), 0);
  EXPECT_EQ(serve(tokens_of({1, 2}, 3), "b"), 0);
  EXPECT_EQ(tree_->stats().nodes, 4) << "nothing is shared between them";
}

TEST_F(PrefixTreeTest, ARunOfNewPagesIsOneEventWithItsParent) {
  build("int8");
  serve(tokens_of({1, 2, 3}, 1));
  serve(tokens_of({1, 2, 4, 5}, 1));
  EXPECT_EQ(mirror_.runs(), (std::vector<size_t>{3, 2}));
  EXPECT_EQ(mirror_.error(), "");
  EXPECT_EQ(mirror_.pages().size(), 5u);
  for (const auto& [place, page] : mirror_.pages()) {
    const std::vector<uint32_t> salt_and_tokens = page.tokens;
    EXPECT_EQ(std::get<2>(place),
              page_key(page.parent, h_->cache().fingerprint(), page.salt, page.tokens));
  }
}

TEST_F(PrefixTreeTest, AWindowShortensAHitToWhereItsPagesAre) {
  build("k=fp8,v=nvfp4", 40);  // up to three full pages before a query
  serve(tokens_of({1, 2, 3, 4, 5, 6}, 3));
  EXPECT_EQ(hit(tokens_of({1, 2, 3, 4, 5, 6})), 6);
  // The sequence computed all in one step, so that earlier pages had left the window.
  EXPECT_EQ(hit(tokens_of({1, 2, 3, 4, 5})), 0);
  EXPECT_EQ(hit(tokens_of({1, 2, 9})), 0);
  EXPECT_EQ(serve(tokens_of({1, 2, 9}, 2)), 0);
  EXPECT_EQ(hit(tokens_of({1, 2, 8})), 2) << "the second request brought their window pages back";
  EXPECT_EQ(mirror_.error(), "");
}

TEST_F(PrefixTreeTest, TheLeastRecentlyUsedTailGoesFirst) {
  build("int8");
  serve(tokens_of({1, 2, 3}, 1));
  serve(tokens_of({1, 4}, 1));
  serve(tokens_of({1, 2}, 1));
  const int64_t free = h_->cache().page_class(0).free_pages;
  const int stored = h_->cache().closed_page_class(0, 0);
  const int64_t stored_free = h_->cache().page_class(stored).free_pages;
  EXPECT_TRUE(tree_->evict(stored, stored_free + 1));
  EXPECT_EQ(hit(tokens_of({1, 2, 3})), 2) << "page 3 was used longest ago";
  EXPECT_TRUE(tree_->evict(stored, stored_free + 2));
  EXPECT_EQ(hit(tokens_of({1, 4})), 1);
  EXPECT_TRUE(tree_->evict(stored, stored_free + 3));
  EXPECT_EQ(hit(tokens_of({1, 2})), 1) << "a parent goes after its children";
  EXPECT_TRUE(tree_->evict(stored, stored_free + 4));
  EXPECT_FALSE(tree_->evict(stored, stored_free + 5)) << "nothing is left";
  EXPECT_EQ(tree_->stats().evicted[0], 4);
  EXPECT_GE(h_->cache().page_class(0).free_pages, free);
  EXPECT_TRUE(mirror_.pages().empty());
  must(tree_->check_invariants());
}

TEST_F(PrefixTreeTest, LeasedPagesStay) {
  build("4bit");
  serve(tokens_of({1, 2}, 1));
  serve(tokens_of({3, 4}, 1));
  const PrefixLease lease = tree_->acquire(tree_->match(tokens_of({1, 2}), "", 100));
  for (int c = 0; c < h_->cache().num_page_classes(); ++c) tree_->evict(c, 1000000);
  EXPECT_EQ(hit(tokens_of({1, 2})), 2);
  EXPECT_EQ(hit(tokens_of({3, 4})), 0);
  EXPECT_FALSE(tree_->clear().has_value());
  for (int c = 0; c < h_->cache().num_page_classes(); ++c) EXPECT_EQ(tree_->evictable_pages(c), 0);
}

TEST_F(PrefixTreeTest, RoomForASinkPageTakesTheOldestFirstPageWithAllBehindIt) {
  build("4bit");
  serve(tokens_of({1, 2, 3}, 1));
  serve(tokens_of({4, 5}, 1));
  const int sink = h_->cache().closed_page_class(0, 0);
  ASSERT_NE(sink, h_->cache().closed_page_class(0, 1));
  EXPECT_EQ(tree_->evictable_pages(sink), 2);
  EXPECT_TRUE(tree_->evict(sink, h_->cache().page_class(sink).free_pages + 1));
  EXPECT_EQ(hit(tokens_of({1, 2, 3})), 0);
  EXPECT_EQ(hit(tokens_of({4, 5})), 2);
  EXPECT_EQ(tree_->stats().evicted[static_cast<size_t>(EvictionCause::kSink)], 3);
}

TEST_F(PrefixTreeTest, AWindowPageGoesAloneAndComesBack) {
  build("k=fp8,v=nvfp4", 40);
  serve(tokens_of({1, 2, 3}, 1));
  EXPECT_EQ(hit(tokens_of({1, 2, 3})), 3);
  const int window = h_->cache().closed_page_class(1, 1);
  EXPECT_TRUE(tree_->evict(window, h_->cache().page_class(window).free_pages + 1));
  EXPECT_EQ(tree_->stats().nodes, 3);
  EXPECT_EQ(tree_->group_pages(1), 2);
  EXPECT_EQ(hit(tokens_of({1, 2, 3})), 0);
  serve(tokens_of({1, 2, 3}, 1));
  EXPECT_EQ(hit(tokens_of({1, 2, 3})), 3);
  EXPECT_EQ(mirror_.error(), "");
}

TEST_F(PrefixTreeTest, WindowPagesThatAreReadStayLongest) {
  build("k=fp8,v=nvfp4", 40);
  serve(tokens_of({1, 2, 3}, 1));
  const PrefixLease lease = tree_->acquire(tree_->match(tokens_of({1, 2, 3}), "", 100));
  const SequenceId reader = *h_->add();
  ASSERT_OK(tree_->attach(lease, reader));
  serve(tokens_of({4, 5, 6}, 1));  // used later, but read by nobody
  const int window = h_->cache().closed_page_class(1, 1);
  EXPECT_TRUE(tree_->evict(window, h_->cache().page_class(window).free_pages + 3));
  EXPECT_EQ(hit(tokens_of({1, 2, 3})), 3);
  EXPECT_EQ(hit(tokens_of({4, 5, 6})), 0);
  EXPECT_FALSE(tree_->evict(window, h_->cache().page_class(window).free_pages + 1))
      << "what is left would not be freed";
  EXPECT_EQ(hit(tokens_of({1, 2, 3})), 3);
  h_->remove(reader);
}

TEST_F(PrefixTreeTest, PriorityHoldsUntilItExpires) {
  PrefixTreeOptions options;
  options.policy = EvictionPolicy::kPriority;
  build("int8", 0, options);
  const int stored = h_->cache().closed_page_class(0, 0);
  const auto evict_one = [&] {
    return tree_->evict(stored, h_->cache().page_class(stored).free_pages + 1);
  };
  tree_->set_time(10);
  serve(tokens_of({1}, 1), "", {.priority = 80, .seconds = 5});
  tree_->set_time(11);
  serve(tokens_of({2}, 1));
  serve(tokens_of({3}, 1), "", {.priority = 10});
  EXPECT_TRUE(evict_one());
  EXPECT_EQ(hit(tokens_of({3})), 0) << "the lowest priority";
  EXPECT_TRUE(evict_one());
  EXPECT_EQ(hit(tokens_of({2})), 0) << "older than page 1, but of lower priority";
  serve(tokens_of({2}, 1));
  tree_->set_time(16);
  must(tree_->check_invariants());
  EXPECT_TRUE(evict_one());
  EXPECT_EQ(hit(tokens_of({1})), 0) << "expired, and used longer ago";
  EXPECT_EQ(hit(tokens_of({2})), 1);
}

TEST_F(PrefixTreeTest, CostAwareKeepsWhatIsDearToCompute) {
  PrefixTreeOptions options;
  options.policy = EvictionPolicy::kCostAware;
  options.costs = {.token_seconds = 1e-3, .token_context_seconds = 1e-4, .recency_seconds = 100};
  build("int8", 0, options);
  tree_->set_time(0);
  serve(tokens_of({1, 2, 3, 4, 5, 6}, 1));
  tree_->set_time(10);
  serve(tokens_of({7}, 1));
  const int stored = h_->cache().closed_page_class(0, 0);
  EXPECT_TRUE(tree_->evict(stored, h_->cache().page_class(stored).free_pages + 1));
  EXPECT_EQ(hit(tokens_of({7})), 0) << "newer, but a page far into a context costs more";
  EXPECT_EQ(hit(tokens_of({1, 2, 3, 4, 5, 6})), 6);
  // Long after, age counts for more.
  tree_->set_time(400);
  serve(tokens_of({7}, 1));
  EXPECT_TRUE(tree_->evict(stored, h_->cache().page_class(stored).free_pages + 1));
  EXPECT_EQ(hit(tokens_of({7})), 1);
  EXPECT_EQ(hit(tokens_of({1, 2, 3, 4, 5, 6})), 5);
}

TEST_F(PrefixTreeTest, ALeaseOnOtherTokensIsRefused) {
  build("4bit");
  serve(tokens_of({1, 2}, 1));
  PrefixLease lease = tree_->acquire(tree_->match(tokens_of({1, 2}), "", 100));
  const SequenceId id = *h_->add();
  const std::vector<int32_t> other = tokens_of({1, 3, 4});
  ASSERT_OK(h_->extend(id, std::vector<uint32_t>(other.begin(), other.end())));
  EXPECT_EQ(tree_->insert(lease, id, other, "").error().code(), ErrorCode::kInvalidArgument);
  tree_->truncate(lease, 1);
  EXPECT_FALSE(tree_->insert(lease, id, std::span(other).first(20), "").has_value());
  EXPECT_FALSE(tree_->insert(lease, id, other, "salt").has_value());
  ASSERT_OK(tree_->insert(lease, id, other, ""));
  EXPECT_EQ(lease.num_pages(), 3);
  ASSERT_OK(tree_->check_invariants());
}

TEST_F(PrefixTreeTest, ClearForgetsEverything) {
  build("k=fp8,v=nvfp4", 40);
  serve(tokens_of({1, 2, 3}, 1), "a");
  serve(tokens_of({4, 5}, 1), "b");
  ASSERT_OK(tree_->clear());
  EXPECT_EQ(tree_->stats().nodes, 0);
  EXPECT_EQ(tree_->stats().bytes, 0);
  EXPECT_EQ(h_->cache().bytes().stored_pages_now, 0);
  EXPECT_TRUE(mirror_.pages().empty());
  ASSERT_OK(tree_->check_invariants());
  EXPECT_EQ(serve(tokens_of({1, 2, 3}, 1), "a"), 0);
}

TEST(PrefixTree, RecentFormatsAreRefused) {
  CacheConfig config;
  config.layers = {{.num_kv_heads = 1, .head_dim = 16}};
  config.format = *formats::parse_cache_format("k=int8,v=int8+recent32");
  config.page_tokens = kPageTokens;
  config.max_tokens = 256;
  const auto harness = CacheHarness::create(config);
  ASSERT_TRUE(harness.has_value());
  const auto tree = PrefixTree::create((*harness)->cache());
  ASSERT_FALSE(tree.has_value());
  EXPECT_EQ(tree.error().code(), ErrorCode::kUnsupported);
}

TEST(EvictionPolicy, NamesAreThoseOfTheTable) {
  for (const EvictionPolicy policy :
       {EvictionPolicy::kLru, EvictionPolicy::kPriority, EvictionPolicy::kCostAware})
    EXPECT_EQ(*parse_eviction_policy(eviction_policy_name(policy)), policy);
  const auto unknown = parse_eviction_policy("fifo");
  ASSERT_FALSE(unknown.has_value());
  EXPECT_NE(unknown.error().message().find("lru, priority, cost"), std::string::npos);
}

TEST(PageKeys, AnEventIdIsNeverZero) {
  PageKey key{};
  EXPECT_EQ(event_id(key), 1u);
  key[0] = 0x34;
  key[1] = 0x12;
  key[8] = 0xff;
  EXPECT_EQ(event_id(key), 0x1234u);
}

}  // namespace
}  // namespace kvant::cache
