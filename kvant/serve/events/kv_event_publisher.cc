#include "kvant/serve/events/kv_event_publisher.h"

#include <fmt/format.h>
#include <sys/eventfd.h>
#include <unistd.h>
#include <zmq.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <deque>
#include <mutex>
#include <span>
#include <thread>
#include <utility>

#include "kvant/base/check.h"

namespace kvant::serve {
namespace {

constexpr std::array<char, 8> kEndOfReplay = {'\xff', '\xff', '\xff', '\xff',
                                              '\xff', '\xff', '\xff', '\xff'};

std::array<char, 8> big_endian(uint64_t number) {
  std::array<char, 8> bytes;
  for (int i = 0; i < 8; ++i) bytes[7 - i] = static_cast<char>(number >> (8 * i));
  return bytes;
}

uint64_t from_big_endian(const uint8_t* bytes) {
  uint64_t number = 0;
  for (int i = 0; i < 8; ++i) number = number << 8 | bytes[i];
  return number;
}

double unix_seconds() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

// Binds or connects by vLLM's rule and returns where.
Result<std::string> open_socket(zmq::socket_t& socket, const char* what,
                                const std::string& endpoint, bool bind) {
  try {
    if (!bind) {
      socket.connect(endpoint);
      return endpoint;
    }
    socket.bind(endpoint);
    return socket.get(zmq::sockopt::last_endpoint);
  } catch (const zmq::error_t& error) {
    return Error(ErrorCode::kIoError,
                 fmt::format("KV events: cannot {} {} '{}': {}; is another server using it?",
                             bind ? "bind" : "connect", what, endpoint, error.what()));
  }
}

}  // namespace

struct KvEventPublisher::State {
  struct Queued {
    uint64_t number = 0;
    KvEventBatch batch;
  };
  struct Sent {
    uint64_t number = 0;
    std::string payload;
  };

  KvEventsConfig config;
  int rank = 0;
  std::string endpoint, replay_endpoint;
  zmq::context_t context{1};  // outlives the sockets
  // PUB on the wire; XPUB here because it says when a subscriber is too slow.
  zmq::socket_t pub;
  zmq::socket_t router;
  int wake = -1;  // eventfd
  std::thread thread;

  uint64_t next_number = 0;  // publish()'s thread only
  mutable std::mutex mutex;  // of queue and sending
  std::deque<Queued> queue;
  bool sending = false;  // a batch has left the queue and is not counted yet
  std::atomic<bool> stopping = false;

  std::deque<Sent> sent;  // for replay; the thread's only, as are the sockets
  std::atomic<int64_t> batches_published = 0, events_published = 0, batches_dropped = 0,
                       batches_missed = 0, replays = 0, replays_refused = 0, subscriptions = 0;

  ~State() {
    if (wake >= 0) close(wake);
  }

  Status open();
  void loop();
  void run();
  void signal() const;
  void send_queued();
  void send(Queued item);
  bool send_frames(const Sent& message);
  void take_subscriptions();
  void answer_replays();
  bool answer(zmq::message_t& identity, uint64_t first);
  bool reply(zmq::message_t& identity, std::span<const char> number, const std::string& payload);
};

Status KvEventPublisher::State::open() {
  KVANT_ASSIGN(const std::string pub_at, kv_endpoint_of_rank(config.endpoint, rank));
  try {
    pub = zmq::socket_t(context, zmq::socket_type::xpub);
    pub.set(zmq::sockopt::sndhwm, config.hwm);
    pub.set(zmq::sockopt::linger, 0);
    pub.set(zmq::sockopt::xpub_nodrop, 1);
    pub.set(zmq::sockopt::xpub_verboser, 1);  // every subscription, to count them
    router = zmq::socket_t(context, zmq::socket_type::router);
    router.set(zmq::sockopt::linger, 0);
    router.set(zmq::sockopt::router_mandatory, 1);  // says when a client does not read
    // A whole replay fits; a client that asks again and again without reading is refused.
    router.set(zmq::sockopt::sndhwm,
               static_cast<int>(std::min<int64_t>(2 * config.buffer_steps + 16, 1'000'000)));
    router.set(zmq::sockopt::maxmsgsize, int64_t{64});  // requests are 8 bytes
  } catch (const zmq::error_t& error) {
    return Error(ErrorCode::kIoError, fmt::format("KV events: {}", error.what()));
  }
  KVANT_ASSIGN(endpoint, open_socket(pub, "endpoint", pub_at, kv_endpoint_binds(pub_at)));
  if (!config.replay_endpoint.empty()) {
    KVANT_ASSIGN(const std::string replay_at, kv_endpoint_of_rank(config.replay_endpoint, rank));
    KVANT_ASSIGN(replay_endpoint, open_socket(router, "replay_endpoint", replay_at, true));
  }
  wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (wake < 0) return Error(ErrorCode::kIoError, "KV events: no file descriptor is left");
  return {};
}

void KvEventPublisher::State::signal() const {
  const uint64_t one = 1;
  // Fails only if the counter is at its end, and then the thread wakes anyway.
  [[maybe_unused]] const ssize_t written = write(wake, &one, sizeof(one));
}

void KvEventPublisher::State::loop() {
  try {
    run();
  } catch (const zmq::error_t&) {
    // The context is ending, or memory is: events stop, the engine does not.
  }
}

void KvEventPublisher::State::run() {
  std::vector<zmq::pollitem_t> items = {{nullptr, wake, ZMQ_POLLIN, 0},
                                        {pub.handle(), 0, ZMQ_POLLIN, 0}};
  if (!replay_endpoint.empty()) items.push_back({router.handle(), 0, ZMQ_POLLIN, 0});
  for (;;) {
    const bool last = stopping;
    if (!last) zmq::poll(items, std::chrono::milliseconds(-1));
    uint64_t ignored = 0;
    [[maybe_unused]] const ssize_t taken = read(wake, &ignored, sizeof(ignored));
    take_subscriptions();
    send_queued();
    if (!replay_endpoint.empty()) answer_replays();
    if (last) return;
  }
}

void KvEventPublisher::State::send_queued() {
  for (;;) {
    Queued item;
    {
      const std::lock_guard lock(mutex);
      sending = !queue.empty();
      if (!sending) return;
      item = std::move(queue.front());
      queue.pop_front();
    }
    send(std::move(item));
  }
}

void KvEventPublisher::State::send(Queued item) {
  Sent message{item.number, encode_kv_events(item.batch, config.encoding)};
  if (!send_frames(message)) {
    // A subscriber is `hwm` messages behind. It alone shall miss this one: send to the others.
    ++batches_missed;
    pub.set(zmq::sockopt::xpub_nodrop, 0);
    send_frames(message);
    pub.set(zmq::sockopt::xpub_nodrop, 1);
  }
  ++batches_published;
  events_published += static_cast<int64_t>(item.batch.events.size());
  if (config.buffer_steps == 0) return;
  sent.push_back(std::move(message));
  if (static_cast<int64_t>(sent.size()) > config.buffer_steps) sent.pop_front();
}

bool KvEventPublisher::State::send_frames(const Sent& message) {
  const std::array<char, 8> number = big_endian(message.number);
  const auto flags = zmq::send_flags::dontwait;
  if (!pub.send(zmq::buffer(config.topic), flags | zmq::send_flags::sndmore)) {
    return false;
  }
  // Room is counted in whole messages: where the first frame fits, the others do.
  static_cast<void>(pub.send(zmq::buffer(number), flags | zmq::send_flags::sndmore));
  static_cast<void>(pub.send(zmq::buffer(message.payload), flags));
  return true;
}

void KvEventPublisher::State::take_subscriptions() {
  zmq::message_t message;
  while (pub.recv(message, zmq::recv_flags::dontwait)) {
    if (message.size() == 0) continue;
    subscriptions += *message.data<uint8_t>() == 1 ? 1 : -1;
  }
}

void KvEventPublisher::State::answer_replays() {
  for (;;) {
    std::vector<zmq::message_t> frames;
    zmq::message_t frame;
    while (router.recv(frame, zmq::recv_flags::dontwait)) {
      const bool more = frame.more();
      if (frames.size() < 4) frames.push_back(std::move(frame));
      frame = zmq::message_t();
      if (!more) break;
    }
    if (frames.empty()) return;
    const bool valid = frames.size() == 3 && frames[1].size() == 0 && frames[2].size() == 8;
    if (valid && answer(frames[0], from_big_endian(frames[2].data<uint8_t>()))) {
      ++replays;
    } else {
      ++replays_refused;
    }
  }
}

bool KvEventPublisher::State::answer(zmq::message_t& identity, uint64_t first) {
  const auto start = std::lower_bound(
      sent.begin(), sent.end(), first,
      [](const Sent& message, uint64_t number) { return message.number < number; });
  for (auto message = start; message != sent.end(); ++message) {
    if (!reply(identity, big_endian(message->number), message->payload)) return false;
  }
  return reply(identity, kEndOfReplay, "");
}

bool KvEventPublisher::State::reply(zmq::message_t& identity, std::span<const char> number,
                                    const std::string& payload) {
  const auto flags = zmq::send_flags::dontwait;
  const auto more = flags | zmq::send_flags::sndmore;
  try {
    if (!router.send(zmq::buffer(identity.data(), identity.size()), more)) return false;
    static_cast<void>(router.send(zmq::message_t(), more));
    static_cast<void>(router.send(zmq::buffer(number.data(), number.size()), more));
    static_cast<void>(router.send(zmq::buffer(payload), flags));
    return true;
  } catch (const zmq::error_t&) {  // it has left
    return false;
  }
}

KvEventPublisher::KvEventPublisher() : state_(std::make_unique<State>()) {}

Result<std::unique_ptr<KvEventPublisher>> KvEventPublisher::create(const KvEventsConfig& config,
                                                                   int rank) {
  KVANT_TRY(check_kv_events_config(config));
  KVANT_CHECK(rank >= 0, "ranks count from 0");
  std::unique_ptr<KvEventPublisher> publisher(new KvEventPublisher);
  State& state = *publisher->state_;
  state.config = config;
  state.rank = rank;
  KVANT_TRY(state.open());
  state.thread = std::thread([&state] { state.loop(); });
  publisher->publish({AllBlocksCleared{}});
  return publisher;
}

KvEventPublisher::~KvEventPublisher() {
  if (!state_->thread.joinable()) return;
  state_->stopping = true;
  state_->signal();
  state_->thread.join();
}

bool KvEventPublisher::publish(std::vector<KvEvent> events) {
  if (events.empty()) return true;
  State& s = *state_;
  const uint64_t number = s.next_number++;
  {
    const std::lock_guard lock(s.mutex);
    if (static_cast<int64_t>(s.queue.size()) >= s.config.max_queue_size) {
      ++s.batches_dropped;
      return false;
    }
    s.queue.push_back({number, {unix_seconds(), std::move(events), s.rank}});
  }
  s.signal();
  return true;
}

KvEventStats KvEventPublisher::stats() const {
  const State& s = *state_;
  KvEventStats stats;
  {
    // Before the counters: a batch that is no longer in the queue is in one of them.
    const std::lock_guard lock(s.mutex);
    stats.queue_batches = static_cast<int64_t>(s.queue.size()) + s.sending;
  }
  stats.batches_published = s.batches_published;
  stats.events_published = s.events_published;
  stats.batches_dropped = s.batches_dropped;
  stats.batches_missed = s.batches_missed;
  stats.replays = s.replays;
  stats.replays_refused = s.replays_refused;
  stats.subscriptions = s.subscriptions;
  return stats;
}

const std::string& KvEventPublisher::endpoint() const {
  return state_->endpoint;
}
const std::string& KvEventPublisher::replay_endpoint() const {
  return state_->replay_endpoint;
}
const KvEventsConfig& KvEventPublisher::config() const {
  return state_->config;
}

}  // namespace kvant::serve
