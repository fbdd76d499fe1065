// What the source tells, read from an in-process subscriber: runs, order, repeats, losses.
#include "kvant/serve/events/kv_event_source.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "kvant/serve/events/testing/subscriber.h"

namespace kvant::serve {
namespace {

using testing::DecodedEvent;
using testing::Subscriber;

constexpr int kBlock = 4;

std::vector<uint32_t> tokens_of(uint64_t hash) {
  return std::vector<uint32_t>(kBlock, static_cast<uint32_t>(hash));
}

class KvEventSourceTest : public ::testing::Test {
 protected:
  void start(int64_t max_queue_size = 1000) {
    KvEventsConfig config;
    config.enable_kv_cache_events = true;
    config.endpoint = "tcp://127.0.0.1:*";
    config.max_queue_size = max_queue_size;
    Result<std::unique_ptr<KvEventPublisher>> made = KvEventPublisher::create(config);
    ASSERT_TRUE(made) << made.error().message();
    publisher_ = std::move(*made);
    source_ = std::make_unique<KvEventSource>(*publisher_, kBlock);
    subscriber_ = std::make_unique<Subscriber>(publisher_->endpoint());
    subscriber_->wait_until_joined(*publisher_);
  }
  void store(uint64_t hash, std::optional<uint64_t> parent, KvMedium medium = KvMedium::kDevice) {
    source_->stored(hash, parent, tokens_of(hash), {.medium = medium}, "");
  }
  std::vector<DecodedEvent> next() { return subscriber_->next().events; }

  std::unique_ptr<KvEventPublisher> publisher_;
  std::unique_ptr<KvEventSource> source_;
  std::unique_ptr<Subscriber> subscriber_;
};

TEST_F(KvEventSourceTest, ConsecutiveBlocksAreOneEvent) {
  start();
  store(1, {});
  store(2, 1);
  store(3, 2);
  store(4, 2);  // a sibling of 3
  source_->end_step();
  const std::vector<DecodedEvent> events = next();
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[0].hashes, (std::vector<uint64_t>{1, 2, 3}));
  EXPECT_FALSE(events[0].parent);
  EXPECT_EQ(events[0].tokens.size(), 3u * kBlock);
  EXPECT_EQ(events[1].hashes, (std::vector<uint64_t>{4}));
  EXPECT_EQ(events[1].parent, 2u);
}

TEST_F(KvEventSourceTest, NothingIsToldTwice) {
  start();
  store(1, {});
  store(1, {});
  store(1, {}, KvMedium::kHost);
  source_->end_step();
  source_->end_step();  // no news: no message
  source_->removed(1, {});
  source_->removed(1, {});
  source_->removed(9, {});
  source_->end_step();
  const std::vector<DecodedEvent> stored = next();
  ASSERT_EQ(stored.size(), 2u);
  EXPECT_EQ(stored[0].medium, "GPU");
  EXPECT_EQ(stored[1].medium, "CPU");
  const std::vector<DecodedEvent> removed = next();
  ASSERT_EQ(removed.size(), 1u);
  EXPECT_EQ(removed[0].hashes, (std::vector<uint64_t>{1}));
  EXPECT_EQ(source_->blocks(), 1);  // on the host still
}

TEST_F(KvEventSourceTest, ClearedIsToldAtOnce) {
  start();
  store(1, {});
  source_->cleared(KvMedium::kDevice);
  const std::vector<DecodedEvent> events = next();
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0].type, "AllBlocksCleared");
  EXPECT_EQ(source_->blocks(), 0);
}

// AllBlocksCleared would make routers forget what the host still holds.
TEST_F(KvEventSourceTest, ClearingOneMediumKeepsTheOthers) {
  start();
  store(1, {});
  store(1, {}, KvMedium::kHost);
  source_->end_step();
  next();
  source_->cleared(KvMedium::kDevice);
  const std::vector<DecodedEvent> events = next();
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0].type, "BlockRemoved");
  EXPECT_EQ(events[0].medium, "GPU");
  EXPECT_EQ(source_->blocks(), 1);
}

// A queue of one batch overflows; afterwards subscribers are told everything again, parents first.
TEST_F(KvEventSourceTest, AfterALossEverythingIsToldAgain) {
  start(1);
  const int64_t dropped_before = publisher_->stats().batches_dropped;  // of probes
  uint64_t hash = 0;
  while (publisher_->stats().batches_dropped == dropped_before) {
    for (int blocks : {5000, 1, 1, 1}) {  // the publisher is busy with the first
      for (; blocks > 0; --blocks) {
        ++hash;
        store(hash, hash == 1 ? std::nullopt : std::optional(hash - 1));
      }
      source_->end_step();
    }
    ASSERT_LT(hash, 1'000'000u);
  }
  testing::wait_until_sent(*publisher_);
  source_->end_step();  // the repair
  std::vector<uint64_t> known;
  bool gap = false;
  for (uint64_t expected = subscriber_->last_number() + 1; subscriber_->has_next(300); ++expected) {
    const testing::DecodedBatch batch = subscriber_->next();
    gap |= batch.number != expected;
    expected = batch.number;
    for (const DecodedEvent& event : batch.events) {
      if (event.type == "AllBlocksCleared") known.clear();
      for (const uint64_t one : event.hashes) {
        EXPECT_EQ(known.empty() ? 0 : known.back(), one - 1);
        known.push_back(one);
      }
    }
  }
  EXPECT_TRUE(gap);
  EXPECT_EQ(known.size(), hash);
}

TEST(KvBlockHash, IsTheEndOfTheKeyAndNeverZero) {
  cache::PageKey key = {};
  EXPECT_EQ(kv_block_hash(key), 1u);
  key[31] = 0x34;
  key[30] = 0x12;
  key[0] = 0xFF;
  EXPECT_EQ(kv_block_hash(key), 0x1234u);
}

}  // namespace
}  // namespace kvant::serve
