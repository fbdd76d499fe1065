// Text of a model, cut into pieces anywhere, as a stream: stop strings cut it where they would cut
// the whole, and every event is one line of JSON. The first two bytes choose the stop string.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "kvant/serve/openai/format.h"
#include "kvant/serve/openai/text_stream.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvant::serve::openai;
  if (size < 3) return 0;
  const std::string_view text(reinterpret_cast<const char*>(data) + 2, size - 2);
  const std::string stop(text.substr(data[0] % text.size(), 1 + data[1] % 8));
  static const ChunkWriter chunks(
      {.id = "cmpl-\"1", .object = "text_completion", .created = 1, .model = "m\xff"});
  StopStrings stops({stop}, false);
  std::string shown;
  const auto send = [&](const std::string& piece) {
    shown += piece;
    const std::string event =
        chunks.choice(0, "\"text\":" + quote_json(piece) + ",\"logprobs\":null", nullptr);
    if (!event.starts_with("data: ") || event.find('\n') != event.size() - 2) std::abort();
    const auto json = parse_json(std::string_view(event).substr(6));
    if (!json || !(*json)["choices"][0]["text"].is_string()) std::abort();
  };
  for (size_t at = 0; at < text.size();) {
    const size_t step = 1 + static_cast<unsigned char>(text[at]) % 5;
    send(stops.push(text.substr(at, step)));
    at += step;
  }
  send(stops.finish());
  if (shown != text.substr(0, text.find(stop))) std::abort();  // it is always in the text
  if (!stops.found()) std::abort();
  return 0;
}
