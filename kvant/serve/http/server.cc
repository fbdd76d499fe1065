#include "kvant/serve/http/server.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <fmt/format.h>
#include <utility>

#include <boost/asio/bind_executor.hpp>
#include <boost/asio/post.hpp>

#include <random>
#include <thread>

#include "kvant/serve/http/connection.h"

namespace kvant::serve::http {
namespace {

// Beyond max_connections so many are told 503 at a time; more are closed without a word.
constexpr int64_t kTurnedAwayAtOnce = 64;

std::string address_text(const Tcp::endpoint& endpoint) {
  const std::string host = endpoint.address().to_string();
  if (endpoint.address().is_v6()) return fmt::format("[{}]:{}", host, endpoint.port());
  return fmt::format("{}:{}", host, endpoint.port());
}

Result<Tcp::endpoint> find_endpoint(asio::io_context& io, const ServerOptions& options) {
  if (options.port < 0 || options.port > 65535) {
    return Error(ErrorCode::kInvalidArgument,
                 fmt::format("port {}; expected 0 to 65535", options.port));
  }
  const auto port = static_cast<unsigned short>(options.port);
  beast::error_code error;
  const asio::ip::address address = asio::ip::make_address(options.host, error);
  if (!error) return Tcp::endpoint(address, port);
  Tcp::resolver resolver(io);
  const auto found = resolver.resolve(options.host, std::to_string(port), error);
  if (error || found.empty()) {
    return Error(ErrorCode::kInvalidArgument,
                 fmt::format("host '{}' is neither an address nor a known name ({})", options.host,
                             error.message()));
  }
  return found.begin()->endpoint();
}

// What a library throws on the way (no memory, mostly) ends one operation, not the server.
// Has the scheduler give this thread short slices, and therefore soon: it works for microseconds at
// a time, and where all processors compute it would wait for the end of another's slice of several
// milliseconds. Needs no privilege; Linux before 6.12 accepts and ignores it.
void ask_for_short_slices() {
  struct {  // struct sched_attr of sched_setattr(2), which the C library does not declare
    uint32_t size;
    uint32_t policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime_ns;
    uint64_t deadline_ns;
    uint64_t period_ns;
  } attributes{};
  if (::syscall(SYS_sched_getattr, 0, &attributes, sizeof(attributes), 0) != 0) return;
  if (attributes.policy != 0) return;  // SCHED_OTHER; others were chosen by whoever started it
  attributes.size = sizeof(attributes);
  attributes.runtime_ns = 100'000;  // the shortest there is
  static_cast<void>(::syscall(SYS_sched_setattr, 0, &attributes, 0));
}

void run_io(asio::io_context& io) {
  ask_for_short_slices();
  for (;;) {
    try {
      io.run();
      return;
    } catch (const std::exception&) {
    }
  }
}

}  // namespace

struct Server::State {
  State() : shared(std::make_shared<ServerState>()), acceptor(shared->io), retry(shared->io) {}

  Status listen();
  void accept();
  void on_accept(beast::error_code error, Tcp::socket socket);
  void close_all(bool only_idle, std::string_view why);

  std::shared_ptr<ServerState> shared;
  Tcp::acceptor acceptor;    // on `accepting`
  asio::steady_timer retry;  // the same
  std::optional<asio::strand<asio::io_context::executor_type>> accepting;
  std::vector<std::thread> threads;
  std::string address;
  int port = 0;
};

Status Server::State::listen() {
  KVANT_ASSIGN(const Tcp::endpoint endpoint, find_endpoint(shared->io, shared->options));
  beast::error_code error;
  const auto failed = [&](std::string_view hint) {
    return Error(ErrorCode::kIoError, fmt::format("cannot listen on {}: {}{}",
                                                  address_text(endpoint), error.message(), hint));
  };
  acceptor.open(endpoint.protocol(), error);
  if (error) return failed("");
  acceptor.set_option(Tcp::acceptor::reuse_address(true), error);
  acceptor.bind(endpoint, error);
  if (error == asio::error::address_in_use) {
    return failed("; another program listens there: choose another port");
  }
  if (error == asio::error::access_denied) return failed("; ports below 1024 need privileges");
  if (error) return failed("; the host must be an address of this machine, or 0.0.0.0 for all");
  acceptor.listen(asio::socket_base::max_listen_connections, error);
  if (error) return failed("");
  const Tcp::endpoint local = acceptor.local_endpoint(error);
  port = local.port();
  address = address_text(local);
  return {};
}

void Server::State::accept() {
  acceptor.async_accept(
      asio::make_strand(shared->io),
      asio::bind_executor(*accepting, [this](beast::error_code error, Tcp::socket socket) {
        on_accept(error, std::move(socket));
      }));
}

void Server::State::on_accept(beast::error_code error, Tcp::socket socket) {
  if (!acceptor.is_open()) return;
  if (error) {
    // Out of descriptors, mostly: connections that end make room.
    retry.expires_after(std::chrono::milliseconds(50));
    retry.async_wait(asio::bind_executor(*accepting, [this](beast::error_code cancelled) {
      if (!cancelled && acceptor.is_open()) accept();
    }));
    return;
  }
  auto connection = std::make_shared<Connection>(shared, std::move(socket));
  int64_t open = 0;
  {
    const std::lock_guard lock(shared->mutex);
    open = static_cast<int64_t>(shared->open.size()) + 1;
    if (open <= shared->options.max_connections + kTurnedAwayAtOnce) {
      shared->open.insert(connection);
    }
  }
  if (open <= shared->options.max_connections + kTurnedAwayAtOnce) {
    if (shared->observer != nullptr) shared->observer->on_connections(open);
    const bool welcome = open <= shared->options.max_connections;
    asio::post(connection->executor(),
               [connection, welcome] { welcome ? connection->start() : connection->turn_away(); });
  }
  accept();
}

void Server::State::close_all(bool only_idle, std::string_view why) {
  std::vector<std::shared_ptr<Connection>> all;
  {
    const std::lock_guard lock(shared->mutex);
    all.assign(shared->open.begin(), shared->open.end());
  }
  for (const auto& connection : all) {
    connection->post(
        [only_idle, why](Connection& open) { only_idle ? open.close_if_idle() : open.cut(why); });
  }
}

Result<std::unique_ptr<Server>> Server::start(const ServerOptions& options, Handler handler,
                                              ServerObserver* observer) {
  std::unique_ptr<Server> server(new Server());
  server->state_ = std::make_unique<State>();
  State& state = *server->state_;
  state.shared->options = options;
  state.shared->handler = std::move(handler);
  state.shared->observer = observer;
  std::random_device random;
  state.shared->id_prefix = (uint64_t{random()} << 32) | random();
  state.accepting.emplace(asio::make_strand(state.shared->io));
  KVANT_TRY(state.listen());
  asio::post(*state.accepting, [&state] { state.accept(); });
  for (int i = 0; i < std::max(1, options.num_threads); ++i) {
    state.threads.emplace_back([shared = state.shared] { run_io(shared->io); });
  }
  return server;
}

Server::~Server() {
  if (state_ == nullptr) return;
  if (!state_->threads.empty()) drain(std::chrono::milliseconds(0));
  // Without acceptor and connections there is no work left and run() returns.
  for (std::thread& thread : state_->threads) thread.join();
}

int Server::port() const {
  return state_->port;
}

std::string Server::address() const {
  return state_->address;
}

int64_t Server::connections() const {
  const std::lock_guard lock(state_->shared->mutex);
  return static_cast<int64_t>(state_->shared->open.size());
}

void Server::stop_accepting() {
  State& state = *state_;
  if (!state.shared->draining.exchange(true)) {
    asio::post(*state.accepting, [&state] {
      beast::error_code error;
      state.acceptor.close(error);
      state.retry.cancel();
    });
  }
  state.close_all(true, {});
}

bool Server::drain(std::chrono::milliseconds timeout) {
  stop_accepting();
  State& state = *state_;
  ServerState& shared = *state.shared;
  std::unique_lock lock(shared.mutex);
  if (shared.gone.wait_for(lock, timeout, [&] { return shared.open.empty(); })) return true;
  lock.unlock();
  state.close_all(false, "drain");
  lock.lock();
  shared.gone.wait(lock, [&] { return shared.open.empty(); });
  return false;
}

}  // namespace kvant::serve::http
