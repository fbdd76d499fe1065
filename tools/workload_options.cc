#include "tools/workload_options.h"

#include <CLI/CLI.hpp>

#include <map>
#include <string>
#include <vector>

namespace kvant::tools {
namespace {

const std::map<std::string, WorkloadKind, std::less<>> kKinds = {
    {"random", WorkloadKind::kRandom},
    {"shared-prefix", WorkloadKind::kSharedPrefix},
    {"multi-turn", WorkloadKind::kMultiTurn},
    {"trace", WorkloadKind::kTrace}};

}  // namespace

std::string_view workload_kind_name(WorkloadKind kind) {
  for (const auto& [name, known] : kKinds) {
    if (known == kind) return name;
  }
  return "";
}

void add_workload_options(CLI::App& app, WorkloadOptions& w) {
  const auto count = CLI::Range(int64_t{1}, int64_t{1} << 24);
  std::vector<std::string> names;
  for (const auto& [name, kind] : kKinds) names.emplace_back(name);
  app.add_option_function<std::string>(
         "--workload", [&w](const std::string& name) { w.kind = kKinds.at(name); },
         "'random': prompts that share nothing; 'shared-prefix': behind one of a few prefixes; "
         "'multi-turn': conversations; 'trace': a file")
      ->check(CLI::IsMember(names))
      ->default_str("random");
  app.add_option("-n,--num-requests", w.num_requests,
                 "Requests, conversations, or lines of a trace at most")
      ->check(count)
      ->capture_default_str();
  app.add_option("--request-rate", w.request_rate,
                 "Arrivals per second, at random times (Poisson); 0: all at once")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--input-tokens", w.input_tokens, "Of a prompt or turn, beside the prefix")
      ->check(count)
      ->capture_default_str();
  app.add_option("--output-tokens", w.output_tokens, "Of an answer")
      ->check(count)
      ->capture_default_str();
  app.add_option("--range-ratio", w.range_ratio, "Share by which both lengths vary")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--prefix-tokens", w.prefix_tokens, "Of a shared prefix")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 24))
      ->capture_default_str();
  app.add_option("--num-prefixes", w.num_prefixes, "Different prefixes")
      ->check(count)
      ->capture_default_str();
  app.add_option("--turns", w.num_turns, "Of a conversation")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  app.add_option("--trace", w.trace,
                 "Mooncake trace: JSON lines with timestamp, lengths, hash_ids");
  app.add_option("--trace-speed", w.trace_speed, "Twice as fast: 2")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--vocab-size", w.end_token, "Prompts have ids from 100 to below this")
      ->check(CLI::Range(101, 1 << 24))
      ->capture_default_str();
  app.add_option("--seed", w.seed, "Of prompts, lengths and times")->capture_default_str();
}

}  // namespace kvant::tools
