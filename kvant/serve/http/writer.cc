#include "kvant/serve/http/connection.h"

#include <fmt/format.h>
#include <utility>

#include <boost/asio/post.hpp>

#include <ctime>

namespace kvant::serve::http {
namespace {

std::string date_text() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  char text[64];
  const size_t size = std::strftime(text, sizeof text, "%a, %d %b %Y %H:%M:%S GMT", &parts);
  return {text, size};
}

std::string_view error_type(int status) {
  return status < 500 ? "invalid_request_error" : "server_error";
}

// The writer that a handler gets: one of it exists per request, and dropping it unanswered is
// answered by 500.
class Writer : public ResponseWriter {
 public:
  Writer(std::shared_ptr<Connection> connection, std::shared_ptr<Exchange> exchange,
         bool keep_alive)
      : connection_(std::move(connection)),
        exchange_(std::move(exchange)),
        keep_alive_(keep_alive) {}

  ~Writer() override {
    bool unfinished = false;
    {
      const std::lock_guard lock(exchange_->mutex);
      unfinished = exchange_->begun && !exchange_->ended && !exchange_->closed;
      if (!exchange_->begun && !exchange_->closed) {
        send_locked({.status = 500,
                     .content_type = "application/json",
                     .body = error_body(500, "the request was dropped; this is a bug")});
      }
    }
    if (unfinished) cut("unfinished response");
  }

  void send(HttpResponse response) override {
    std::function<void()> unneeded;  // may hold the last reference to what holds this writer
    const std::lock_guard lock(exchange_->mutex);
    if (exchange_->begun || exchange_->closed) return;
    unneeded = std::move(exchange_->on_closed);
    send_locked(response);
  }

  void begin(HttpResponse head) override {
    const std::lock_guard lock(exchange_->mutex);
    Exchange& exchange = *exchange_;
    if (exchange.begun || exchange.closed) return;
    exchange.begun = true;
    exchange.status = head.status;
    connection_->queue(
        response_head(head, exchange.request.get(), -1, !exchange.http_1_0, keep_alive_), 0);
  }

  bool write(std::string piece) override {
    bool fits = true;
    {
      const std::lock_guard lock(exchange_->mutex);
      Exchange& exchange = *exchange_;
      if (exchange.closed || !exchange.begun || exchange.ended) return false;
      if (piece.empty() || exchange.head_only) return true;
      exchange.body_bytes += static_cast<int64_t>(piece.size());
      if (!exchange.http_1_0) piece = fmt::format("{:x}\r\n{}\r\n", piece.size(), piece);
      fits = connection_->queue(piece, connection_->max_unsent_bytes());
    }
    if (!fits) cut("slow reader");
    return fits;
  }

  void end() override {
    std::function<void()> unneeded;
    const std::lock_guard lock(exchange_->mutex);
    Exchange& exchange = *exchange_;
    if (exchange.closed || !exchange.begun || exchange.ended) return;
    exchange.ended = true;
    unneeded = std::move(exchange.on_closed);
    connection_->queue(exchange.http_1_0 || exchange.head_only ? "" : "0\r\n\r\n", 0);
  }

  void note(std::string text) override {
    const std::lock_guard lock(exchange_->mutex);
    exchange_->note = std::move(text);
  }

  bool closed() const override {
    const std::lock_guard lock(exchange_->mutex);
    return exchange_->closed;
  }

  void on_closed(std::function<void()> action) override {
    {
      const std::lock_guard lock(exchange_->mutex);
      if (exchange_->ended) return;
      if (!exchange_->closed) {
        std::swap(exchange_->on_closed, action);
        return;
      }
    }
    if (action) action();
  }

 private:
  void send_locked(const HttpResponse& response) {
    Exchange& exchange = *exchange_;
    exchange.begun = exchange.ended = true;
    exchange.status = response.status;
    const auto length = static_cast<int64_t>(response.body.size());
    std::string bytes = response_head(response, exchange.request.get(), length, false, keep_alive_);
    if (!exchange.head_only) {
      exchange.body_bytes = length;
      bytes += response.body;
    }
    connection_->queue(bytes, 0);
  }

  void cut(std::string_view why) {
    connection_->post([why](Connection& connection) { connection.cut(why); });
  }

  std::shared_ptr<Connection> connection_;
  std::shared_ptr<Exchange> exchange_;
  bool keep_alive_;
};

}  // namespace

std::string error_body(int status, std::string_view message) {
  return fmt::format(R"({{"error":{{"message":"{}","type":"{}","param":null,"code":{}}}}})",
                     message, error_type(status), status);
}

std::string response_head(const HttpResponse& response, const HttpRequest* request, int64_t length,
                          bool chunked, bool keep_alive) {
  std::string head =
      fmt::format("HTTP/1.1 {} {}\r\nDate: {}\r\nContent-Type: {}\r\n", response.status,
                  status_text(response.status), date_text(), response.content_type);
  if (length >= 0) {
    head += fmt::format("Content-Length: {}\r\n", length);
  } else if (chunked) {
    head += "Transfer-Encoding: chunked\r\n";
  }
  if (request != nullptr) head += fmt::format("X-Request-Id: {}\r\n", request->id);
  for (const Header& header : response.headers) {
    head += fmt::format("{}: {}\r\n", header.name, header.value);
  }
  head += keep_alive ? "Connection: keep-alive\r\n\r\n" : "Connection: close\r\n\r\n";
  return head;
}

std::shared_ptr<ResponseWriter> make_writer(std::shared_ptr<Connection> connection,
                                            std::shared_ptr<Exchange> exchange, bool keep_alive) {
  return std::make_shared<Writer>(std::move(connection), std::move(exchange), keep_alive);
}

}  // namespace kvant::serve::http
