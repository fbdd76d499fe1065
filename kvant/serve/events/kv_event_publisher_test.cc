#include "kvant/serve/events/kv_event_publisher.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "kvant/serve/events/testing/subscriber.h"

namespace kvant::serve {
namespace {

using testing::DecodedBatch;
using testing::eight_bytes;
using testing::replayed_numbers;
using testing::Subscriber;
using testing::wait_until_counted;
using testing::wait_until_sent;

KvEventsConfig local_config() {
  KvEventsConfig config;
  config.enable_kv_cache_events = true;
  config.endpoint = "tcp://127.0.0.1:*";
  config.replay_endpoint = "tcp://127.0.0.1:*";
  config.topic = "kv@127.0.0.1:8000@model";
  return config;
}

std::unique_ptr<KvEventPublisher> make(const KvEventsConfig& config, int rank = 0) {
  Result<std::unique_ptr<KvEventPublisher>> made = KvEventPublisher::create(config, rank);
  if (!made) {
    ADD_FAILURE() << made.error().message();
    return nullptr;
  }
  return std::move(*made);
}

std::vector<KvEvent> removal(uint64_t hash) {
  return {BlockRemoved{.block_hashes = {hash}, .medium = KvMedium::kDevice, .group = {}}};
}

TEST(KvEventPublisher, NumbersBatchesWithoutGaps) {
  const auto publisher = make(local_config());
  Subscriber subscriber(publisher->endpoint());
  subscriber.wait_until_joined(*publisher);
  const uint64_t first = subscriber.last_number() + 1;
  for (uint64_t i = 0; i < 100; ++i) EXPECT_TRUE(publisher->publish(removal(i + 1)));
  EXPECT_TRUE(publisher->publish({}));  // nothing to tell takes no number
  for (uint64_t i = 0; i < 100; ++i) {
    const DecodedBatch batch = subscriber.next();
    EXPECT_EQ(batch.number, first + i);
    EXPECT_EQ(batch.topic, "kv@127.0.0.1:8000@model");
    EXPECT_EQ(batch.rank, 0);
    EXPECT_EQ(batch.events.at(0).hashes.at(0), i + 1);
  }
  EXPECT_FALSE(subscriber.has_next(50));
  EXPECT_EQ(publisher->stats().subscriptions, 1);
}

TEST(KvEventPublisher, StartsWithClearedAndReplaysFromThere) {
  const auto publisher = make(local_config());
  for (int i = 0; i < 20; ++i) publisher->publish(removal(1));
  wait_until_sent(*publisher);
  EXPECT_EQ(publisher->stats().batches_published, 21);
  bool ended = false;
  const std::vector<uint64_t> all =
      replayed_numbers(publisher->replay_endpoint(), eight_bytes(0), ended);
  EXPECT_TRUE(ended);
  ASSERT_EQ(all.size(), 21u);
  EXPECT_EQ(all.front(), 0u);
  EXPECT_EQ(all.back(), 20u);
  EXPECT_EQ(replayed_numbers(publisher->replay_endpoint(), eight_bytes(18), ended).size(), 3u);
  EXPECT_TRUE(replayed_numbers(publisher->replay_endpoint(), eight_bytes(21), ended).empty());
  EXPECT_TRUE(ended);
  wait_until_counted(*publisher, &KvEventStats::replays, 3);
}

TEST(KvEventPublisher, KeepsBufferStepsBatches) {
  KvEventsConfig config = local_config();
  config.buffer_steps = 5;
  const auto publisher = make(config);
  for (int i = 0; i < 20; ++i) publisher->publish(removal(1));
  wait_until_sent(*publisher);
  EXPECT_EQ(publisher->stats().batches_published, 21);
  bool ended = false;
  const std::vector<uint64_t> kept =
      replayed_numbers(publisher->replay_endpoint(), eight_bytes(0), ended);
  EXPECT_TRUE(ended);
  EXPECT_EQ(kept, (std::vector<uint64_t>{16, 17, 18, 19, 20}));  // the client sees the hole itself
}

TEST(KvEventPublisher, RefusesMalformedReplays) {
  const auto publisher = make(local_config());
  bool ended = true;
  EXPECT_TRUE(replayed_numbers(publisher->replay_endpoint(), "12345", ended).empty());
  EXPECT_FALSE(ended);
  wait_until_counted(*publisher, &KvEventStats::replays_refused, 1);
  replayed_numbers(publisher->replay_endpoint(), eight_bytes(0), ended);  // and goes on
  EXPECT_TRUE(ended);
}

TEST(KvEventPublisher, CountsBatchesThatTheQueueCannotHold) {
  KvEventsConfig config = local_config();
  config.max_queue_size = 1;
  const auto publisher = make(config);
  Subscriber subscriber(publisher->endpoint());
  subscriber.wait_until_joined(*publisher);
  const int64_t dropped_before = publisher->stats().batches_dropped;
  std::vector<KvEvent> large;
  for (int i = 0; i < 20'000; ++i) large.push_back(removal(1).front());
  int64_t lost = 0;
  for (int i = 0; i < 1000 && lost == 0; ++i) {
    lost += !publisher->publish(large);  // the thread is busy with it
    for (int j = 0; j < 3; ++j) lost += !publisher->publish(removal(1));
  }
  EXPECT_GT(lost, 0);
  EXPECT_EQ(publisher->stats().batches_dropped, dropped_before + lost);
  wait_until_sent(*publisher);
  EXPECT_TRUE(publisher->publish(removal(2)));
  bool gap = false;  // the lost number never comes, so that the subscriber notices
  for (uint64_t expected = subscriber.last_number() + 1;; ++expected) {
    const DecodedBatch batch = subscriber.next();
    gap |= batch.number != expected;
    expected = batch.number;
    if (batch.events.at(0).hashes == std::vector<uint64_t>{2}) break;
  }
  EXPECT_TRUE(gap);
}

// A subscriber that stops reading loses messages, is counted, and holds up nobody.
TEST(KvEventPublisher, CountsWhatSlowSubscribersMiss) {
  KvEventsConfig config = local_config();
  config.hwm = 1;
  config.replay_endpoint.clear();
  const auto publisher = make(config);
  Subscriber slow(publisher->endpoint(), false, 1);
  slow.wait_until_joined(*publisher);
  BlockStored large{.block_hashes = {1},
                    .parent_block_hash = {},
                    .token_ids = std::vector<uint32_t>(100'000, 70'000),
                    .block_size = 100'000,
                    .medium = KvMedium::kDevice,
                    .group = {},
                    .cache_salt = ""};
  int sent = 0;
  for (; sent < 1000 && publisher->stats().batches_missed == 0; ++sent) {
    publisher->publish({large});
    wait_until_sent(*publisher);
  }
  EXPECT_GT(publisher->stats().batches_missed, 0);
  EXPECT_GT(publisher->stats().batches_published, sent - 2);
}

TEST(KvEventPublisher, ConnectsWhereTheSubscriberBinds) {
  Subscriber subscriber("tcp://127.0.0.1:*", true);
  KvEventsConfig config = local_config();
  config.endpoint = subscriber.endpoint();  // an address without '*'
  const auto publisher = make(config);
  subscriber.wait_until_joined(*publisher);
  publisher->publish(removal(77));
  EXPECT_EQ(subscriber.next().events.at(0).hashes.at(0), 77u);
}

TEST(KvEventPublisher, EveryRankHasItsOwnPortAndNumber) {
  KvEventsConfig config = local_config();
  config.replay_endpoint.clear();
  // A free port is easily found, one with a free neighbour by trying.
  std::unique_ptr<KvEventPublisher> publisher;
  int port = 0;
  for (int attempt = 0; attempt < 50 && publisher == nullptr; ++attempt) {
    config.endpoint = "tcp://127.0.0.1:*";
    const std::string probed = make(config)->endpoint();
    port = std::stoi(probed.substr(probed.rfind(':') + 1));
    config.endpoint = "tcp://*:" + std::to_string(port);
    auto made = KvEventPublisher::create(config, 1);
    if (made) publisher = std::move(*made);
  }
  ASSERT_NE(publisher, nullptr);
  const std::string neighbour = ":" + std::to_string(port + 1);
  EXPECT_TRUE(publisher->endpoint().ends_with(neighbour));
  Subscriber subscriber("tcp://127.0.0.1" + neighbour);
  subscriber.wait_until_joined(*publisher);
  publisher->publish(removal(1));
  EXPECT_EQ(subscriber.next().rank, 1);
}

TEST(KvEventPublisher, AnEndpointInUseIsAnError) {
  const auto publisher = make(local_config());
  KvEventsConfig config = local_config();
  config.replay_endpoint = publisher->endpoint();
  const Result<std::unique_ptr<KvEventPublisher>> second = KvEventPublisher::create(config);
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code(), ErrorCode::kIoError);
  EXPECT_NE(second.error().message().find(publisher->endpoint()), std::string::npos);
}

TEST(KvEventPublisher, SendsWhatIsQueuedBeforeItCloses) {
  auto publisher = make(local_config());
  Subscriber subscriber(publisher->endpoint());
  subscriber.wait_until_joined(*publisher);
  for (int i = 0; i < 50; ++i) publisher->publish(removal(i + 1));
  wait_until_sent(*publisher);
  for (int i = 0; i < 50; ++i) subscriber.next();
  publisher.reset();
}

}  // namespace
}  // namespace kvant::serve
