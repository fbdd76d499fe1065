#include "kvant/serve/events/kv_events_config.h"

#include <gtest/gtest.h>

#include <string>

namespace kvant::serve {
namespace {

TEST(KvEventsConfig, ReadsVllmsNames) {
  const Result<KvEventsConfig> config = parse_kv_events_config(
      R"({"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:6000",
          "replay_endpoint": "tcp://*:6001", "buffer_steps": 5, "hwm": 7, "max_queue_size": 9,
          "topic": "t", "encoding": "array"})");
  ASSERT_TRUE(config) << config.error().message();
  EXPECT_TRUE(config->publishes());
  EXPECT_EQ(config->endpoint, "tcp://*:6000");
  EXPECT_EQ(config->replay_endpoint, "tcp://*:6001");
  EXPECT_EQ(config->buffer_steps, 5);
  EXPECT_EQ(config->hwm, 7);
  EXPECT_EQ(config->max_queue_size, 9);
  EXPECT_EQ(config->topic, "t");
  EXPECT_EQ(config->encoding, KvEventEncoding::kArray);
}

TEST(KvEventsConfig, DefaultsAreVllms) {
  const Result<KvEventsConfig> config = parse_kv_events_config("{}");
  ASSERT_TRUE(config);
  EXPECT_FALSE(config->publishes());
  EXPECT_EQ(config->endpoint, "tcp://*:5557");
  EXPECT_EQ(config->replay_endpoint, "");
  EXPECT_EQ(config->buffer_steps, 10000);
  EXPECT_EQ(config->hwm, 100000);
  EXPECT_EQ(config->max_queue_size, 100000);
}

TEST(KvEventsConfig, ShortFormIsAnEndpoint) {
  const Result<KvEventsConfig> config = kv_events_config_for("tcp://*:5557");
  ASSERT_TRUE(config);
  EXPECT_TRUE(config->publishes());
  EXPECT_FALSE(kv_events_config_for("5557"));
  EXPECT_FALSE(kv_events_config_for("tcp://"));
}

TEST(KvEventsConfig, ErrorsNameTheKey) {
  const struct {
    const char* json;
    const char* word;
  } cases[] = {
      {"[]", "JSON object"},
      {"{", "JSON object"},
      {R"({"end_point": "tcp://*:1"})", "end_point"},
      {R"({"hwm": 0})", "hwm"},
      {R"({"hwm": 1.5})", "hwm"},
      {R"({"buffer_steps": "7"})", "buffer_steps"},
      {R"({"buffer_steps": -1})", "buffer_steps"},
      {R"({"buffer_steps": 18446744073709551615})", "buffer_steps"},
      {R"({"endpoint": "http://x"})", "http://x"},
      {R"({"publisher": "kafka"})", "kafka"},
      {R"({"encoding": "xml"})", "encoding"},
      {R"({"enable_kv_cache_events": 1})", "enable_kv_cache_events"},
  };
  for (const auto& one : cases) {
    const Result<KvEventsConfig> config = parse_kv_events_config(one.json);
    ASSERT_FALSE(config) << one.json;
    EXPECT_EQ(config.error().code(), ErrorCode::kInvalidArgument);
    EXPECT_NE(config.error().message().find(one.word), std::string::npos)
        << config.error().message();
  }
}

TEST(KvEventsConfig, BindsByVllmsRule) {
  for (const char* endpoint : {"tcp://*:5557", "tcp://[::]:5557", "ipc:///tmp/x", "inproc://x"}) {
    EXPECT_TRUE(kv_endpoint_binds(endpoint)) << endpoint;
  }
  EXPECT_FALSE(kv_endpoint_binds("tcp://10.0.0.1:5557"));
  EXPECT_FALSE(kv_endpoint_binds("tcp://router:5557"));
}

TEST(KvEventsConfig, RanksHaveTheirOwnEndpoints) {
  EXPECT_EQ(*kv_endpoint_of_rank("tcp://*:5557", 0), "tcp://*:5557");
  EXPECT_EQ(*kv_endpoint_of_rank("tcp://*:5557", 2), "tcp://*:5559");
  EXPECT_EQ(*kv_endpoint_of_rank("inproc://x", 2), "inproc://x_dp2");
  EXPECT_FALSE(kv_endpoint_of_rank("tcp://*:*", 1));
  EXPECT_FALSE(kv_endpoint_of_rank("tcp://*:65535", 1));
  EXPECT_FALSE(kv_endpoint_of_rank("ipc:///tmp/x", 1));
}

TEST(KvEventsConfig, TopicsForLlmD) {
  EXPECT_EQ(*kv_topic("", "1.2.3.4:8000", "m"), "");
  EXPECT_EQ(*kv_topic("kv@{address}@{model}", "1.2.3.4:8000", "SmolLM2"),
            "kv@1.2.3.4:8000@SmolLM2");
  EXPECT_EQ(*kv_topic("kv-events", "", ""), "kv-events");
  for (const char* topic : {"kv@{address}@a@b", "kv@{address}", "kv@@{model}", "kv@{address}@"}) {
    EXPECT_FALSE(kv_topic(topic, "1.2.3.4:8000", "m")) << topic;
  }
  EXPECT_FALSE(kv_topic("kv@{address}@{model}", "1.2.3.4:8000", "org@model"));
}

}  // namespace
}  // namespace kvant::serve
