#include "kvant/serve/http/connection.h"

#include <fmt/format.h>
#include <utility>

#include <boost/asio/post.hpp>
#include <boost/asio/write.hpp>

namespace kvant::serve::http {
namespace {

namespace bhttp = beast::http;

constexpr size_t kReadBytes = 64 << 10;
// What is read and thrown away after the last response, so that the client gets to read it: closing
// with unread input resets the connection and may destroy the response on its way.
constexpr size_t kMaxLingerBytes = 64 << 20;
constexpr std::chrono::milliseconds kLingerTime{3000};

bool is_token_text(std::string_view text) {
  if (text.empty() || text.size() > 128) return false;
  for (const char c : text) {
    if (c < 0x21 || c > 0x7e) return false;
  }
  return true;
}

}  // namespace

Connection::Connection(std::shared_ptr<ServerState> server, Tcp::socket socket)
    : server_(std::move(server)),
      socket_(std::move(socket)),
      deadline_(socket_.get_executor()),
      write_deadline_(socket_.get_executor()),
      buffer_(server_->options.max_header_bytes + kReadBytes) {
  beast::error_code error;
  socket_.set_option(Tcp::no_delay(true), error);
  const Tcp::endpoint peer = socket_.remote_endpoint(error);
  peer_ = error ? "?" : fmt::format("{}:{}", peer.address().to_string(), peer.port());
}

Tcp::socket::executor_type Connection::executor() {
  return socket_.get_executor();
}

size_t Connection::max_unsent_bytes() const {
  return server_->options.max_unsent_bytes;
}

void Connection::start() {
  if (server_->draining) {  // accepted before, but not seen by close_if_idle()
    close(false, {});
    return;
  }
  arm(server_->options.header_timeout);  // who connects is expected to ask soon
  read_on();
}

void Connection::turn_away() {
  phase_ = Phase::kHeader;
  refuse(503, "too many connections; try again later");
  read_on();
}

void Connection::close_if_idle() {
  close_after_ = true;
  if (phase_ == Phase::kIdle && buffer_.size() == 0) close(false, {});
}

void Connection::cut(std::string_view why) {
  close(false, why);
}

// ---- reading

void Connection::read_on() {
  if (reading_ || phase_ == Phase::kClosed) return;
  if (phase_ == Phase::kLingering) buffer_.consume(buffer_.size());
  const size_t room = buffer_.max_size() - buffer_.size();
  if (room == 0) return;  // pipelined requests fill it; parse() goes on when they have been taken
  reading_ = true;
  socket_.async_read_some(buffer_.prepare(std::min(room, kReadBytes)),
                          [self = shared_from_this()](beast::error_code error, size_t bytes) {
                            self->on_read(error, bytes);
                          });
}

void Connection::on_read(beast::error_code error, size_t bytes) {
  reading_ = false;
  if (phase_ == Phase::kClosed) return;
  if (error) {
    bool answered = false;
    if (exchange_ && error == asio::error::eof) {
      const std::lock_guard lock(exchange_->mutex);
      answered = exchange_->ended;
    }
    // A client that closes its side behind the request still gets an answer that is already there.
    if (answered) {
      close_after_ = true;
      return;
    }
    close(exchange_ != nullptr, {});
    return;
  }
  buffer_.commit(bytes);
  if (phase_ == Phase::kLingering) {
    lingered_bytes_ += bytes;
    if (lingered_bytes_ > kMaxLingerBytes) {
      close(false, {});
      return;
    }
  } else {
    parse();
  }
  read_on();
}

void Connection::parse() {
  while (buffer_.size() > 0) {
    bool more = false;
    switch (phase_) {
      case Phase::kIdle:
        begin_request();
        more = true;
        break;
      case Phase::kHeader: more = parse_header(); break;
      case Phase::kBody: more = parse_body(); break;
      default: return;
    }
    if (!more) return;
  }
}

void Connection::begin_request() {
  phase_ = Phase::kHeader;
  received_ = Clock::now();
  parser_.emplace();
  parser_->header_limit(static_cast<uint32_t>(server_->options.max_header_bytes));
  parser_->body_limit(server_->options.max_body_bytes);
  arm(server_->options.header_timeout);
}

// True if parsing goes on with what is in the buffer.
bool Connection::parse_header() {
  beast::error_code error;
  buffer_.consume(parser_->put(buffer_.data(), error));
  if (error == bhttp::error::need_more) return false;
  if (error == bhttp::error::header_limit) {
    refuse(431,
           fmt::format("the headers are longer than {} bytes", server_->options.max_header_bytes));
    return false;
  }
  if (error == bhttp::error::body_limit) {
    refuse(413, fmt::format("the body is longer than {} bytes", server_->options.max_body_bytes));
    return false;
  }
  if (error == bhttp::error::bad_version) {
    refuse(505, "the HTTP version is not 1.0 or 1.1");
    return false;
  }
  if (error) {
    refuse(400, fmt::format("the request is not HTTP: {}", error.message()));
    return false;
  }
  if (!parser_->is_header_done()) return true;
  phase_ = Phase::kBody;
  parser_->eager(true);
  if (parser_->is_done()) {
    dispatch();
    return true;
  }
  arm(server_->options.body_timeout);
  if (beast::iequals(parser_->get()[bhttp::field::expect], "100-continue")) {
    const std::lock_guard lock(out_mutex_);
    out_ += "HTTP/1.1 100 Continue\r\n\r\n";
    if (!std::exchange(flush_posted_, true)) {
      post([](Connection& self) { self.flush(); });
    }
  }
  return true;
}

bool Connection::parse_body() {
  beast::error_code error;
  const size_t used = parser_->put(buffer_.data(), error);
  buffer_.consume(used);
  if (error == bhttp::error::body_limit) {
    refuse(413, fmt::format("the body is longer than {} bytes", server_->options.max_body_bytes));
    return false;
  }
  if (error && error != bhttp::error::need_more) {
    refuse(400, fmt::format("the body is not HTTP: {}", error.message()));
    return false;
  }
  if (!hold_body(parser_->get().body().size())) {
    refuse(503, "too many large requests at once; try again later");
    return false;
  }
  if (parser_->is_done()) {
    dispatch();
    return true;
  }
  return used > 0 && !error;
}

// Counts what bodies hold, all connections together.
bool Connection::hold_body(size_t bytes) {
  const auto more = static_cast<int64_t>(bytes) - held_body_bytes_;
  held_body_bytes_ += more;
  const int64_t all = server_->body_bytes.fetch_add(more) + more;
  return more <= 0 || all <= server_->options.max_bodies_bytes;
}

void Connection::dispatch() {
  deadline_.cancel();
  phase_ = Phase::kAnswering;
  bhttp::request<bhttp::string_body> message = parser_->release();
  parser_.reset();
  const std::shared_ptr<HttpRequest> request(
      new HttpRequest,
      [server = server_, bytes = std::exchange(held_body_bytes_, 0)](const HttpRequest* finished) {
        delete finished;
        server->body_bytes -= bytes;
      });
  request->method = std::string(message.method_string());
  const std::string target(message.target());
  const size_t question = target.find('?');
  request->path = target.substr(0, question);
  if (question != std::string::npos) request->query = target.substr(question + 1);
  for (const auto& field : message) {
    request->headers.push_back({std::string(field.name_string()), std::string(field.value())});
  }
  request->body = std::move(message.body());
  request->peer = peer_;
  request->received = received_;
  const std::string_view id = request->header("X-Request-Id");
  request->id = is_token_text(id) ? std::string(id)
                                  : fmt::format("{:016x}{:08x}", server_->id_prefix,
                                                server_->next_id.fetch_add(1));
  if (server_->draining || !message.keep_alive()) close_after_ = true;

  exchange_ = std::make_shared<Exchange>();
  exchange_->request = request;
  exchange_->head_only = request->method == "HEAD";
  exchange_->http_1_0 = message.version() < 11;
  if (exchange_->http_1_0) close_after_ = true;
  auto writer = make_writer(shared_from_this(), exchange_, !close_after_);
  try {
    server_->handler(request, writer);
  } catch (const std::exception& exception) {
    writer->send({.status = 500,
                  .content_type = "application/json",
                  .body = error_body(500, "the server failed on this request; this is a bug")});
  }
}

void Connection::refuse(int status, std::string_view message) {
  if (server_->observer != nullptr) server_->observer->on_refused(status, peer_);
  deadline_.cancel();
  parser_.reset();
  hold_body(0);
  phase_ = Phase::kAnswering;
  close_after_ = true;
  exchange_ = std::make_shared<Exchange>();
  const std::lock_guard lock(exchange_->mutex);
  exchange_->begun = exchange_->ended = true;
  exchange_->status = status;
  HttpResponse response{
      .status = status, .content_type = "application/json", .body = error_body(status, message)};
  if (status == 503) response.headers.push_back({"Retry-After", "1"});
  queue(response_head(response, nullptr, static_cast<int64_t>(response.body.size()), false, false) +
            response.body,
        0);
}

void Connection::arm(std::chrono::milliseconds time) {
  deadline_.expires_after(time);
  deadline_.async_wait([self = shared_from_this()](beast::error_code error) {
    // A wait that was already due when it was replaced comes without an error.
    if (!error && self->deadline_.expiry() <= Clock::now()) self->on_deadline();
  });
}

void Connection::on_deadline() {
  switch (phase_) {
    case Phase::kHeader:
    case Phase::kBody: refuse(408, "the request did not arrive in time"); break;
    case Phase::kIdle:
    case Phase::kLingering: close(false, {}); break;
    case Phase::kAnswering:
    case Phase::kClosed: break;
  }
}

// ---- writing

bool Connection::queue(std::string_view bytes, size_t limit) {
  const std::lock_guard lock(out_mutex_);
  if (limit > 0 && out_.size() + in_flight_bytes_ + bytes.size() > limit) return false;
  out_ += bytes;
  out_times_.push_back(Clock::now());
  if (!std::exchange(flush_posted_, true)) {
    post([](Connection& self) { self.flush(); });
  }
  return true;
}

void Connection::flush() {
  if (phase_ == Phase::kClosed) return;
  {
    const std::lock_guard lock(out_mutex_);
    in_flight_ = std::move(out_);
    in_flight_times_ = std::move(out_times_);
    out_.clear();
    out_times_.clear();
    in_flight_bytes_ = in_flight_.size();
  }
  write_deadline_.expires_after(server_->options.write_timeout);
  write_deadline_.async_wait([self = shared_from_this()](beast::error_code error) {
    if (!error && self->write_deadline_.expiry() <= Clock::now()) self->cut("write timeout");
  });
  asio::async_write(
      socket_, asio::buffer(in_flight_),
      [self = shared_from_this()](beast::error_code error, size_t) { self->on_flushed(error); });
}

void Connection::on_flushed(beast::error_code error) {
  if (phase_ == Phase::kClosed) return;
  if (error) {
    close(true, {});
    return;
  }
  write_deadline_.expires_at(Clock::time_point::max());
  if (server_->observer != nullptr) {
    const Clock::time_point now = Clock::now();
    for (const Clock::time_point time : in_flight_times_) {
      server_->observer->on_written(std::chrono::duration<double>(now - time).count());
    }
  }
  bool ended = false;
  if (exchange_) {
    const std::lock_guard lock(exchange_->mutex);
    ended = exchange_->ended;
  }
  bool more = false;
  {
    const std::lock_guard lock(out_mutex_);
    in_flight_bytes_ = 0;
    more = !out_times_.empty() || !out_.empty();
    if (!more) flush_posted_ = false;
  }
  if (more) {
    flush();
  } else if (ended) {
    finish_response();
  }
}

// All of it is with the operating system.
void Connection::finish_response() {
  report(false, {});
  exchange_.reset();
  if (close_after_ || server_->draining) {
    linger();
    return;
  }
  phase_ = Phase::kIdle;
  arm(server_->options.idle_timeout);
  parse();
  read_on();
}

void Connection::report(bool client_left, std::string_view cut_by) {
  if (server_->observer == nullptr || !exchange_->request) return;
  AccessRecord record{.request = exchange_->request, .client_left = client_left, .cut_by = cut_by};
  {
    const std::lock_guard lock(exchange_->mutex);
    record.status = exchange_->status;
    record.note = exchange_->note;
    record.bytes = exchange_->body_bytes;
  }
  record.seconds = std::chrono::duration<double>(Clock::now() - record.request->received).count();
  server_->observer->on_response(record);
}

void Connection::linger() {
  phase_ = Phase::kLingering;
  beast::error_code error;
  socket_.shutdown(Tcp::socket::shutdown_send, error);
  if (error) {
    close(false, {});
    return;
  }
  arm(kLingerTime);
  read_on();
}

void Connection::close(bool client_left, std::string_view cut_by) {
  if (phase_ == Phase::kClosed) return;
  phase_ = Phase::kClosed;
  deadline_.cancel();
  write_deadline_.cancel();
  beast::error_code error;
  socket_.close(error);
  hold_body(0);
  if (exchange_) {
    std::function<void()> action;
    {
      const std::lock_guard lock(exchange_->mutex);
      exchange_->closed = true;
      action = std::exchange(exchange_->on_closed, nullptr);
    }
    report(client_left, cut_by);
    if (action) action();
    exchange_.reset();
  }
  int64_t open = 0;
  {
    const std::lock_guard lock(server_->mutex);
    server_->open.erase(shared_from_this());
    open = static_cast<int64_t>(server_->open.size());
    server_->gone.notify_all();
  }
  if (server_->observer != nullptr) server_->observer->on_connections(open);
}

}  // namespace kvant::serve::http
