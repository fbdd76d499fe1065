#include "kvant/serve/tiers/redis_store.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "kvant/serve/tiers/testing/redis_servers.h"
#include "kvant/serve/tiers/testing/test_pages.h"
#include "kvant/serve/tiers/tier.h"

namespace kvant::serve {
namespace {

using testing::RedisServers;
using testing::test_name;
using testing::test_object;

TEST(RedisUrl, SaysWhereAndAsWhom) {
  const auto url = parse_redis_url("redis://joe:se:cret@10.0.0.1:7000,cache.local,[::1]:7002/3");
  ASSERT_TRUE(url.has_value()) << url.error().message();
  EXPECT_EQ(url->nodes,
            (std::vector<RedisAddress>{{"10.0.0.1", 7000}, {"cache.local", 6379}, {"::1", 7002}}));
  EXPECT_EQ(url->user, "joe");
  EXPECT_EQ(url->password, "se:cret");
  EXPECT_EQ(url->database, 3);
  EXPECT_EQ(parse_redis_url("redis://:pw@h")->password, "pw");
  for (const char* bad :
       {"", "http://x", "redis://", "redis://:1", "redis://h:99999", "redis://h:x", "redis://h/x",
        "redis://pw@h", "redis://[::1", "redis://h,"})
    EXPECT_EQ(parse_redis_url(bad).error().code(), ErrorCode::kInvalidArgument) << bad;
}

TEST(RedisSlot, IsThatOfTheClusterSpecification) {
  // The check value of CRC16-XMODEM is 0x31c3.
  EXPECT_EQ(redis_slot("123456789"), 0x31c3 % 16384);
  EXPECT_EQ(redis_slot("foo"), 12182);
  EXPECT_EQ(redis_slot("{user1000}.following"), redis_slot("{user1000}.followers"));
  EXPECT_NE(redis_slot("foo{}{bar}"), redis_slot("bar")) << "an empty tag is none";
  EXPECT_EQ(redis_slot("foo{{bar}}zap"), redis_slot("{bar"));
  EXPECT_EQ(redis_slot(""), 0);
}

RedisOptions quick() {
  return {.connect_timeout_ms = 200,
          .command_timeout_ms = 500,
          .breaker_first_ms = 100,
          .breaker_most_ms = 400};
}

std::unique_ptr<RedisStore> store_of(const RedisServers& servers) {
  auto store = RedisStore::create(servers.url(), 3600, quick());
  EXPECT_TRUE(store.has_value());
  return std::move(*store);
}

bool holds(PageStore& store, uint32_t number) {
  const auto object = store.get(test_name(number));
  return object.has_value() && **object == *test_object(number);
}

// The names of redis-cli's and of ours must be the same text.
std::string shell_key(uint32_t number) {
  std::string quoted("'");
  quoted += RedisStore::redis_key(test_name(number));
  quoted += "'";
  return quoted;
}

#define SKIP_WITHOUT_REDIS(servers_installed) \
  if (!(servers_installed)) GTEST_SKIP() << "redis-server is not installed"

TEST(RedisStore, OneServerHoldsPagesForAWhile) {
  SKIP_WITHOUT_REDIS(RedisServers::installed());
  const RedisServers servers(1, false);
  ASSERT_EQ(servers.error(), "");
  const auto store = store_of(servers);
  ASSERT_TRUE(store->check().has_value());
  EXPECT_FALSE(store->contains(test_name(1)));
  EXPECT_EQ(store->get(test_name(1)).error().code(), ErrorCode::kNotFound);
  EXPECT_EQ(*store->put(test_name(1), test_object(1)), PageStore::Put::kStored);
  EXPECT_EQ(*store->put(test_name(1), test_object(1)), PageStore::Put::kAlreadyThere);
  EXPECT_TRUE(holds(*store, 1));
  EXPECT_GT(std::stoi(servers.cli(0, "PTTL " + shell_key(1))), 3000000);
  const std::vector<PageName> names = {test_name(0), test_name(1), test_name(2)};
  using Held = PageStore::Held;
  EXPECT_EQ(store->contains_many(names), (std::vector<Held>{Held::kNo, Held::kYes, Held::kNo}));
  store->remove(test_name(1));
  EXPECT_FALSE(store->contains(test_name(1)));
  // A server that has no memory left refuses.
  servers.cli(0, "CONFIG SET maxmemory 1");
  const auto refused = store->put(test_name(2), test_object(2));
  ASSERT_FALSE(refused.has_value());
  EXPECT_EQ(refused.error().code(), ErrorCode::kResourceExhausted);
}

TEST(RedisStore, APasswordIsUsed) {
  SKIP_WITHOUT_REDIS(RedisServers::installed());
  const RedisServers servers(1, false);
  ASSERT_EQ(servers.error(), "");
  servers.cli(0, "CONFIG SET requirepass secret");
  auto without = RedisStore::create(servers.url(), 60, quick());
  EXPECT_FALSE((*without)->put(test_name(1), test_object(1)).has_value());
  const std::string port = std::to_string(servers.port(0));
  auto wrong = RedisStore::create("redis://:wrong@127.0.0.1:" + port, 60, quick());
  EXPECT_NE((*wrong)->check().error().message().find("AUTH"), std::string::npos);
  auto with = RedisStore::create("redis://:secret@127.0.0.1:" + port + "/2", 60, quick());
  EXPECT_TRUE((*with)->put(test_name(1), test_object(1)).has_value());
  EXPECT_TRUE(holds(**with, 1));
}

TEST(RedisStore, DamagedAndSwappedValuesAreMissesAndGo) {
  SKIP_WITHOUT_REDIS(RedisServers::installed());
  const RedisServers servers(1, false);
  ASSERT_EQ(servers.error(), "");
  Tier tier(store_of(servers), {});
  for (uint32_t i = 0; i < 4; ++i) ASSERT_TRUE(tier.put(test_name(i), test_object(i)));
  tier.wait_idle();
  servers.cli(0, "SETRANGE " + shell_key(0) + " 1500 xx");
  servers.cli(0, "SET " + shell_key(1) + " rubbish");
  servers.cli(0, "COPY " + shell_key(3) + " " + shell_key(2) + " REPLACE");
  for (uint32_t i = 0; i < 4; ++i) tier.get(i, test_name(i));
  tier.wait_idle();
  int hits = 0;
  for (const Tier::Completion& done : tier.poll()) {
    if (done.kind != Tier::Kind::kGet || done.object == nullptr) continue;
    ++hits;
    EXPECT_EQ(done.ticket, 3u);
    EXPECT_EQ(*done.object, *test_object(3));
  }
  EXPECT_EQ(hits, 1);
  EXPECT_EQ(tier.stats().failures, 3);
  EXPECT_EQ(servers.cli(0, "EXISTS " + shell_key(0) + " " + shell_key(1) + " " + shell_key(2)),
            "0");
}

TEST(RedisStore, AServerThatCannotSayWhatItHoldsIsCounted) {
  SKIP_WITHOUT_REDIS(RedisServers::installed());
  RedisServers servers(1, false);
  ASSERT_EQ(servers.error(), "");
  Tier tier(store_of(servers), {});
  ASSERT_TRUE(tier.put(test_name(0), test_object(0)));
  tier.probe(1, {test_name(0), test_name(1)});
  tier.wait_idle();
  EXPECT_EQ(tier.stats().failures, 0);
  servers.kill(0);
  tier.probe(2, {test_name(0), test_name(1)});
  tier.wait_idle();
  EXPECT_EQ(tier.stats().failures, 2);
  std::vector<std::vector<bool>> found;
  for (const Tier::Completion& done : tier.poll()) {
    if (done.kind == Tier::Kind::kProbe) found.push_back(done.found);
  }
  EXPECT_EQ(found, (std::vector<std::vector<bool>>{{true, false}, {false, false}}));
}

TEST(RedisStore, AServerThatIsGoneCostsLittleAndComesBack) {
  SKIP_WITHOUT_REDIS(RedisServers::installed());
  RedisServers servers(1, false);
  ASSERT_EQ(servers.error(), "");
  const auto store = store_of(servers);
  ASSERT_TRUE(store->put(test_name(1), test_object(1)).has_value());
  servers.kill(0);
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 1000; ++i) EXPECT_FALSE(store->get(test_name(1)).has_value());
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  EXPECT_LT(seconds.count(), 1.0);
  EXPECT_GT(store->client_stats().breaker_trips, 0);
  servers.start(0);
  bool back = false;
  for (int i = 0; i < 100 && !back; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    back = store->put(test_name(2), test_object(2)).has_value();
  }
  EXPECT_TRUE(back);
  EXPECT_TRUE(holds(*store, 2));
  EXPECT_FALSE(RedisStore::create("redis://127.0.0.1:1", 60, quick()).value()->check().has_value());
}

class RedisCluster : public ::testing::Test {
 protected:
  void SetUp() override {
    SKIP_WITHOUT_REDIS(RedisServers::installed());
    servers_ = std::make_unique<RedisServers>(3, true);
    ASSERT_EQ(servers_->error(), "");
    store_ = store_of(*servers_);
    for (uint32_t i = 0; i < kPages; ++i)
      ASSERT_TRUE(store_->put(test_name(i), test_object(i)).has_value()) << i;
  }

  // The server that owns a page's slot.
  int owner(uint32_t number) const {
    for (int server = 0; server < 3; ++server) {
      const std::string said = servers_->cli(server, "EXISTS " + shell_key(number));
      if (said == "1") return server;
    }
    return -1;
  }
  std::string node_id(int server) const { return servers_->cli(server, "CLUSTER MYID"); }

  static constexpr uint32_t kPages = 120;
  std::unique_ptr<RedisServers> servers_;
  std::unique_ptr<RedisStore> store_;
};

TEST_F(RedisCluster, PagesLieOnTheNodeOfTheirSlot) {
  std::vector<PageName> names;
  for (uint32_t i = 0; i < kPages; ++i) names.push_back(test_name(i));
  const auto objects = store_->get_many(names);
  for (uint32_t i = 0; i < kPages; ++i) {
    ASSERT_TRUE(objects[i].has_value()) << objects[i].error().message();
    EXPECT_EQ(**objects[i], *test_object(i));
  }
  EXPECT_EQ(store_->client_stats().redirections, 0) << "the slots are known";
  for (int server = 0; server < 3; ++server)
    EXPECT_GT(std::stoi(servers_->cli(server, "DBSIZE")), 10);
  for (const char* key : {"a", "kvant:{12}:0", "foo{}{bar}", "{", "x{y"}) {
    const std::string said = servers_->cli(0, std::string("CLUSTER KEYSLOT '").append(key) + "'");
    EXPECT_EQ(std::to_string(redis_slot(key)), said) << key;
  }
}

TEST_F(RedisCluster, ASlotThatMovesIsFollowed) {
  const int slot = redis_slot(RedisStore::redis_key(test_name(0)));
  const int from = owner(0);
  ASSERT_GE(from, 0);
  const int to = (from + 1) % 3;
  const std::string name = std::to_string(slot);
  const std::string target_port = std::to_string(servers_->port(to));
  // In between: the old owner sends on for what it has not (ASK).
  servers_->cli(to, "CLUSTER SETSLOT " + name + " IMPORTING " + node_id(from));
  servers_->cli(from, "CLUSTER SETSLOT " + name + " MIGRATING " + node_id(to));
  EXPECT_TRUE(holds(*store_, 0)) << "still with the old owner";
  EXPECT_EQ(
      servers_->cli(from, "MIGRATE 127.0.0.1 " + target_port + " " + shell_key(0) + " 0 1000"),
      "OK");
  EXPECT_TRUE(holds(*store_, 0)) << "asked of the new one";
  EXPECT_GT(store_->client_stats().redirections, 0);
  const int64_t asked = store_->client_stats().redirections;
  EXPECT_TRUE(holds(*store_, 0));
  EXPECT_GT(store_->client_stats().redirections, asked) << "ASK says nothing about the next time";
  // Done: the slot has another owner (MOVED).
  for (int server = 0; server < 3; ++server)
    servers_->cli(server, "CLUSTER SETSLOT " + name + " NODE " + node_id(to));
  EXPECT_TRUE(holds(*store_, 0));
  std::this_thread::sleep_for(std::chrono::milliseconds(150));
  for (uint32_t i = 0; i < kPages; ++i) EXPECT_TRUE(holds(*store_, i)) << i;
  const int64_t settled = store_->client_stats().redirections;
  for (uint32_t i = 0; i < kPages; ++i) EXPECT_TRUE(holds(*store_, i)) << i;
  EXPECT_EQ(store_->client_stats().redirections, settled) << "the new owner is remembered";
}

TEST_F(RedisCluster, ASlotThatNobodyServesIsWaitedForOnlyNowAndThen) {
  const std::string name = std::to_string(redis_slot(RedisStore::redis_key(test_name(0))));
  const int lost = owner(0);
  for (int server = 0; server < 3; ++server) servers_->cli(server, "CLUSTER DELSLOTS " + name);
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 500; ++i) EXPECT_FALSE(store_->get(test_name(0)).has_value());
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  EXPECT_LT(seconds.count(), 3.0);
  for (uint32_t i = 1; i < 20; ++i) EXPECT_TRUE(holds(*store_, i)) << i;
  servers_->cli(lost, "CLUSTER ADDSLOTS " + name);
  bool back = false;
  for (int i = 0; i < 100 && !back; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    back = store_->put(test_name(0), test_object(0)).has_value();
  }
  EXPECT_TRUE(back);
}

TEST_F(RedisCluster, ANodeThatDiesTakesOnlyItsPagesWithIt) {
  std::vector<int> owners;
  for (uint32_t i = 0; i < 30; ++i) owners.push_back(owner(i));
  servers_->kill(1);
  const auto begin = std::chrono::steady_clock::now();
  for (int round = 0; round < 10; ++round) {
    for (uint32_t i = 0; i < 30; ++i)
      EXPECT_EQ(holds(*store_, i), owners[i] != 1) << "page " << i << " of server " << owners[i];
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  EXPECT_LT(seconds.count(), 3.0);
}

TEST_F(RedisCluster, LoadGoesOnWhileSlotsMoveAndANodeDies) {
  Tier tier(std::move(store_), {});
  std::atomic<bool> stop = false;
  std::thread trouble([&] {
    // Ten slots wander, then a node goes and comes back empty.
    for (uint32_t i = 0; i < 10; ++i) {
      const std::string name = std::to_string(redis_slot(RedisStore::redis_key(test_name(i))));
      const int to = static_cast<int>(i % 3);
      for (int server = 0; server < 3; ++server)
        servers_->cli(server, "CLUSTER SETSLOT " + name + " NODE " + node_id(to));
    }
    servers_->kill(2);
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
    servers_->start(2);
    std::this_thread::sleep_for(std::chrono::milliseconds(1500));
    stop = true;
  });
  int64_t asked = 0, answered = 0, hits = 0;
  while (!stop) {
    for (uint32_t i = 0; i < kPages; i += 7) tier.get(i, test_name(i)), ++asked;
    tier.put(test_name(static_cast<uint32_t>(1000 + asked)), test_object(1));
    tier.wait_idle();
    for (const Tier::Completion& done : tier.poll()) {
      if (done.kind != Tier::Kind::kGet) continue;
      ++answered;
      if (done.object == nullptr) continue;
      ++hits;
      EXPECT_EQ(*done.object, *test_object(static_cast<uint32_t>(done.ticket)));
    }
  }
  trouble.join();
  EXPECT_EQ(asked, answered) << "every request is answered, if by a miss";
  EXPECT_GT(hits, asked / 10);
  const TierStats stats = tier.stats();
  EXPECT_LE(stats.hits + stats.misses, stats.gets);
  EXPECT_GE(stats.hits + stats.misses + stats.failures, stats.gets);
  EXPECT_GT(stats.failures, 0);
}

}  // namespace
}  // namespace kvant::serve
