// What `kvant bench serve` sends: prompts of token ids, made from a seed or from a trace. The same
// options give the same prompts and the same times everywhere. Single-thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kvant/base/result.h"

namespace kvant::tools {

enum class WorkloadKind {
  kRandom,        // prompts that share nothing
  kSharedPrefix,  // a random part behind one of a few prefixes
  kMultiTurn,     // conversations behind one shared prefix; each turn repeats those before it
  kTrace,         // lengths, times and shared blocks of a Mooncake trace (JSON lines)
};

struct WorkloadOptions {
  WorkloadKind kind = WorkloadKind::kRandom;
  int64_t num_requests = 100;  // conversations of kMultiTurn; at most so many lines of a trace
  double request_rate = 0;     // arrivals per second, Poisson; 0: all at once
  int64_t input_tokens = 512;  // per request or turn, beside the prefix
  int64_t output_tokens = 64;
  double range_ratio = 0;  // lengths vary by this share of them, uniformly
  int64_t prefix_tokens = 2048;
  int64_t num_prefixes = 1;
  int num_turns = 4;
  std::string trace = {};     // path
  double trace_speed = 1;     // twice as fast: 2
  int32_t first_token = 100;  // ids are drawn from [first_token, end_token)
  int32_t end_token = 10'000;
  uint64_t seed = 0;
};

struct LoadRequest {
  std::vector<int32_t> prompt = {};
  int64_t output_tokens = 0;
  size_t index = 0;  // of the arrival that it belongs to
  int turn = 0;
};

class Workload {
 public:
  // kInvalidArgument; kNotFound, kIoError and kCorruptData of a trace, with path and line.
  static Result<Workload> create(const WorkloadOptions& options);

  size_t num_arrivals() const { return arrivals_.size(); }
  // Requests in all: arrivals and the turns that follow them.
  size_t num_requests() const;
  double arrival_seconds(size_t index) const { return arrivals_[index].seconds; }
  LoadRequest arrival(size_t index) const;
  // What follows when `done` was answered by `answer`; nullopt: nothing.
  std::optional<LoadRequest> next(const LoadRequest& done, std::span<const int32_t> answer) const;

 private:
  struct Arrival {
    double seconds = 0;
    int64_t input_tokens = 0;
    int64_t output_tokens = 0;
    std::vector<uint32_t> blocks;  // of a trace: equal ids are equal text of 512 tokens
  };
  explicit Workload(const WorkloadOptions& options) : options_(options) {}
  Status read_trace(const std::string& text);
  void append_text(std::vector<int32_t>& prompt, uint64_t stream, uint64_t number,
                   int64_t count) const;
  int64_t vary(int64_t length, uint64_t& state) const;

  WorkloadOptions options_;
  std::vector<Arrival> arrivals_;
};

}  // namespace kvant::tools
