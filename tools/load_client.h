// Sends a workload to an OpenAI-compatible server and takes the times: many streams in one thread.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/base/result.h"
#include "tools/load_workload.h"

namespace kvant::tools {

// Where a server is: "http://127.0.0.1:8000". Only http; kInvalidArgument otherwise.
struct ServerAddress {
  std::string host;
  std::string port;
  std::string path;  // in front of /v1, mostly empty
  static Result<ServerAddress> parse(std::string_view url);
};

struct LoadOptions {
  ServerAddress server;
  std::string api_key = {};
  std::string model;        // of the requests' bodies
  int64_t concurrency = 0;  // requests under way at most; 0: no limit
  double timeout_seconds = 600;
  bool wants_token_ids = false;  // of answers, which the next turns repeat
};

// Of one request. Times are seconds since the start of the load.
struct LoadResult {
  size_t index = 0;
  int turn = 0;
  std::string error = {};  // empty: the stream came whole; else "HTTP 429", "timeout", ...
  double sent = 0;
  double first_token = 0;
  double last_token = 0;
  double finished = 0;
  std::vector<double> gaps = {};  // between pieces of the answer, seconds
  int64_t asked_prompt_tokens = 0;
  int64_t asked_output_tokens = 0;
  int64_t prompt_tokens = -1;  // of the server's usage; -1: it said nothing
  int64_t output_tokens = -1;
  int64_t cached_tokens = 0;

  bool counts_agree() const {
    return prompt_tokens == asked_prompt_tokens && output_tokens == asked_output_tokens;
  }
};

// The name of the first model that the server lists. kIoError if it cannot be asked.
Result<std::string> first_model(const LoadOptions& options);

// Called a few times a second: requests that ended and that are under way. False stops the load.
using LoadProgress = std::function<bool(size_t done, size_t running)>;

// Runs the whole workload. kNotFound for a host without an address, kIoError if this machine has no
// more sockets, kCancelled. What a server does wrong is in the results.
Result<std::vector<LoadResult>> run_load(const Workload& workload, const LoadOptions& options,
                                         const LoadProgress& progress);

}  // namespace kvant::tools
