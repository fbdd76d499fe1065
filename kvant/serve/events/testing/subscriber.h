// A subscriber to KV events for tests in C++; foreign_index.py is the one in another language.
// It reads maps only.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kvant/serve/events/kv_event_publisher.h"

namespace kvant::serve::testing {

struct DecodedEvent {
  std::string type;
  std::vector<uint64_t> hashes;
  std::optional<uint64_t> parent;
  std::vector<uint32_t> tokens;
  std::string medium;
};

struct DecodedBatch {
  std::string topic;
  uint64_t number = 0;
  int rank = -1;
  std::vector<DecodedEvent> events;
};

// Throws std::runtime_error where nothing comes within ten seconds: the test fails.
class Subscriber {
 public:
  explicit Subscriber(const std::string& endpoint, bool bind = false, int receive_hwm = 0);
  ~Subscriber();

  const std::string& endpoint() const;
  // Publishes probes until one arrives, then takes all of them; a SUB joins slowly.
  void wait_until_joined(KvEventPublisher& publisher);
  DecodedBatch next();
  bool has_next(int within_ms);
  uint64_t last_number() const { return last_number_; }

 private:
  struct Sockets;
  std::unique_ptr<Sockets> sockets_;
  uint64_t last_number_ = 0;
};

// Until all that was handed to the publisher has been sent, and is counted.
void wait_until_sent(const KvEventPublisher& publisher);
// Until a counter has the value: a client can have its answer before the publisher counts it.
void wait_until_counted(const KvEventPublisher& publisher, int64_t KvEventStats::*counter,
                        int64_t value);

// What a DEALER gets for a replay from `first`: the numbers, in order, without the end mark.
// `ended` tells whether the end mark came.
std::vector<uint64_t> replayed_numbers(const std::string& endpoint, const std::string& request,
                                       bool& ended);
std::string eight_bytes(uint64_t number);

}  // namespace kvant::serve::testing
