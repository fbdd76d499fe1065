#include "kvant/serve/tiers/redis_client.h"

#include <hiredis/hiredis.h>
#include <sys/time.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <ctime>
#include <optional>
#include <thread>
#include <utility>

namespace kvant::serve {

namespace {

constexpr int kSlots = 16384;
constexpr int kMaxAttempts = 6;  // of one command, redirections and waits included

Error bad_url(const std::string& what) {
  return Error(ErrorCode::kInvalidArgument,
               what +
                   "; a remote cache is named redis://[:password@]host[:port][,host[:port]...]"
                   "[/database], e.g. redis://10.0.0.5:6379");
}

Result<int> parse_number(std::string_view text, int most, const char* what) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0 || value > most)
    return bad_url(std::string(what) + " '" + std::string(text) + "' is not a number up to " +
                   std::to_string(most));
  return value;
}

Result<RedisAddress> parse_address(std::string_view text) {
  RedisAddress address;
  // [::1]:6379 or host:6379
  size_t colon = std::string_view::npos;
  if (text.starts_with('[')) {
    const size_t close = text.find(']');
    if (close == std::string_view::npos) return bad_url("an IPv6 address lacks its ']'");
    address.host = text.substr(1, close - 1);
    if (close + 1 < text.size()) colon = close + 1;
  } else {
    colon = text.rfind(':');
    address.host = text.substr(0, colon);
  }
  if (colon != std::string_view::npos) {
    KVANT_ASSIGN(address.port, parse_number(text.substr(colon + 1), 65535, "port"));
  }
  if (address.host.empty()) return bad_url("a host is missing");
  return address;
}

timeval milliseconds(int ms) {
  return {.tv_sec = ms / 1000, .tv_usec = (ms % 1000) * 1000};
}

std::string name_of(const RedisAddress& address) {
  return address.host + ":" + std::to_string(address.port);
}

// A peer that closed its socket must not end the process: hiredis writes without MSG_NOSIGNAL.
class NoSigpipe {
 public:
  NoSigpipe() {
    sigemptyset(&pipe_);
    sigaddset(&pipe_, SIGPIPE);
    sigset_t pending;
    sigpending(&pending);
    was_pending_ = sigismember(&pending, SIGPIPE) == 1;
    pthread_sigmask(SIG_BLOCK, &pipe_, &before_);
  }
  ~NoSigpipe() {
    const timespec none{};
    if (!was_pending_) {
      while (sigtimedwait(&pipe_, nullptr, &none) == -1 && errno == EINTR) {
      }
    }
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }

 private:
  sigset_t pipe_, before_;
  bool was_pending_ = false;
};

struct FreeReply {
  void operator()(redisReply* reply) const { freeReplyObject(reply); }
};
using ReplyPointer = std::unique_ptr<redisReply, FreeReply>;

RedisReply copy_reply(const redisReply& reply) {
  RedisReply copy;
  switch (reply.type) {
    case REDIS_REPLY_INTEGER:
      copy.kind = RedisReply::Kind::kInteger;
      copy.integer = reply.integer;
      break;
    case REDIS_REPLY_STRING:
    case REDIS_REPLY_STATUS:
      copy.kind = RedisReply::Kind::kText;
      copy.text.assign(reply.str, static_cast<size_t>(reply.len));
      break;
    case REDIS_REPLY_ERROR:
      copy.kind = RedisReply::Kind::kError;
      copy.text.assign(reply.str, static_cast<size_t>(reply.len));
      break;
    default: break;
  }
  return copy;
}

}  // namespace

Result<RedisUrl> parse_redis_url(std::string_view url) {
  constexpr std::string_view kScheme = "redis://";
  if (!url.starts_with(kScheme)) return bad_url("'" + std::string(url) + "' has another scheme");
  url.remove_prefix(kScheme.size());
  RedisUrl parsed;
  if (const size_t at = url.rfind('@'); at != std::string_view::npos) {
    const std::string_view login = url.substr(0, at);
    const size_t colon = login.find(':');
    if (colon == std::string_view::npos) return bad_url("the login lacks its ':'");
    parsed.user = login.substr(0, colon);
    parsed.password = login.substr(colon + 1);
    url.remove_prefix(at + 1);
  }
  if (const size_t slash = url.find('/'); slash != std::string_view::npos) {
    if (slash + 1 < url.size()) {
      KVANT_ASSIGN(parsed.database, parse_number(url.substr(slash + 1), 1 << 20, "database"));
    }
    url = url.substr(0, slash);
  }
  while (true) {
    const size_t comma = url.find(',');
    KVANT_ASSIGN(RedisAddress address, parse_address(url.substr(0, comma)));
    parsed.nodes.push_back(std::move(address));
    if (comma == std::string_view::npos) return parsed;
    url.remove_prefix(comma + 1);
  }
}

int redis_slot(std::string_view key) {
  const size_t open = key.find('{');
  if (open != std::string_view::npos) {
    const size_t close = key.find('}', open + 1);
    if (close != std::string_view::npos && close > open + 1)
      key = key.substr(open + 1, close - open - 1);
  }
  // CRC16-XMODEM: polynomial 0x1021, from 0, nothing reflected.
  uint32_t crc = 0;
  for (const char c : key) {
    crc ^= static_cast<uint32_t>(static_cast<uint8_t>(c)) << 8;
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 0x8000) ? crc << 1 ^ 0x1021 : crc << 1;
    crc &= 0xffff;
  }
  return static_cast<int>(crc % kSlots);
}

// ---- nodes ----

struct RedisClient::Node {
  RedisAddress address;
  redisContext* context = nullptr;
  Clock::time_point closed_until{};  // left alone until then
  int pause_ms = 0;

  void disconnect() {
    if (context != nullptr) redisFree(context);
    context = nullptr;
  }
  ~Node() { disconnect(); }
};

RedisClient::RedisClient(RedisUrl url, const RedisOptions& options)
    : url_(std::move(url)), options_(options), owner_(kSlots, nullptr) {}

RedisClient::~RedisClient() = default;

RedisClient::Node& RedisClient::node(const RedisAddress& address) {
  std::unique_ptr<Node>& slot = nodes_[address];
  if (slot == nullptr) {
    slot = std::make_unique<Node>();
    slot->address = address;
  }
  return *slot;
}

void RedisClient::fail(Node& node) {
  node.disconnect();
  ++stats_.failures;
  ++stats_.breaker_trips;
  node.pause_ms = node.pause_ms == 0 ? options_.breaker_first_ms
                                     : std::min(2 * node.pause_ms, options_.breaker_most_ms);
  node.closed_until = Clock::now() + std::chrono::milliseconds(node.pause_ms);
  slots_stale_ = true;  // another node may have taken over
}

Status RedisClient::connect(Node& node) {
  if (node.context != nullptr) return {};
  const std::string name = name_of(node.address);
  if (Clock::now() < node.closed_until)
    return Error(ErrorCode::kIoError, name + " failed and is left alone for a while");
  redisContext* const context = redisConnectWithTimeout(
      node.address.host.c_str(), node.address.port, milliseconds(options_.connect_timeout_ms));
  if (context == nullptr || context->err != 0) {
    const std::string why = context == nullptr ? "out of memory" : context->errstr;
    if (context != nullptr) redisFree(context);
    fail(node);
    return Error(ErrorCode::kIoError, name + ": cannot connect: " + why);
  }
  node.context = context;
  redisSetTimeout(context, milliseconds(options_.command_timeout_ms));
  const auto setup = [&](const std::vector<std::string>& args) -> Status {
    std::vector<const char*> argv;
    std::vector<size_t> lengths;
    for (const std::string& arg : args) {
      argv.push_back(arg.data());
      lengths.push_back(arg.size());
    }
    const ReplyPointer reply(static_cast<redisReply*>(
        redisCommandArgv(context, static_cast<int>(argv.size()), argv.data(), lengths.data())));
    if (reply != nullptr && reply->type != REDIS_REPLY_ERROR) return {};
    const std::string why = reply == nullptr ? context->errstr : reply->str;
    fail(node);
    return Error(ErrorCode::kIoError, name + ": " + args[0] + " failed: " + why);
  };
  if (!url_.password.empty()) {
    KVANT_TRY(url_.user.empty() ? setup({"AUTH", url_.password})
                                : setup({"AUTH", url_.user, url_.password}));
  }
  if (url_.database != 0) KVANT_TRY(setup({"SELECT", std::to_string(url_.database)}));
  return {};
}

// ---- slots ----

// False: the node is no cluster's.
Result<bool> RedisClient::read_slots(Node& node) {
  KVANT_TRY(connect(node));
  const ReplyPointer reply(static_cast<redisReply*>(redisCommand(node.context, "CLUSTER SLOTS")));
  if (reply == nullptr) {
    const std::string why = node.context->errstr;
    fail(node);
    return Error(ErrorCode::kIoError, name_of(node.address) + ": " + why);
  }
  if (reply->type == REDIS_REPLY_ERROR) {
    const std::string_view text(reply->str, static_cast<size_t>(reply->len));
    if (text.find("cluster support disabled") != std::string_view::npos ||
        text.find("unknown command") != std::string_view::npos)
      return false;
    return Error(ErrorCode::kIoError, name_of(node.address) + ": " + std::string(text));
  }
  std::ranges::fill(owner_, nullptr);
  for (size_t i = 0; reply->type == REDIS_REPLY_ARRAY && i < reply->elements; ++i) {
    // [first, last, [host, port, ...] of the master, replicas...]
    const redisReply& range = *reply->element[i];
    if (range.type != REDIS_REPLY_ARRAY || range.elements < 3) continue;
    const redisReply& master = *range.element[2];
    if (master.type != REDIS_REPLY_ARRAY || master.elements < 2 ||
        master.element[1]->type != REDIS_REPLY_INTEGER)
      continue;
    RedisAddress address{node.address.host, static_cast<int>(master.element[1]->integer)};
    // No host: the one that was asked.
    if (master.element[0]->type == REDIS_REPLY_STRING && master.element[0]->len > 0)
      address.host.assign(master.element[0]->str, static_cast<size_t>(master.element[0]->len));
    const RedisAddress* const owner = &this->node(address).address;
    const int64_t first = std::max<int64_t>(0, range.element[0]->integer);
    const int64_t last = std::min<int64_t>(kSlots - 1, range.element[1]->integer);
    for (int64_t slot = first; slot <= last; ++slot) owner_[slot] = owner;
  }
  return true;
}

Status RedisClient::learn_slots(bool forced) {
  if (single_ || (slots_known_ && !slots_stale_ && !forced)) return {};
  // Not more often than ten times a second, however many commands fail.
  if (slots_known_ && Clock::now() < next_learning_) return {};
  next_learning_ = Clock::now() + std::chrono::milliseconds(100);
  ++stats_.refreshes;
  // Whoever is known, then those of the URL.
  std::vector<RedisAddress> candidates;
  for (const auto& [address, node] : nodes_) candidates.push_back(address);
  for (const RedisAddress& address : url_.nodes) {
    if (!nodes_.contains(address)) candidates.push_back(address);
  }
  Status last;
  for (const RedisAddress& address : candidates) {
    const auto cluster = read_slots(node(address));
    if (!cluster) {
      last = cluster.error();
      continue;
    }
    slots_known_ = true;
    slots_stale_ = false;
    if (!*cluster) {
      single_ = true;
      std::ranges::fill(owner_, &node(address).address);
    }
    return {};
  }
  return last;
}

Status RedisClient::check() {
  const NoSigpipe guard;
  slots_stale_ = true;
  if (!single_) return learn_slots(true);
  return connect(node(*owner_[0]));
}

// ---- commands ----

// What a reply asks for besides being one.
RedisClient::Outcome RedisClient::judge(const Command& command, const RedisReply& reply) {
  if (reply.kind != RedisReply::Kind::kError) return Outcome::kDone;
  const auto begins = [&](std::string_view word) { return reply.text.starts_with(word); };
  if (begins("MOVED ") || begins("ASK ")) {
    // MOVED 3999 127.0.0.1:6381
    const size_t space = reply.text.rfind(' ');
    const auto address = parse_address(std::string_view(reply.text).substr(space + 1));
    if (!address) return Outcome::kDone;
    ++stats_.redirections;
    if (begins("ASK ")) {
      asked_[command.key] = *address;
      return Outcome::kAsk;
    }
    owner_[redis_slot(command.key)] = &node(*address).address;
    slots_stale_ = true;  // more slots than this one have moved, as a rule
    return Outcome::kAgain;
  }
  if (begins("TRYAGAIN") || begins("CLUSTERDOWN") || begins("LOADING")) {
    ++stats_.waits;
    slots_stale_ = true;
    return Outcome::kAgain;
  }
  return Outcome::kDone;
}

void RedisClient::send(Node& node, std::span<const Command> commands,
                       std::span<const size_t> indices, bool asking) {
  for (const size_t i : indices) {
    std::vector<const char*> argv;
    std::vector<size_t> lengths;
    for (const std::string_view arg : commands[i].args) {
      argv.push_back(arg.data());
      lengths.push_back(arg.size());
    }
    if (asking) redisAppendCommand(node.context, "ASKING");
    redisAppendCommandArgv(node.context, static_cast<int>(argv.size()), argv.data(),
                           lengths.data());
  }
}

std::vector<RedisClient::Outcome> RedisClient::attempt(std::span<const Command> commands,
                                                       std::vector<Result<RedisReply>>& results,
                                                       std::span<const size_t> open) {
  // By node, and whether the node must be told that it was asked for.
  std::map<std::pair<const RedisAddress*, bool>, std::vector<size_t>> by_node;
  for (const size_t i : open) {
    const auto asked = asked_.find(commands[i].key);
    const RedisAddress* owner =
        asked != asked_.end() ? &node(asked->second).address : owner_[redis_slot(commands[i].key)];
    if (owner == nullptr) {
      slots_stale_ = true;
      results[i] = Error(ErrorCode::kIoError, "no node of the cluster owns the key's slot");
      continue;
    }
    by_node[{owner, asked != asked_.end()}].push_back(i);
  }
  asked_.clear();
  std::vector<Outcome> outcomes(commands.size(), Outcome::kDone);
  for (const auto& [where, indices] : by_node) {
    Node& target = node(*where.first);
    const bool asking = where.second;
    const Status connected = connect(target);
    if (connected) send(target, commands, indices, asking);
    Status status = connected;
    for (const size_t i : indices) {
      for (int reply_number = asking ? 0 : 1; status && reply_number < 2; ++reply_number) {
        void* raw = nullptr;
        if (redisGetReply(target.context, &raw) != REDIS_OK) {
          status =
              Error(ErrorCode::kIoError, name_of(target.address) + ": " + target.context->errstr);
          fail(target);
          break;
        }
        const ReplyPointer reply(static_cast<redisReply*>(raw));
        if (reply_number == 0) continue;  // of ASKING
        target.pause_ms = 0;
        RedisReply copy = copy_reply(*reply);
        outcomes[i] = judge(commands[i], copy);
        results[i] = std::move(copy);
      }
      if (!status) results[i] = status.error();
    }
  }
  return outcomes;
}

std::vector<Result<RedisReply>> RedisClient::run(std::span<const Command> commands) {
  const NoSigpipe guard;
  stats_.commands += static_cast<int64_t>(commands.size());
  std::vector<Result<RedisReply>> results(
      commands.size(), Error(ErrorCode::kIoError, "no node of the remote cache answers"));
  const Status learned = learn_slots(false);
  if (!slots_known_) {
    if (!learned) std::ranges::fill(results, Result<RedisReply>(learned.error()));
    return results;
  }
  std::vector<size_t> open(commands.size());
  for (size_t i = 0; i < open.size(); ++i) open[i] = i;
  int pause_ms = 5;
  for (int attempt_number = 0; attempt_number < kMaxAttempts && !open.empty(); ++attempt_number) {
    const std::vector<Outcome> outcomes = attempt(commands, results, open);
    std::vector<size_t> again;
    bool wait = false;
    for (const size_t i : open) {
      if (outcomes[i] == Outcome::kDone) continue;
      again.push_back(i);
      const std::string& text = results[i]->text;
      wait = wait || !(text.starts_with("MOVED") || text.starts_with("ASK"));
    }
    open = std::move(again);
    if (open.empty()) break;
    if (wait) {
      if (Clock::now() < no_waits_until_) break;  // it did not help a moment ago
      std::this_thread::sleep_for(std::chrono::milliseconds(pause_ms));
      pause_ms *= 2;
    }
    if (slots_stale_ && asked_.empty()) (void)learn_slots(false);
  }
  asked_.clear();
  // Whoever still waits or is sent around got no answer.
  if (!open.empty() && Clock::now() >= no_waits_until_)
    no_waits_until_ = Clock::now() + std::chrono::milliseconds(options_.breaker_first_ms);
  for (const size_t i : open)
    results[i] = Error(ErrorCode::kIoError, "the cluster is being rearranged: " + results[i]->text);
  return results;
}

}  // namespace kvant::serve
