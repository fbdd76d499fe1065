#include "tools/load_workload.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <string_view>
#include <utility>

#include "kvant/model/random.h"
#include "tools/cli_support.h"

namespace kvant::tools {
namespace {

constexpr int64_t kTraceBlock = 512;  // tokens that one hash of a Mooncake trace stands for

// What a stream of random tokens is for.
constexpr uint64_t kPrefixes = 1;
constexpr uint64_t kTurns = 2;
constexpr uint64_t kBlocks = 3;
constexpr uint64_t kAnswers = 4;

Error bad(std::string message) {
  return Error(ErrorCode::kInvalidArgument, std::move(message));
}

}  // namespace

Result<Workload> Workload::create(const WorkloadOptions& options) {
  if (options.first_token < 0 || options.end_token <= options.first_token) {
    return bad("the range of token ids is empty");
  }
  Workload workload(options);
  if (options.kind == WorkloadKind::kTrace) {
    if (options.trace.empty()) return bad("--workload trace needs --trace FILE");
    KVANT_ASSIGN(const std::string text, read_file(options.trace));
    if (Status status = workload.read_trace(text); !status) {
      return status.error().with_context(options.trace);
    }
    return workload;
  }
  model::SplitMix64 random(options.seed);
  uint64_t lengths = random.next();
  double seconds = 0;
  for (int64_t i = 0; i < options.num_requests; ++i) {
    Arrival arrival;
    arrival.input_tokens = workload.vary(options.input_tokens, lengths);
    arrival.output_tokens = workload.vary(options.output_tokens, lengths);
    if (options.request_rate > 0 && i > 0) {
      seconds -= std::log1p(-random.uniform()) / options.request_rate;
    }
    arrival.seconds = seconds;
    workload.arrivals_.push_back(std::move(arrival));
  }
  return workload;
}

Status Workload::read_trace(const std::string& text) {
  size_t line_number = 0;
  for (size_t begin = 0; begin < text.size();) {
    if (static_cast<int64_t>(arrivals_.size()) >= options_.num_requests) break;
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = std::string_view(text).substr(begin, end - begin);
    begin = end + 1;
    ++line_number;
    if (line.empty()) continue;
    const nlohmann::json json = nlohmann::json::parse(line, nullptr, false);
    Arrival arrival;
    try {
      arrival.seconds = json.at("timestamp").get<double>() / 1000 / options_.trace_speed;
      arrival.input_tokens = json.at("input_length").get<int64_t>();
      arrival.output_tokens = json.at("output_length").get<int64_t>();
      if (json.contains("hash_ids")) arrival.blocks = json["hash_ids"].get<std::vector<uint32_t>>();
    } catch (const nlohmann::json::exception& e) {
      return Error(ErrorCode::kCorruptData,
                   fmt::format("line {}: expected timestamp (ms), input_length, output_length and "
                               "hash_ids: {}",
                               line_number, e.what()));
    }
    const auto known = static_cast<int64_t>(arrival.blocks.size()) * kTraceBlock;
    if (arrival.input_tokens < 1 || arrival.output_tokens < 1 || arrival.seconds < 0 ||
        (!arrival.blocks.empty() && arrival.input_tokens > known)) {
      return Error(ErrorCode::kCorruptData,
                   fmt::format("line {}: lengths and times that cannot be", line_number));
    }
    arrivals_.push_back(std::move(arrival));
  }
  if (arrivals_.empty()) return Error(ErrorCode::kCorruptData, "no request in it");
  std::ranges::stable_sort(arrivals_, {}, &Arrival::seconds);
  return {};
}

size_t Workload::num_requests() const {
  const size_t turns =
      options_.kind == WorkloadKind::kMultiTurn ? static_cast<size_t>(options_.num_turns) : 1;
  return arrivals_.size() * turns;
}

LoadRequest Workload::arrival(size_t index) const {
  const Arrival& arrival = arrivals_[index];
  LoadRequest request;
  request.output_tokens = arrival.output_tokens;
  request.index = index;
  if (options_.kind == WorkloadKind::kTrace && !arrival.blocks.empty()) {
    for (const uint32_t block : arrival.blocks) {
      append_text(request.prompt, kBlocks, block, kTraceBlock);
    }
    request.prompt.resize(static_cast<size_t>(arrival.input_tokens));
    return request;
  }
  if (options_.kind == WorkloadKind::kSharedPrefix || options_.kind == WorkloadKind::kMultiTurn) {
    const auto prefix = index % static_cast<size_t>(std::max<int64_t>(options_.num_prefixes, 1));
    append_text(request.prompt, kPrefixes, prefix, options_.prefix_tokens);
  }
  append_text(request.prompt, kTurns, index << 16, arrival.input_tokens);
  return request;
}

std::optional<LoadRequest> Workload::next(const LoadRequest& done,
                                          std::span<const int32_t> answer) const {
  if (options_.kind != WorkloadKind::kMultiTurn || done.turn + 1 >= options_.num_turns) {
    return std::nullopt;
  }
  LoadRequest request = done;
  request.turn = done.turn + 1;
  const uint64_t number = done.index << 16 | static_cast<uint64_t>(request.turn);
  if (answer.empty()) {  // the server does not say which tokens it chose
    append_text(request.prompt, kAnswers, number, done.output_tokens);
  } else {
    request.prompt.insert(request.prompt.end(), answer.begin(), answer.end());
  }
  append_text(request.prompt, kTurns, number, arrivals_[done.index].input_tokens);
  return request;
}

void Workload::append_text(std::vector<int32_t>& prompt, uint64_t stream, uint64_t number,
                           int64_t count) const {
  model::SplitMix64 mix(options_.seed ^ (stream << 56));
  model::SplitMix64 random(mix.next() + number * 0x9e3779b97f4a7c15u);
  random = model::SplitMix64(random.next());  // neighbouring numbers, unrelated texts
  const auto range = static_cast<uint64_t>(options_.end_token - options_.first_token);
  for (int64_t i = 0; i < count; ++i) {
    prompt.push_back(options_.first_token + static_cast<int32_t>(random.next() % range));
  }
}

int64_t Workload::vary(int64_t length, uint64_t& state) const {
  model::SplitMix64 random(state);
  const double factor = 1 + options_.range_ratio * (2 * random.uniform() - 1);
  state = random.next();
  return std::max<int64_t>(std::llround(static_cast<double>(length) * factor), 1);
}

}  // namespace kvant::tools
