// An HTTP/1.1 server for few routes and many streams: keep-alive, limits on everything that a
// client can make it hold or wait for, server-sent events from any thread.
//
//   KVANT_ASSIGN(auto server, Server::start({.port = 8000}, handler));
//   ...
//   server->drain(30s);   // stops accepting, lets responses end
//
// Requests of one connection are answered in order; while one is answered the connection is read
// on, so that a client that leaves is noticed at once (a client that only closes its sending side
// counts as gone). HTTP/1.1 (RFC 9112) without upgrade; TLS is a reverse proxy's.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "kvant/base/result.h"
#include "kvant/serve/http/message.h"

namespace kvant::serve::http {

struct ServerOptions {
  std::string host = "127.0.0.1";  // an address, or a name that has one
  int port = 8000;                 // 0: any free one
  int num_threads = 1;             // for reading and writing
  int64_t max_connections = 1024;  // more are told 503
  size_t max_header_bytes = 16 << 10;
  size_t max_body_bytes = 8 << 20;
  int64_t max_bodies_bytes = 256 << 20;  // of all requests being read or answered
  size_t max_unsent_bytes = 1 << 20;  // of one stream; a reader that falls behind so far is cut off
  std::chrono::milliseconds header_timeout{10'000};  // first byte to the end of the headers
  std::chrono::milliseconds body_timeout{60'000};    // end of the headers to the end of the body
  std::chrono::milliseconds idle_timeout{75'000};    // between requests
  std::chrono::milliseconds write_timeout{30'000};   // for a client to take what was sent
};

// One answered request, for the access log.
struct AccessRecord {
  std::shared_ptr<const HttpRequest> request;
  int status = 0;
  std::string note = {};      // of ResponseWriter::note
  int64_t bytes = 0;          // of the response's body
  double seconds = 0;         // from its first byte read to its last byte written
  bool client_left = false;   // before the end of the response
  std::string_view cut_by{};  // what the server ended it for, e.g. "slow reader"; else empty
};

// Who watches: metrics and logs. Called on I/O threads; must be quick.
class ServerObserver {
 public:
  virtual ~ServerObserver() = default;
  virtual void on_connections(int64_t open) { static_cast<void>(open); }
  // A request was refused before any handler saw it: 400, 408, 413, 431, 503.
  virtual void on_refused(int status, std::string_view peer) {
    static_cast<void>(status), static_cast<void>(peer);
  }
  // A piece of a stream, or a response, has been handed to the operating system so long after
  // write() or send() was called.
  virtual void on_written(double seconds) { static_cast<void>(seconds); }
  virtual void on_response(const AccessRecord& record) { static_cast<void>(record); }
};

class Server {
 public:
  // Listens and serves on threads of its own. kInvalidArgument (host), kIoError (the port is taken,
  // may not be used, ...), each with the address. `observer` may be null and must outlive it.
  static Result<std::unique_ptr<Server>> start(const ServerOptions& options, Handler handler,
                                               ServerObserver* observer = nullptr);
  // Cuts what is open.
  ~Server();

  // ---- any thread ----
  int port() const;             // the real one
  std::string address() const;  // "127.0.0.1:8000", "[::1]:8000"
  int64_t connections() const;
  // Listens no more and closes idle connections; the others end with the response that they get.
  void stop_accepting();
  // stop_accepting(), waits for responses to end, after `timeout` cuts the rest. True if nothing
  // had to be cut.
  bool drain(std::chrono::milliseconds timeout);

 private:
  Server() = default;
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvant::serve::http
