// Any bytes on a connection: the server answers with HTTP or hangs up, and serves the next client.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>

#include "kvant/serve/http/server.h"
#include "kvant/serve/http/testing/client.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvant::serve::http;
  static const std::unique_ptr<Server> server = [] {
    auto started = Server::start(
        {.port = 0, .max_header_bytes = 1024, .max_body_bytes = 1024},
        [](std::shared_ptr<const HttpRequest> request, std::shared_ptr<ResponseWriter> writer) {
          if (request->path.find('s') == std::string::npos) {
            writer->send({.body = request->method + std::string(request->header("X"))});
            return;
          }
          writer->begin({});
          writer->write(request->body);
          writer->write(decode_percent(request->query, true));
          writer->end();
        });
    if (!started) std::abort();
    return *std::move(started);
  }();
  // Ended connections keep their ports for a minute: one address would run out of them, and so does
  // the system in the end.
  static uint64_t runs = 0;
  const std::string from = "127.1." + std::to_string(runs++ / 10'000 % 250) + ".1";
  std::optional<testing::Client> connected;
  for (int i = 0; i < 160; ++i) {
    connected.emplace(server->port(), 0, from.c_str());
    if (connected->connected()) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  testing::Client& client = *connected;
  if (!client.connected()) std::abort();
  client.send({reinterpret_cast<const char*>(data), size});
  client.shutdown_sending();
  if (!client.receive_end(3000)) {
    // Neither an answer nor the end. With so many ports reused within their minute the system loses
    // a handshake now and then; a server that hears nobody is another matter.
    testing::Client other(server->port());
    other.send("GET / HTTP/1.1\r\nConnection: close\r\n\r\n");
    if (!other.receive_end(3000)) std::abort();
  }
  if (!client.buffer().empty() && !client.buffer().starts_with("HTTP/1.1 ")) std::abort();
  return 0;
}
