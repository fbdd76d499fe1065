// One client's connection: reads requests one after another, hands them over, writes what comes
// back. Inside server.cc and connection.cc only, because it speaks Boost.
#pragma once

// <utility> first: Asio 1.74 uses std::exchange without including it.
#include <utility>

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_set>
#include <vector>

#include "kvant/serve/http/message.h"
#include "kvant/serve/http/server.h"

namespace kvant::serve::http {

namespace asio = boost::asio;
namespace beast = boost::beast;
using Tcp = asio::ip::tcp;

class Connection;

// What all connections of a server share. Connections hold it, so the io_context outlives their
// sockets wherever a writer is kept.
struct ServerState {
  asio::io_context io;
  ServerOptions options;
  Handler handler;
  ServerObserver* observer = nullptr;
  std::atomic<bool> draining{false};
  std::atomic<uint64_t> next_id{1};
  uint64_t id_prefix = 0;
  std::atomic<int64_t> body_bytes{0};  // of requests that are being read or answered

  mutable std::mutex mutex;
  std::condition_variable gone;  // `open` has become smaller
  std::unordered_set<std::shared_ptr<Connection>> open;
};

// One request's answer on its way. Locked by `mutex`, since any thread may write.
struct Exchange {
  std::shared_ptr<const HttpRequest> request;
  bool head_only = false;  // HEAD
  bool http_1_0 = false;   // no chunks: the end of the connection ends the response
  std::mutex mutex;
  bool begun = false;
  bool ended = false;
  bool closed = false;
  int status = 0;
  int64_t body_bytes = 0;
  std::string note;
  std::function<void()> on_closed;
};

class Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(std::shared_ptr<ServerState> server, Tcp::socket socket);

  // ---- the connection's strand ----
  void start();
  // Answers without having read anything and closes.
  void turn_away();
  void close_if_idle();  // and after the response otherwise
  void cut(std::string_view why);
  // task(*this) on the strand, from any thread, if the connection is still there. It holds none:
  // what is posted after the last thread has left run() would keep the connection, and with it the
  // server's state and this very task, for good.
  template <typename Task>
  void post(Task&& task) {
    asio::post(socket_.get_executor(), [weak = weak_from_this(), task = std::forward<Task>(task)] {
      if (const auto self = weak.lock()) task(*self);
    });
  }

  // ---- any thread ----
  Tcp::socket::executor_type executor();
  size_t max_unsent_bytes() const;
  // Appends bytes to what is to be sent. `exchange`'s mutex is held by the caller.
  // False if more than the limit would wait unsent; 0: no limit.
  bool queue(std::string_view bytes, size_t limit);

 private:
  enum class Phase { kIdle, kHeader, kBody, kAnswering, kLingering, kClosed };

  void read_on();
  void on_read(beast::error_code error, size_t bytes);
  void parse();
  bool parse_header();
  bool parse_body();
  void begin_request();
  void dispatch();
  void refuse(int status, std::string_view message);
  void arm(std::chrono::milliseconds time);
  void on_deadline();
  void flush();
  void on_flushed(beast::error_code error);
  void finish_response();
  void report(bool client_left, std::string_view cut_by);
  bool hold_body(size_t bytes);
  void linger();
  void close(bool client_left, std::string_view cut_by);

  std::shared_ptr<ServerState> server_;
  Tcp::socket socket_;
  std::string peer_;
  asio::steady_timer deadline_;
  asio::steady_timer write_deadline_;
  beast::flat_buffer buffer_;
  std::optional<beast::http::request_parser<beast::http::string_body>> parser_;
  Phase phase_ = Phase::kIdle;
  bool reading_ = false;
  bool close_after_ = false;  // the response that is being sent is the last
  size_t lingered_bytes_ = 0;
  int64_t held_body_bytes_ = 0;
  Clock::time_point received_{};
  std::shared_ptr<Exchange> exchange_;

  std::mutex out_mutex_;  // taken inside Exchange::mutex, never around it
  std::string out_;       // waits
  std::vector<Clock::time_point> out_times_;
  bool flush_posted_ = false;
  size_t in_flight_bytes_ = 0;

  std::string in_flight_;  // being written; the strand's
  std::vector<Clock::time_point> in_flight_times_;
};

std::shared_ptr<ResponseWriter> make_writer(std::shared_ptr<Connection> connection,
                                            std::shared_ptr<Exchange> exchange, bool keep_alive);

// The head of a response, with an empty line behind it. `length` below 0: chunks, or the end of the
// connection.
std::string response_head(const HttpResponse& response, const HttpRequest* request, int64_t length,
                          bool chunked, bool keep_alive);

// The error object of OpenAI's API.
std::string error_body(int status, std::string_view message);

}  // namespace kvant::serve::http
