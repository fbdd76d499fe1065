// Bodies of /v1/completions and /v1/chat/completions: a request that parses keeps its limits, an
// error is one that a client can be told. The first byte chooses the interface.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <variant>

#include "kvant/serve/openai/generation_request.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvant::serve::openai;
  if (size == 0) return 0;
  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  const kvant::Result<Json> body = parse_json(text);
  if (!body) {
    if (!parse_json(error_body(to_api_error(body.error())))) std::abort();
    return 0;
  }
  const RequestLimits limits{.sampling = {.vocab_size = 100}, .max_model_len = 1000};
  const ParsedRequest parsed =
      data[0] % 2 == 0 ? parse_completion(*body, limits) : parse_chat(*body, limits);
  if (const auto* error = std::get_if<ApiError>(&parsed)) {
    if (error->status < 400 || error->status > 499) std::abort();
    if (!parse_json(error_body(*error))) std::abort();
    return 0;
  }
  const auto& request = std::get<GenerationRequest>(parsed);
  if (!request.sampling.check(limits.sampling)) std::abort();
  if (request.chat != (data[0] % 2 == 1)) std::abort();
  if (request.chat) {
    const auto messages = parse_json(request.messages_json);
    if (!messages || !messages->is_array() || messages->empty()) std::abort();
  } else if (request.prompts.empty()) {
    std::abort();
  }
  return 0;
}
