#include "kvant/serve/events/testing/subscriber.h"

#define MSGPACK_NO_BOOST
#include <msgpack.hpp>
#include <zmq.hpp>

#include <chrono>
#include <stdexcept>
#include <thread>

namespace kvant::serve::testing {
namespace {

constexpr std::chrono::seconds kPatience{10};

uint64_t number_of(const zmq::message_t& frame) {
  if (frame.size() != 8) throw std::runtime_error("a sequence number is not 8 bytes");
  uint64_t number = 0;
  for (int i = 0; i < 8; ++i) number = number << 8 | frame.data<uint8_t>()[i];
  return number;
}

DecodedEvent decode_event(const msgpack::object& object) {
  DecodedEvent event;
  for (const auto& pair : object.as<std::map<std::string, msgpack::object>>()) {
    if (pair.first == "type") pair.second.convert(event.type);
    if (pair.first == "block_hashes") pair.second.convert(event.hashes);
    if (pair.first == "token_ids") pair.second.convert(event.tokens);
    if (pair.first == "medium") pair.second.convert(event.medium);
    if (pair.first == "parent_block_hash" && !pair.second.is_nil()) {
      event.parent = pair.second.as<uint64_t>();
    }
  }
  return event;
}

}  // namespace

struct Subscriber::Sockets {
  zmq::context_t context{1};
  zmq::socket_t sub{context, zmq::socket_type::sub};
  std::string endpoint;
};

Subscriber::Subscriber(const std::string& endpoint, bool bind, int receive_hwm)
    : sockets_(std::make_unique<Sockets>()) {
  sockets_->sub.set(zmq::sockopt::rcvhwm, receive_hwm);
  sockets_->sub.set(zmq::sockopt::subscribe, "");
  if (bind) {
    sockets_->sub.bind(endpoint);
  } else {
    sockets_->sub.connect(endpoint);
  }
  sockets_->endpoint = sockets_->sub.get(zmq::sockopt::last_endpoint);
}
Subscriber::~Subscriber() = default;

const std::string& Subscriber::endpoint() const {
  return sockets_->endpoint;
}

void Subscriber::wait_until_joined(KvEventPublisher& publisher) {
  const auto give_up = std::chrono::steady_clock::now() + kPatience;
  do {
    if (std::chrono::steady_clock::now() > give_up) throw std::runtime_error("cannot subscribe");
    publisher.publish({AllBlocksCleared{}});
  } while (!has_next(20));
  while (has_next(200)) next();
}

bool Subscriber::has_next(int within_ms) {
  zmq::pollitem_t item = {sockets_->sub.handle(), 0, ZMQ_POLLIN, 0};
  return zmq::poll(&item, 1, std::chrono::milliseconds(within_ms)) > 0;
}

DecodedBatch Subscriber::next() {
  if (!has_next(10'000)) throw std::runtime_error("no event came");
  std::vector<zmq::message_t> frames;
  for (bool more = true; more;) {
    zmq::message_t frame;
    if (!sockets_->sub.recv(frame)) throw std::runtime_error("a message ended early");
    more = frame.more();
    frames.push_back(std::move(frame));
  }
  if (frames.size() != 3) throw std::runtime_error("a message does not have three frames");
  DecodedBatch batch;
  batch.topic = frames[0].to_string();
  batch.number = last_number_ = number_of(frames[1]);
  const msgpack::object_handle handle = msgpack::unpack(frames[2].data<char>(), frames[2].size());
  const auto parts = handle.get().as<std::vector<msgpack::object>>();
  if (parts.size() != 3) throw std::runtime_error("a payload does not have three parts");
  batch.rank = parts[2].as<int>();
  for (const msgpack::object& event : parts[1].as<std::vector<msgpack::object>>()) {
    batch.events.push_back(decode_event(event));
  }
  return batch;
}

void wait_until_sent(const KvEventPublisher& publisher) {
  wait_until_counted(publisher, &KvEventStats::queue_batches, 0);
}

void wait_until_counted(const KvEventPublisher& publisher, int64_t KvEventStats::*counter,
                        int64_t value) {
  const auto give_up = std::chrono::steady_clock::now() + kPatience;
  while (publisher.stats().*counter != value) {
    if (std::chrono::steady_clock::now() > give_up) {
      throw std::runtime_error("a counter is " + std::to_string(publisher.stats().*counter) +
                               " and should be " + std::to_string(value));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

std::string eight_bytes(uint64_t number) {
  std::string bytes(8, '\0');
  for (int i = 0; i < 8; ++i) bytes[7 - i] = static_cast<char>(number >> (8 * i));
  return bytes;
}

std::vector<uint64_t> replayed_numbers(const std::string& endpoint, const std::string& request,
                                       bool& ended) {
  zmq::context_t context{1};
  zmq::socket_t dealer{context, zmq::socket_type::dealer};
  dealer.set(zmq::sockopt::linger, 0);
  // A malformed request is not answered: there is nothing to be patient for.
  dealer.set(zmq::sockopt::rcvtimeo, request.size() == 8 ? 10'000 : 500);
  dealer.connect(endpoint);
  dealer.send(zmq::message_t(), zmq::send_flags::sndmore);
  dealer.send(zmq::buffer(request), zmq::send_flags::none);
  std::vector<uint64_t> numbers;
  ended = false;
  for (;;) {
    std::vector<zmq::message_t> frames;
    for (bool more = true; more;) {
      zmq::message_t frame;
      if (!dealer.recv(frame)) return numbers;
      more = frame.more();
      frames.push_back(std::move(frame));
    }
    if (frames.size() != 3 || frames[0].size() != 0) throw std::runtime_error("a wrong reply");
    const uint64_t number = number_of(frames[1]);
    if (number == UINT64_MAX) {
      ended = frames[2].size() == 0;
      return numbers;
    }
    numbers.push_back(number);
  }
}

}  // namespace kvant::serve::testing
