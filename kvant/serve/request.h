// One request to the engine: tokens in, tokens out, and what is said about it on the way.
//
// Text is not the engine's business: who submits a request encodes its prompt, decodes its tokens
// and looks for stop strings (`RequestListener::on_token` ends a request by returning false).
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/serve/sampling.h"
#include "kvant/serve/token_constraint.h"

namespace kvant::serve {

using Clock = std::chrono::steady_clock;

// Names a request within one engine; never used twice, never 0.
using RequestNumber = uint64_t;

enum class FinishReason {
  kStop,       // an end-of-generation token, a stop token, or the listener had enough
  kLength,     // max_tokens, or the longest sequence that the engine takes
  kCancelled,  // Engine::cancel: the client left
  kDeadline,   // the request's deadline passed
  kShutdown,   // the engine was destroyed or a drain ran out of time
  kError,      // see FinishRecord::error
};
// "stop", "length", "abort" (cancelled, deadline, shutdown) or "error": the names of the OpenAI and
// vLLM interfaces.
std::string_view finish_reason_name(FinishReason reason);

// What is known once the prompt has been computed.
struct PromptRecord {
  int64_t prompt_tokens = 0;
  // Of them, tokens whose pages were found in the prefix cache, at whatever tier.
  int64_t cached_tokens = 0;
  // Entry i is of prompt token i, the first one empty; only if prompt_logprobs was asked for.
  std::vector<SampledToken> logprobs;
};

// What a request came to; the numbers behind the metrics of serving.md 4.3.
struct FinishRecord {
  FinishReason reason = FinishReason::kStop;
  std::optional<Error> error;         // kError only
  std::optional<int32_t> stop_token;  // the stop or end token that ended it, if one did
  int64_t prompt_tokens = 0;
  int64_t cached_tokens = 0;
  int64_t output_tokens = 0;    // handed to the listener; end tokens count where they are shown
  int64_t drafted_tokens = 0;   // proposed by prompt lookup
  int64_t accepted_tokens = 0;  // of those, the model's own choice
  int num_preemptions = 0;
  // Since submission. Below 0: not reached.
  double queue_seconds = -1;        // until it was first scheduled
  double first_token_seconds = -1;  // until its first token
  double total_seconds = 0;
};

// Called on the engine thread, which serves every other request too: hand over and return. No call
// comes after on_finish, and none before Engine::submit has returned the request's number.
class RequestListener {
 public:
  virtual ~RequestListener() = default;
  virtual void on_prompt(const PromptRecord& record) { static_cast<void>(record); }
  // `ends` with the token that the model or the request ends with (an end-of-generation or stop
  // token). False: the request ends here with kStop; this token counts as its last.
  virtual bool on_token(const SampledToken& token, bool ends) = 0;
  virtual void on_finish(const FinishRecord& record) = 0;
};

struct Request {
  std::vector<int32_t> prompt;  // 1 to max_model_len - 1 ids of the vocabulary
  SamplingParams sampling;      // n, stop strings: not the engine's; it makes one sequence
  int choice = 0;               // which of the n choices this is: seeds count on from it
  std::shared_ptr<const ConstraintSource> constraint;  // may be null
  std::shared_ptr<RequestListener> listener;           // not null
  // Pages are shared only between requests of equal salt.
  std::string cache_salt;
  // Requests of one priority are served fairly between tenants: by tokens so far.
  std::string tenant;
  int priority = 0;  // lower is served first, and preempted last
  std::optional<Clock::time_point> deadline;
};

}  // namespace kvant::serve
