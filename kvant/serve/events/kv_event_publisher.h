// Publishes KV events over ZMQ as vLLM does: a PUB socket with numbered batches, and a ROUTER
// socket from which late or lossy subscribers ask for batches again.
//
// Message: [topic, sequence number (8 bytes, big-endian), payload]. Replay: a client sends
// ["", first number (8 bytes)] and gets ["", number, payload] for every kept batch from there on,
// then ["", FF*8, ""]. Sequence numbers begin at 0 with each start, and the first batch is
// AllBlocksCleared, so that a subscriber sees a restart as such.
//
// The engine thread calls publish(); encoding and sockets are a thread's of the publisher's own,
// and the queue between them is bounded. Nothing here makes the engine wait.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/serve/events/kv_event.h"
#include "kvant/serve/events/kv_events_config.h"

namespace kvant::serve {

// Since the start.
struct KvEventStats {
  int64_t batches_published = 0;
  int64_t events_published = 0;
  // Batches that never left because the queue was full. Their numbers are skipped, so that
  // subscribers notice.
  int64_t batches_dropped = 0;
  // Batches that at least one subscriber missed because it was `hwm` messages behind.
  int64_t batches_missed = 0;
  int64_t replays = 0;          // requests answered
  int64_t replays_refused = 0;  // malformed, or the client does not read
  int64_t queue_batches = 0;    // waiting or being sent now; the rest is counted above
  int64_t subscriptions = 0;    // now; a subscriber with two filters counts twice
};

class KvEventPublisher {
 public:
  // Opens the sockets and publishes AllBlocksCleared. `config.topic` is sent as it is (see
  // kv_topic); ports and names are those of `rank`. kInvalidArgument: config; kIoError: an endpoint
  // cannot be bound, with ZMQ's reason.
  static Result<std::unique_ptr<KvEventPublisher>> create(const KvEventsConfig& config,
                                                          int rank = 0);
  // Sends what is queued, then closes.
  ~KvEventPublisher();

  // One thread only. Queues the events of one step, none: nothing happens. False if the queue was
  // full: they are lost and counted.
  bool publish(std::vector<KvEvent> events);

  // Any thread.
  KvEventStats stats() const;
  // Where the sockets are, with the port that a '*' became; empty without a replay socket.
  const std::string& endpoint() const;
  const std::string& replay_endpoint() const;
  const KvEventsConfig& config() const;

 private:
  KvEventPublisher();
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvant::serve
