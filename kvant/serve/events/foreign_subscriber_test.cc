// The pitfalls of the protocol, with a subscriber of another language and library: what it rebuilds
// from events alone equals what the cache holds.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "kvant/serve/events/kv_event_source.h"
#include "kvant/serve/events/testing/foreign_reader.h"
#include "kvant/serve/events/testing/subscriber.h"

namespace kvant::serve {
namespace {

using testing::ForeignReader;

constexpr int kBlock = 16;

// A cache that is only what events speak of: blocks with tokens at media, in trees by salt.
class FakeCache {
 public:
  FakeCache(KvEventSource& source, int group, int window, unsigned seed)
      : source_(source), group_(group), window_(window), random_(seed) {}

  void random_step() {
    const int actions = pick(6);
    for (int i = 0; i < actions; ++i) random_action();
    source_.end_step();
  }
  void clear() {
    nodes_.clear();
    for (int m = kNumKvMedia; m-- > 0;) source_.cleared(static_cast<KvMedium>(m));
  }
  // As foreign_index.py lists its blocks.
  std::vector<std::string> listing() const {
    std::vector<std::string> lines;
    for (const auto& [hash, node] : nodes_) {
      for (const KvMedium medium : node.media) {
        lines.push_back(std::string(kv_medium_name(medium)) + " " + node.salt + " " + node.path);
        if (group_ > 0) lines.back() += " #" + std::to_string(group_);
      }
    }
    std::sort(lines.begin(), lines.end());
    return lines;
  }

 private:
  struct Node {
    uint64_t parent = 0;
    std::string salt, path;
    std::set<KvMedium> media;
    int children = 0;
  };

  int pick(int below) { return static_cast<int>(random_() % static_cast<unsigned>(below)); }

  uint64_t any_node() {
    if (nodes_.empty()) return 0;
    auto at = nodes_.begin();
    std::advance(at, pick(static_cast<int>(nodes_.size())));
    return at->first;
  }

  void random_action() {
    const int what = pick(100);
    if (what < 55) {
      add_run();
    } else if (what < 65) {
      copy_down();
    } else if (what < 99) {
      remove_leaf();
    } else if (pick(10) == 0) {
      clear();
    }
  }

  void add_run() {
    uint64_t parent = pick(3) == 0 ? 0 : any_node();
    const std::string salt = parent != 0    ? nodes_[parent].salt
                             : pick(2) == 0 ? ""
                                            : "tenant" + std::to_string(pick(3));
    for (int length = 1 + pick(6); length > 0; --length) {
      const uint64_t hash = ++last_hash_;  // small numbers: the first pitfall
      std::vector<uint32_t> tokens(kBlock);
      for (uint32_t& token : tokens) token = static_cast<uint32_t>(pick(150'000));
      Node node{.parent = parent, .salt = salt, .path = "", .media = {}, .children = 0};
      if (parent != 0) {
        node.path = nodes_[parent].path + " ";
        ++nodes_[parent].children;
      }
      for (int i = 0; i < kBlock; ++i) {
        if (i > 0) node.path += ' ';
        node.path += std::to_string(tokens[static_cast<size_t>(i)]);
      }
      node.media.insert(KvMedium::kDevice);
      nodes_[hash] = node;
      const std::optional<uint64_t> told = parent == 0 ? std::nullopt : std::optional(parent);
      source_.stored(hash, told, tokens, at(KvMedium::kDevice), salt);
      tokens_[hash] = tokens;
      parent = hash;
    }
  }

  void copy_down() {
    const uint64_t hash = any_node();
    if (hash == 0) return;
    const auto medium = static_cast<KvMedium>(1 + pick(2));
    if (!nodes_[hash].media.insert(medium).second) return;
    const uint64_t parent = nodes_[hash].parent;
    source_.stored(hash, parent == 0 ? std::nullopt : std::optional(parent), tokens_[hash],
                   at(medium), nodes_[hash].salt);
  }

  void remove_leaf() {
    const uint64_t hash = any_node();
    if (hash == 0 || nodes_[hash].children > 0) return;
    const KvMedium medium = *nodes_[hash].media.begin();
    nodes_[hash].media.erase(medium);
    source_.removed(hash, at(medium));
    if (!nodes_[hash].media.empty()) return;
    if (nodes_[hash].parent != 0) --nodes_[nodes_[hash].parent].children;
    nodes_.erase(hash);
  }

  KvEventSource::Place at(KvMedium medium) const { return {medium, group_, window_}; }

  KvEventSource& source_;
  int group_, window_;
  std::mt19937 random_;
  std::map<uint64_t, Node> nodes_;
  std::map<uint64_t, std::vector<uint32_t>> tokens_;
  uint64_t last_hash_ = 0;
};

KvEventsConfig local_config(KvEventEncoding encoding) {
  KvEventsConfig config;
  config.enable_kv_cache_events = true;
  config.endpoint = "tcp://127.0.0.1:*";
  config.replay_endpoint = "tcp://127.0.0.1:*";
  config.topic = "kv@127.0.0.1:8000@model";
  config.encoding = encoding;
  return config;
}

class ForeignSubscriber : public ::testing::TestWithParam<KvEventEncoding> {
 protected:
  void SetUp() override {
    if (!ForeignReader::available()) GTEST_SKIP() << "needs python3-zmq and python3-msgpack";
    config_ = local_config(GetParam());
  }
  void start(int rank = 0, int num_groups = 1, int window = 0) {
    Result<std::unique_ptr<KvEventPublisher>> made = KvEventPublisher::create(config_, rank);
    ASSERT_TRUE(made) << made.error().message();
    publisher_ = std::move(*made);
    source_ = std::make_unique<KvEventSource>(*publisher_, kBlock, num_groups);
    cache_ = std::make_unique<FakeCache>(*source_, num_groups - 1, window, 1234);
  }
  void subscribe() {
    reader_ = std::make_unique<ForeignReader>(publisher_->endpoint(), publisher_->replay_endpoint(),
                                              "kv@");
    wait_until_it_reads();
  }
  void wait_until_it_reads() {
    for (int i = 0; i < 200 && !reader_->has_line(50); ++i) cache_->random_step();
    ASSERT_EQ(reader_->line(), "ready");
  }
  nlohmann::json index() {
    testing::wait_until_sent(*publisher_);
    return reader_->index_after(static_cast<uint64_t>(publisher_->stats().batches_published - 1));
  }
  void expect_equal(const nlohmann::json& index) {
    ASSERT_TRUE(index.is_object()) << index;
    EXPECT_EQ(index["errors"], nlohmann::json::array());
    EXPECT_EQ(index["blocks"].get<std::vector<std::string>>(), cache_->listing());
    EXPECT_GT(index["counts"]["stored"], 0);
    EXPECT_EQ(index["counts"][GetParam() == KvEventEncoding::kMap ? "arrays" : "maps"], 0);
  }

  KvEventsConfig config_;
  std::unique_ptr<KvEventPublisher> publisher_;
  std::unique_ptr<KvEventSource> source_;
  std::unique_ptr<FakeCache> cache_;
  std::unique_ptr<ForeignReader> reader_;
};

// It joins after the first batches, as routers do: it must notice, ask for them and know all.
TEST_P(ForeignSubscriber, JoinsLateAndKnowsEverything) {
  start();
  for (int i = 0; i < 200; ++i) cache_->random_step();
  subscribe();
  for (int i = 0; i < 2000; ++i) cache_->random_step();
  const nlohmann::json found = index();
  expect_equal(found);
  EXPECT_GE(found["counts"]["gaps"], 1);
  EXPECT_GE(found["counts"]["replayed"], 100);
  EXPECT_EQ(found["counts"].value("lost", 0), 0);
  EXPECT_EQ(found["ranks"], nlohmann::json::array({"0"}));
  EXPECT_GT(cache_->listing().size(), 100u);
}

TEST_P(ForeignSubscriber, KnowsRanksAndGroups) {
  config_.endpoint = "inproc://replaced";
  config_ = local_config(GetParam());
  // Ports of rank 1 are counted from a number, so '*' cannot be used.
  const Result<std::unique_ptr<KvEventPublisher>> probe = KvEventPublisher::create(config_);
  ASSERT_TRUE(probe);
  config_.endpoint = (*probe)->endpoint();
  config_.replay_endpoint = (*probe)->replay_endpoint();
  const auto with_star = [](const std::string& endpoint) {
    return "tcp://*:" + std::to_string(std::stoi(endpoint.substr(endpoint.rfind(':') + 1)) + 7);
  };
  config_.endpoint = with_star(config_.endpoint);
  config_.replay_endpoint = with_star(config_.replay_endpoint);
  start(1, 2, 512);
  if (HasFatalFailure()) return;
  const auto local = [](const std::string& endpoint) {
    return "tcp://127.0.0.1" + endpoint.substr(endpoint.rfind(':'));
  };
  reader_ = std::make_unique<ForeignReader>(local(publisher_->endpoint()),
                                            local(publisher_->replay_endpoint()), "kv@");
  wait_until_it_reads();
  const nlohmann::json found = index();
  expect_equal(found);
  EXPECT_EQ(found["ranks"], nlohmann::json::array({"1"}));
  EXPECT_NE(found["groups"].dump().find("(1, 'sliding_window')"), std::string::npos)
      << found["groups"];
}

// The worker begins anew: numbers start over, and what was known is not any more.
TEST_P(ForeignSubscriber, NoticesARestart) {
  start();
  subscribe();
  for (int i = 0; i < 300; ++i) cache_->random_step();
  expect_equal(index());
  source_.reset();
  publisher_.reset();
  start();
  reader_->command("endpoint " + publisher_->endpoint() + " " + publisher_->replay_endpoint());
  ASSERT_EQ(reader_->line(), "connected");
  wait_until_it_reads();
  for (int i = 0; i < 20; ++i) cache_->random_step();
  const nlohmann::json found = index();
  expect_equal(found);
  EXPECT_EQ(found["counts"]["restarts"], 1);
}

// History that is not kept any more cannot be replayed: the reader sees that, and is right again
// after the cache is told as a whole.
TEST_P(ForeignSubscriber, SeesWhatReplayCannotGive) {
  config_.buffer_steps = 10;
  start();
  for (int i = 0; i < 200; ++i) cache_->random_step();
  subscribe();
  cache_->clear();
  for (int i = 0; i < 200; ++i) cache_->random_step();
  const nlohmann::json found = index();
  EXPECT_GT(found["counts"].value("lost", 0), 0);
  EXPECT_EQ(found["blocks"].get<std::vector<std::string>>(), cache_->listing());
}

// The engine outruns the publisher: batches are lost, their numbers are missing, and the source
// repairs what subscribers know.
TEST_P(ForeignSubscriber, IsRepairedAfterAnOverflow) {
  config_.max_queue_size = 1;
  config_.hwm = 10'000'000;
  start();
  subscribe();
  for (int i = 0; i < 200'000 && publisher_->stats().batches_dropped == 0; ++i) {
    cache_->random_step();
  }
  ASSERT_GT(publisher_->stats().batches_dropped, 0);
  for (int i = 0; i < 50; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    cache_->random_step();
  }
  testing::wait_until_sent(*publisher_);
  source_->end_step();
  testing::wait_until_sent(*publisher_);
  const KvEventStats stats = publisher_->stats();
  const nlohmann::json found = reader_->index_after(
      static_cast<uint64_t>(stats.batches_published + stats.batches_dropped - 1));
  ASSERT_TRUE(found.is_object()) << found;
  EXPECT_EQ(found["counts"].value("lost", 0), stats.batches_dropped);
  EXPECT_EQ(found["blocks"].get<std::vector<std::string>>(), cache_->listing());
}

INSTANTIATE_TEST_SUITE_P(Encodings, ForeignSubscriber,
                         ::testing::Values(KvEventEncoding::kMap, KvEventEncoding::kArray),
                         [](const auto& parameter) {
                           return parameter.param == KvEventEncoding::kMap ? "Map" : "Array";
                         });

}  // namespace
}  // namespace kvant::serve
