// What an HTTP server hears and says: a request, a response, and the way to answer later or piece
// by piece. No library's types: server.cc speaks HTTP, everybody else sees this.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvant::serve::http {

using Clock = std::chrono::steady_clock;

struct Header {
  std::string name;
  std::string value;
};

struct HttpRequest {
  std::string method;  // "GET", "POST", ...
  std::string path;    // as sent, without the query
  std::string query;   // behind the '?', without it
  std::vector<Header> headers;
  std::string body;
  std::string peer;              // "127.0.0.1:41234"
  std::string id;                // X-Request-Id as sent, or one of the server's own
  Clock::time_point received{};  // when its first byte was read

  // The value of the first header of that name, in any case; empty if there is none.
  std::string_view header(std::string_view name) const;
};

struct HttpResponse {
  int status = 200;
  std::string content_type = "application/json";
  std::string body = {};
  std::vector<Header> headers = {};  // beside Content-Type, Content-Length and X-Request-Id
};

// Answers one request: send() once, or begin() once, write() any number of times and end(). From
// any thread; calls after the client has gone do nothing.
class ResponseWriter {
 public:
  virtual ~ResponseWriter() = default;

  virtual void send(HttpResponse response) = 0;

  // A stream: `head` without a body. Each piece is sent as soon as the connection takes it.
  virtual void begin(HttpResponse head) = 0;
  // False: nobody reads any more, because the client left or was cut off (it read so slowly that
  // more than ServerOptions::max_unsent_bytes waited).
  virtual bool write(std::string piece) = 0;
  virtual void end() = 0;

  // Words for the access log, shown behind the request's.
  virtual void note(std::string text) = 0;

  virtual bool closed() const = 0;
  // `action` is called once, on an I/O thread, if the connection ends before the response has; at
  // once if it already has. Replaces an earlier one. An empty function withdraws it.
  virtual void on_closed(std::function<void()> action) = 0;
};

// Called on an I/O thread for each request: answer at once or keep the writer. What lasts longer
// than a millisecond belongs on another thread, because every connection waits meanwhile.
using Handler = std::function<void(std::shared_ptr<const HttpRequest> request,
                                   std::shared_ptr<ResponseWriter> writer)>;

// "text/plain" and so on are the caller's; this is the reason phrase: "OK", "Not Found".
std::string_view status_text(int status);
// The text of a query or path with %XX (and '+' in queries) replaced; broken escapes stay.
std::string decode_percent(std::string_view text, bool plus_is_space);
// The value of `name` in a query "a=1&b=2", decoded; empty if it is not there.
std::string query_value(std::string_view query, std::string_view name);

}  // namespace kvant::serve::http
