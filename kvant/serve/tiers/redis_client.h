// Commands to one Redis server or to a Redis Cluster, each sent to the node that owns its key.
//
// Slots as in the cluster specification (CRC16 of the key's hash tag, modulo 16,384), redirections
// (MOVED, ASK) followed and waits (TRYAGAIN, CLUSTERDOWN) bounded. A node that fails is left alone
// for a while that doubles with each failure, so that a dead one costs nothing (circuit breaker).
// Single-thread; blocks up to the timeouts.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "kvant/base/result.h"

namespace kvant::serve {

struct RedisAddress {
  std::string host;
  int port = 6379;

  bool operator==(const RedisAddress&) const = default;
  bool operator<(const RedisAddress& other) const {
    return std::tie(host, port) < std::tie(other.host, other.port);
  }
};

// redis://[[user]:password@]host[:port][,host[:port]...][/database]
struct RedisUrl {
  std::vector<RedisAddress> nodes;  // any of a cluster's
  std::string user, password;
  int database = 0;
};
// kInvalidArgument says what a URL looks like.
Result<RedisUrl> parse_redis_url(std::string_view url);

struct RedisOptions {
  int connect_timeout_ms = 250;
  int command_timeout_ms = 1000;
  int breaker_first_ms = 500;  // how long a failed node is left alone, doubling
  int breaker_most_ms = 30000;
};

// The slot of a key: only what is between the first { and the next } counts, if anything is.
int redis_slot(std::string_view key);

struct RedisReply {
  enum class Kind { kNil, kText, kInteger, kError };
  Kind kind = Kind::kNil;
  std::string text;  // bulk strings, status lines, errors
  int64_t integer = 0;
};

class RedisClient {
 public:
  struct Command {
    std::string key;                     // decides the node
    std::vector<std::string_view> args;  // the whole command; must outlive the call
  };
  struct Stats {
    int64_t commands = 0, redirections = 0, waits = 0, failures = 0, refreshes = 0;
    int64_t breaker_trips = 0;
  };

  RedisClient(RedisUrl url, const RedisOptions& options);
  ~RedisClient();
  RedisClient(const RedisClient&) = delete;
  RedisClient& operator=(const RedisClient&) = delete;

  // One result for each command, in order. Commands to one node go in one round trip. kIoError: the
  // node could not be reached or did not answer in time; kError replies are results.
  std::vector<Result<RedisReply>> run(std::span<const Command> commands);
  // Whether any node answers; says what is wrong if none does.
  Status check();
  const Stats& stats() const { return stats_; }

 private:
  struct Node;
  using Clock = std::chrono::steady_clock;
  // What one attempt made of a command.
  enum class Outcome { kDone, kAgain, kAsk };

  Node& node(const RedisAddress& address);
  Status connect(Node& node);
  void fail(Node& node);
  Status learn_slots(bool forced);
  Result<bool> read_slots(Node& node);
  void send(Node& node, std::span<const Command> commands, std::span<const size_t> indices,
            bool asking);
  std::vector<Outcome> attempt(std::span<const Command> commands,
                               std::vector<Result<RedisReply>>& results,
                               std::span<const size_t> open);
  Outcome judge(const Command& command, const RedisReply& reply);

  const RedisUrl url_;
  const RedisOptions options_;
  std::map<RedisAddress, std::unique_ptr<Node>> nodes_;
  bool single_ = false;                        // not a cluster: everything goes to one node
  std::vector<const RedisAddress*> owner_;     // [slots]; null: not known
  std::map<std::string, RedisAddress> asked_;  // by key: where an ASK sent it
  bool slots_known_ = false;
  bool slots_stale_ = false;
  Clock::time_point next_learning_{};
  Clock::time_point no_waits_until_{};
  Stats stats_;
};

}  // namespace kvant::serve
