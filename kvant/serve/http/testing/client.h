// A small blocking HTTP client over POSIX sockets, for tests only: bytes can be sent as oddly as a
// test likes.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>

namespace kvant::serve::http::testing {

struct Reply {
  int status = 0;  // 0: the connection ended before a head had come
  std::string head;
  std::string body;
  bool complete = false;  // by Content-Length or the last chunk

  std::string header(std::string_view name) const {
    const size_t at = head.find("\r\n" + std::string(name) + ": ");
    if (at == std::string::npos) return {};
    const size_t start = at + 4 + name.size();
    return head.substr(start, head.find("\r\n", start) - start);
  }
};

class Client {
 public:
  // `receive_buffer` 0: the system's. `from`: the client's own loopback address; null: any.
  explicit Client(int port, int receive_buffer = 0, const char* from = nullptr)
      : fd_(::socket(AF_INET, SOCK_STREAM, 0)) {
    if (from != nullptr) {
      sockaddr_in own{};
      own.sin_family = AF_INET;
      ::inet_pton(AF_INET, from, &own.sin_addr);
      if (::bind(fd_, reinterpret_cast<const sockaddr*>(&own), sizeof own) != 0) return;
    }
    if (receive_buffer > 0) {
      ::setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer);
    }
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    ::inet_pton(AF_INET, "127.0.0.1", &address.sin_addr);
    connected_ = ::connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
  }
  Client(Client&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;
  ~Client() { close(); }

  bool connected() const { return connected_; }
  void close() {
    if (fd_ >= 0) ::close(std::exchange(fd_, -1));
  }
  void shutdown_sending() { ::shutdown(fd_, SHUT_WR); }

  bool send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t sent = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent <= 0) return false;
      bytes.remove_prefix(static_cast<size_t>(sent));
    }
    return true;
  }
  bool request(std::string_view method, std::string_view target, std::string_view body = {},
               std::string_view headers = {}) {
    std::string bytes = std::string(method) + " " + std::string(target) +
                        " HTTP/1.1\r\nHost: test\r\n" + std::string(headers);
    if (!body.empty() || method == "POST") {
      bytes += "Content-Type: application/json\r\nContent-Length: " + std::to_string(body.size()) +
               "\r\n";
    }
    bytes += "\r\n";
    return send(bytes + std::string(body));
  }

  // More bytes into the buffer; false at the end, on an error, or after `timeout_ms`.
  bool receive(int timeout_ms = 10'000) {
    pollfd wait{.fd = fd_, .events = POLLIN, .revents = 0};
    if (::poll(&wait, 1, timeout_ms) <= 0) return false;
    char bytes[16384];
    const ssize_t got = ::recv(fd_, bytes, sizeof bytes, 0);
    if (got <= 0) {
      ended_ = true;
      return false;
    }
    buffer_.append(bytes, static_cast<size_t>(got));
    return true;
  }
  // Reads until `text` stands in what came; false if it does not come.
  bool receive_until(std::string_view text, int timeout_ms = 10'000) {
    while (buffer_.find(text) == std::string::npos) {
      if (!receive(timeout_ms)) return false;
    }
    return true;
  }
  bool receive_end(int timeout_ms = 10'000) {
    while (receive(timeout_ms)) {
    }
    return ended_;
  }

  // The next response. Chunks are joined.
  Reply reply(int timeout_ms = 10'000, bool has_body = true) {
    Reply reply;
    do {  // skips "100 Continue"
      if (!receive_until("\r\n\r\n", timeout_ms)) return reply;
      const size_t end = buffer_.find("\r\n\r\n") + 4;
      reply.head = buffer_.substr(0, end);
      buffer_.erase(0, end);
      reply.status = std::atoi(reply.head.c_str() + 9);
    } while (reply.status == 100);
    if (!has_body) {
      reply.complete = true;
    } else if (reply.header("Transfer-Encoding") == "chunked") {
      while (!reply.complete && read_chunk(reply, timeout_ms)) {
      }
    } else {
      const size_t length = std::strtoul(reply.header("Content-Length").c_str(), nullptr, 10);
      while (buffer_.size() < length && receive(timeout_ms)) {
      }
      reply.complete = buffer_.size() >= length;
      reply.body = buffer_.substr(0, length);
      buffer_.erase(0, length);
    }
    return reply;
  }
  const std::string& buffer() const { return buffer_; }

 private:
  bool read_chunk(Reply& reply, int timeout_ms) {
    if (!receive_until("\r\n", timeout_ms)) return false;
    const size_t line = buffer_.find("\r\n");
    const size_t size = std::strtoul(buffer_.c_str(), nullptr, 16);
    while (buffer_.size() < line + 2 + size + 2) {
      if (!receive(timeout_ms)) return false;
    }
    reply.body += buffer_.substr(line + 2, size);
    buffer_.erase(0, line + 2 + size + 2);
    reply.complete = size == 0;
    return true;
  }

  int fd_;
  bool connected_ = false;
  bool ended_ = false;
  std::string buffer_;
};

}  // namespace kvant::serve::http::testing
