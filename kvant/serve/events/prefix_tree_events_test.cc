// The index that a foreign subscriber rebuilds from events equals the prefix tree, after requests
// at random against a cache that overflows.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kvant/cache/prefix_tree.h"
#include "kvant/cache/testing/cache_harness.h"
#include "kvant/serve/events/kv_event_source.h"
#include "kvant/serve/events/testing/foreign_reader.h"
#include "kvant/serve/events/testing/subscriber.h"

namespace kvant::serve {
namespace {

using cache::PageKey;
using cache::PrefixLease;
using cache::testing::CacheHarness;
using testing::ForeignReader;

constexpr int kPageTokens = 16;

struct Scenario {
  std::string name;
  std::vector<int> windows;  // of the layers; 0: full attention
  KvEventEncoding encoding = KvEventEncoding::kMap;
};

void PrintTo(const Scenario& scenario, std::ostream* out) {
  *out << scenario.name;
}

class PrefixTreeEvents : public ::testing::TestWithParam<Scenario> {
 protected:
  void SetUp() override {
    if (!ForeignReader::available()) GTEST_SKIP() << "needs python3-zmq and python3-msgpack";
    cache::CacheConfig config;
    for (const int window : GetParam().windows) {
      config.layers.push_back({.num_kv_heads = 1, .head_dim = 16, .window = window});
    }
    config.format = *formats::parse_cache_format("nvfp4");
    config.page_tokens = kPageTokens;
    config.max_tokens = 400;
    config.max_sequence_tokens = 160;
    config.max_sequences = 2;
    config.max_step_tokens = 160;
    config.held_windows = 4;
    auto harness = CacheHarness::create(config);
    ASSERT_TRUE(harness.has_value()) << harness.error().message();
    h_ = std::move(*harness);
    auto tree = cache::PrefixTree::create(h_->cache());
    ASSERT_TRUE(tree.has_value()) << tree.error().message();
    tree_ = std::move(*tree);

    KvEventsConfig events;
    events.enable_kv_cache_events = true;
    events.endpoint = events.replay_endpoint = "tcp://127.0.0.1:*";
    events.encoding = GetParam().encoding;
    auto publisher = KvEventPublisher::create(events);
    ASSERT_TRUE(publisher.has_value()) << publisher.error().message();
    publisher_ = std::move(*publisher);
    source_ = std::make_unique<KvEventSource>(*publisher_, kPageTokens, h_->cache().num_groups());
    tree_->set_observer(source_.get());
    reader_ =
        std::make_unique<ForeignReader>(publisher_->endpoint(), publisher_->replay_endpoint(), "");
  }

  static void must(const Status& status) {
    ASSERT_TRUE(status.has_value()) << status.error().message();
  }

  // Prompts of up to nine pages that share beginnings, of three tenants.
  void serve() {
    const std::string salt = pick(3) == 0 ? "tenant" + std::to_string(pick(2)) : "";
    std::vector<int32_t> tokens;
    for (int pages = 1 + pick(8); pages > 0; --pages) {
      const int variant = pick(3);
      for (int i = 0; i < kPageTokens; ++i) tokens.push_back(variant * 70'000 + i);
    }
    tokens.push_back(7);
    const auto size = static_cast<int64_t>(tokens.size());
    const cache::PrefixMatch match = tree_->match(tokens, salt, size - 1);
    PrefixLease lease = tree_->acquire(match);
    const cache::SequenceId id = *h_->add();
    const std::vector<uint32_t> ids(tokens.begin(), tokens.end());
    const int64_t hit = match.num_pages * kPageTokens;
    must(tree_->attach(lease, id));
    h_->note(id, std::span(ids).first(hit));
    const cache::StepSequence step = {id, static_cast<int32_t>(size - hit)};
    const auto needed = h_->cache().needed_pages(std::span(&step, 1));
    ASSERT_TRUE(needed.has_value()) << needed.error().message();
    ASSERT_TRUE(tree_->make_room(*needed));
    must(h_->extend(id, std::span(ids).subspan(hit)));
    must(tree_->insert(lease, id, tokens, salt));
    h_->remove(id);
    source_->end_step();
  }

  Status joined() {
    if (reader_->line() == "ready") return {};
    return Error(ErrorCode::kInternal, "the foreign subscriber has seen nothing");
  }

  int pick(int below) { return static_cast<int>(random_() % static_cast<unsigned>(below)); }

  std::vector<std::string> listing() const {
    std::map<PageKey, std::string> paths;
    std::vector<std::string> lines;
    tree_->for_each_page([&](const cache::TreePage& page) {
      std::string path =
          page.parent_key == PageKey{} ? std::string(page.salt) : paths.at(page.parent_key);
      for (const uint32_t token : page.token_ids) {
        path += ' ';
        path += std::to_string(token);
      }
      paths[page.key] = path;
      const int groups = h_->cache().num_groups();
      for (int g = 0; g < groups; ++g) {
        if (!page.held.has(g)) continue;
        lines.push_back("GPU " + path);
        if (groups > 1) lines.back() += " #" + std::to_string(g);
      }
    });
    std::sort(lines.begin(), lines.end());
    return lines;
  }

  std::unique_ptr<CacheHarness> h_;
  std::unique_ptr<cache::PrefixTree> tree_;
  std::unique_ptr<KvEventPublisher> publisher_;
  std::unique_ptr<KvEventSource> source_;
  std::unique_ptr<ForeignReader> reader_;
  std::mt19937 random_{7};
};

TEST_P(PrefixTreeEvents, ForeignIndexEqualsTheTree) {
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 60; ++i) {
      serve();
      if (HasFatalFailure()) return;
    }
    for (int i = 0; round == 0 && i < 200 && !reader_->has_line(50); ++i) serve();
    if (round == 0) must(joined());
    if (round == 2) must(tree_->clear());
    must(tree_->check_invariants());
    testing::wait_until_sent(*publisher_);

    const nlohmann::json index =
        reader_->index_after(static_cast<uint64_t>(publisher_->stats().batches_published - 1));
    ASSERT_TRUE(index.is_object()) << index;
    EXPECT_EQ(index["errors"], nlohmann::json::array());
    EXPECT_EQ(index["blocks"].get<std::vector<std::string>>(), listing());
    EXPECT_EQ(index["blocks"].empty(), round == 2);
    EXPECT_EQ(source_->blocks(), static_cast<int64_t>(index["blocks"].size()));
    EXPECT_GT(index["counts"]["removed"], 0);  // it does overflow
  }
}

INSTANTIATE_TEST_SUITE_P(
    Models, PrefixTreeEvents,
    ::testing::Values(Scenario{"Full", {0}}, Scenario{"FullAsArrays", {0}, KvEventEncoding::kArray},
                      Scenario{"FullThenWindow", {0, 40}}, Scenario{"WindowThenFull", {40, 0, 40}},
                      Scenario{"WindowThenFullAsArrays", {40, 0}, KvEventEncoding::kArray}),
    [](const auto& parameter) { return parameter.param.name; });

}  // namespace
}  // namespace kvant::serve
