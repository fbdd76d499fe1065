// Any bytes on a connection: the server answers with HTTP or hangs up, and serves the next client.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>

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
  // The ports of one address would run out: ended connections keep theirs for a minute.
  static uint64_t runs = 0;
  const std::string from = "127.1." + std::to_string(runs++ / 10'000 % 250) + ".1";
  testing::Client client(server->port(), 0, from.c_str());
  if (!client.connected()) std::abort();
  client.send({reinterpret_cast<const char*>(data), size});
  client.shutdown_sending();
  if (!client.receive_end(5000)) std::abort();  // neither an answer nor the end
  if (!client.buffer().empty() && !client.buffer().starts_with("HTTP/1.1 ")) std::abort();
  return 0;
}
