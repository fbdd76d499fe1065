// Any bytes on a connection: the server answers with HTTP or hangs up, and serves the next client.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
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
            writer->send({.body = request->method + request->header("X").data()});
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
  testing::Client client(server->port());
  if (!client.connected()) std::abort();
  client.send({reinterpret_cast<const char*>(data), size});
  client.shutdown_sending();
  if (!client.receive_end(5000)) std::abort();  // neither an answer nor the end
  if (!client.buffer().empty() && !client.buffer().starts_with("HTTP/1.1 ")) std::abort();
  return 0;
}
