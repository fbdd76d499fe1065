// Pages that move between the cache, host memory and the disk, and the disk's after a restart: a
// foreign subscriber knows where each lies and whose it is.
#include <gtest/gtest.h>

#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "kvant/cache/prefix_tree.h"
#include "kvant/cache/testing/cache_harness.h"
#include "kvant/serve/events/kv_event_source.h"
#include "kvant/serve/events/testing/foreign_reader.h"
#include "kvant/serve/events/testing/subscriber.h"
#include "kvant/serve/tiers/disk_store.h"
#include "kvant/serve/tiers/host_store.h"
#include "kvant/serve/tiers/page_tiers.h"
#include "kvant/serve/tiers/testing/test_pages.h"

namespace kvant::serve {
namespace {

using cache::testing::CacheHarness;
using testing::ForeignReader;
using testing::TemporaryFolder;

constexpr int kPageTokens = 16;

class TierEvents : public ::testing::TestWithParam<KvEventEncoding> {
 protected:
  void SetUp() override {
    if (!ForeignReader::available()) GTEST_SKIP() << "needs python3-zmq and python3-msgpack";
  }

  // A server over the folder: its cache, tiers and publisher, and a subscriber.
  void start() {
    cache::CacheConfig config;
    config.layers = {{.num_kv_heads = 1, .head_dim = 16}};
    config.format = *formats::parse_cache_format("nvfp4");
    config.page_tokens = kPageTokens;
    config.max_tokens = 400;
    config.max_sequences = 2;
    harness_ = std::move(*CacheHarness::create(config));
    tree_ = std::move(*cache::PrefixTree::create(harness_->cache()));
    std::vector<TierSetup> setups;
    setups.push_back({std::make_unique<HostStore>(1 << 20), {}});
    setups.push_back({std::move(*DiskStore::open(folder_.path(), 16 << 20)), {}});
    tiers_ = std::make_unique<PageTiers>(harness_->cache(), std::move(setups));
    KvEventsConfig events;
    events.enable_kv_cache_events = true;
    events.endpoint = events.replay_endpoint = "tcp://127.0.0.1:*";
    events.encoding = GetParam();
    publisher_ = std::move(*KvEventPublisher::create(events));
    source_ = std::make_unique<KvEventSource>(*publisher_, kPageTokens, 1);
    tree_->set_observer(source_.get());
    tiers_->set_observer(source_.get());
    tree_->set_listener(tiers_.get());
    source_->end_step();
    subscribe();
  }
  void stop() {
    tiers_->store_all(*tree_);
    tiers_->wait_idle();
    reader_.reset();
    tree_.reset();
    tiers_.reset();
    source_.reset();
    publisher_.reset();
  }

  static void must(const Status& status) {
    ASSERT_TRUE(status.has_value()) << status.error().message();
  }

  // One request; returns the tokens that were not computed.
  int64_t serve(const std::string& salt) {
    const int64_t limit = static_cast<int64_t>(tokens_.size()) - 1;
    cache::PrefixMatch match = tree_->match(tokens_, salt, limit);
    cache::PrefixLease lease = tree_->acquire(match);
    const int64_t whole = limit / kPageTokens * kPageTokens;
    const int64_t first = match.num_pages * kPageTokens;
    const auto id = tiers_->prefetch({.first_page = match.num_pages,
                                      .parent_key = tree_->key(match),
                                      .tokens = {tokens_.begin() + first, tokens_.begin() + whole},
                                      .salt = salt});
    tiers_->wait_idle();
    tiers_->install(id, *tree_, lease);
    match = tree_->match(tokens_, salt, limit);
    lease = tree_->acquire(match);
    const cache::SequenceId sequence = *harness_->add();
    must(tree_->attach(lease, sequence));
    const int64_t hit = match.num_pages * kPageTokens;
    const std::vector<uint32_t> ids(tokens_.begin(), tokens_.end());
    harness_->note(sequence, std::span(ids).first(hit));
    const cache::StepSequence step{sequence, static_cast<int32_t>(limit + 1 - hit)};
    EXPECT_TRUE(tree_->make_room(*harness_->cache().needed_pages(std::span(&step, 1))));
    must(harness_->extend(sequence, std::span(ids).subspan(hit)));
    must(tree_->insert(lease, sequence, tokens_, salt));
    harness_->remove(sequence);
    source_->end_step();
    return hit;
  }
  void evict_all() {
    for (int c = 0; c < harness_->cache().num_page_classes(); ++c) tree_->evict(c, 1 << 20);
    tiers_->wait_idle();
    source_->end_step();
  }

  // "MEDIUM salt" of the blocks that the subscriber knows.
  std::multiset<std::string> index() {
    testing::wait_until_sent(*publisher_);
    const nlohmann::json found =
        reader_->index_after(static_cast<uint64_t>(publisher_->stats().batches_published - 1));
    EXPECT_EQ(found["errors"], nlohmann::json::array());
    std::multiset<std::string> blocks;
    for (const std::string line : found["blocks"])
      blocks.insert(line.substr(0, line.find(' ', line.find(' ') + 1)));
    return blocks;
  }
  // Tells of a block and takes it back until the subscriber, who joins late, has seen something.
  void subscribe() {
    reader_ =
        std::make_unique<ForeignReader>(publisher_->endpoint(), publisher_->replay_endpoint(), "");
    const std::vector<uint32_t> tokens(kPageTokens, 7);
    for (int i = 0; i < 200 && !reader_->has_line(50); ++i) {
      source_->stored(77, {}, tokens, {.medium = KvMedium::kHost}, "");
      source_->end_step();
      source_->removed(77, {.medium = KvMedium::kHost});
      source_->end_step();
    }
    EXPECT_EQ(reader_->line(), "ready");
  }

  TemporaryFolder folder_;
  std::vector<int32_t> tokens_ = [] {
    std::vector<int32_t> tokens;
    for (int i = 0; i < 5 * kPageTokens + 3; ++i) tokens.push_back(i * i);
    return tokens;
  }();
  std::unique_ptr<CacheHarness> harness_;
  std::unique_ptr<PageTiers> tiers_;
  std::unique_ptr<cache::PrefixTree> tree_;
  std::unique_ptr<KvEventPublisher> publisher_;
  std::unique_ptr<KvEventSource> source_;
  std::unique_ptr<ForeignReader> reader_;
};

std::multiset<std::string> five(const std::vector<std::string>& places) {
  std::multiset<std::string> blocks;
  for (const std::string& place : places) {
    for (int i = 0; i < 5; ++i) blocks.insert(place);
  }
  return blocks;
}

TEST_P(TierEvents, TenantsOfTheSameTokensAreToldApart) {
  start();
  serve("alice");
  serve("bob");
  EXPECT_EQ(index(), five({"GPU alice", "GPU bob"}));
  evict_all();
  EXPECT_EQ(index(), five({"CPU alice", "CPU bob"}));
  EXPECT_EQ(serve("alice"), 5 * kPageTokens);
  EXPECT_EQ(index(), five({"GPU alice", "CPU alice", "CPU bob"}));
  stop();

  start();
  EXPECT_EQ(index(), five({})) << "the disk has pages of a salt that nobody has said yet";
  EXPECT_EQ(serve("bob"), 0) << "host memory has not outlived the process";
  serve("");
  EXPECT_EQ(index(), five({"GPU ", "GPU bob"}));
  EXPECT_EQ(serve("alice"), 5 * kPageTokens);
  EXPECT_EQ(index(), five({"GPU ", "GPU bob", "GPU alice", "DISK alice"}));
  stop();

  start();
  EXPECT_EQ(index(), five({"DISK "})) << "those without a salt are known from the start";
  EXPECT_EQ(serve("alice"), 5 * kPageTokens);
  EXPECT_EQ(index(), five({"DISK ", "GPU alice", "DISK alice"}));
  evict_all();
  EXPECT_EQ(serve("bob"), 5 * kPageTokens);
  EXPECT_EQ(index(), five({"DISK ", "DISK alice", "CPU alice", "DISK bob", "GPU bob"}));
  stop();
}

INSTANTIATE_TEST_SUITE_P(Encodings, TierEvents,
                         ::testing::Values(KvEventEncoding::kMap, KvEventEncoding::kArray),
                         [](const auto& parameter) {
                           return parameter.param == KvEventEncoding::kMap ? "Map" : "Array";
                         });

}  // namespace
}  // namespace kvant::serve
