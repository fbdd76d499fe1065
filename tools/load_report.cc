#include "tools/load_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "tools/cli_support.h"

namespace kvant::tools {
namespace {

double per_second(double count, double seconds) {
  return seconds > 0 ? count / seconds : 0;
}

Json latency_json(const LatencySummary& s) {
  return {{"count", s.count},   {"mean", s.mean * 1e3}, {"p50", s.p50 * 1e3}, {"p90", s.p90 * 1e3},
          {"p95", s.p95 * 1e3}, {"p99", s.p99 * 1e3},   {"max", s.max * 1e3}};
}

}  // namespace

double percentile(std::span<const double> sorted, double percent) {
  if (sorted.empty()) return 0;
  const double at = percent / 100 * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(at);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (sorted[above] - sorted[below]) * (at - std::floor(at));
}

LatencySummary summarize(std::vector<double> values) {
  if (values.empty()) return {};
  std::ranges::sort(values);
  const double sum = std::accumulate(values.begin(), values.end(), 0.0);
  return {.count = values.size(),
          .mean = sum / static_cast<double>(values.size()),
          .p50 = percentile(values, 50),
          .p90 = percentile(values, 90),
          .p95 = percentile(values, 95),
          .p99 = percentile(values, 99),
          .max = values.back()};
}

LoadReport make_report(const std::vector<LoadResult>& results, const LoadGoals& goals) {
  LoadReport report;
  std::vector<double> ttft, itl, tpot, e2e;
  double begin = results.empty() ? 0 : results[0].sent;
  double end = 0;
  const auto keeps = [](double goal, double value) { return goal <= 0 || value <= goal; };
  for (const LoadResult& r : results) {
    begin = std::min(begin, r.sent);
    end = std::max(end, r.finished);
    if (!r.error.empty()) {
      ++report.errors[r.error];
      continue;
    }
    ++report.completed;
    report.wrong_counts += !r.counts_agree();
    report.prompt_tokens += std::max<int64_t>(r.prompt_tokens, 0);
    report.output_tokens += std::max<int64_t>(r.output_tokens, 0);
    report.cached_tokens += r.cached_tokens;
    e2e.push_back(r.finished - r.sent);
    if (r.first_token == 0) continue;  // an answer without text
    ttft.push_back(r.first_token - r.sent);
    itl.insert(itl.end(), r.gaps.begin(), r.gaps.end());
    const double per_token = r.output_tokens > 1 ? (r.last_token - r.first_token) /
                                                       static_cast<double>(r.output_tokens - 1)
                                                 : 0;
    if (r.output_tokens > 1) tpot.push_back(per_token);
    report.good += keeps(goals.ttft_seconds, ttft.back()) && keeps(goals.itl_seconds, per_token) &&
                   keeps(goals.e2e_seconds, e2e.back());
  }
  report.seconds = end - begin;
  report.ttft = summarize(std::move(ttft));
  report.itl = summarize(std::move(itl));
  report.tpot = summarize(std::move(tpot));
  report.e2e = summarize(std::move(e2e));
  return report;
}

Json report_json(const LoadReport& r) {
  Json errors = Json::object();
  for (const auto& [what, count] : r.errors) errors[what] = count;
  return {{"completed", r.completed},
          {"errors", errors},
          {"wrong_token_counts", r.wrong_counts},
          {"seconds", r.seconds},
          {"prompt_tokens", r.prompt_tokens},
          {"cached_tokens", r.cached_tokens},
          {"output_tokens", r.output_tokens},
          {"requests_per_second", per_second(static_cast<double>(r.completed), r.seconds)},
          {"output_tokens_per_second", per_second(static_cast<double>(r.output_tokens), r.seconds)},
          {"total_tokens_per_second",
           per_second(static_cast<double>(r.output_tokens + r.prompt_tokens), r.seconds)},
          {"good_requests_per_second", per_second(static_cast<double>(r.good), r.seconds)},
          {"ttft_ms", latency_json(r.ttft)},
          {"itl_ms", latency_json(r.itl)},
          {"tpot_ms", latency_json(r.tpot)},
          {"e2e_ms", latency_json(r.e2e)}};
}

std::string report_text(const LoadReport& r) {
  Table table({"ms", "mean", "p50", "p90", "p95", "p99", "max"});
  const auto add = [&table](const char* name, const LatencySummary& s) {
    std::vector<std::string> row = {name};
    for (const double value : {s.mean, s.p50, s.p90, s.p95, s.p99, s.max}) {
      row.push_back(fmt::format("{:.1f}", value * 1e3));
    }
    table.add_row(std::move(row));
  };
  add("time to first token", r.ttft);
  add("inter-token latency", r.itl);
  add("time per output token", r.tpot);
  add("whole request", r.e2e);
  const double cached = r.prompt_tokens > 0 ? 100.0 * static_cast<double>(r.cached_tokens) /
                                                  static_cast<double>(r.prompt_tokens)
                                            : 0;
  std::string out = fmt::format(
      "{} requests in {:.1f} s: {:.2f}/s, {:.2f}/s within the goals\n"
      "output {:.1f} tokens/s, prompts and output {:.1f} tokens/s, {:.1f} % of prompt tokens from "
      "the cache\n",
      r.completed, r.seconds, per_second(static_cast<double>(r.completed), r.seconds),
      per_second(static_cast<double>(r.good), r.seconds),
      per_second(static_cast<double>(r.output_tokens), r.seconds),
      per_second(static_cast<double>(r.output_tokens + r.prompt_tokens), r.seconds), cached);
  for (const auto& [what, count] : r.errors) out += fmt::format("failed: {} x {}\n", count, what);
  if (r.wrong_counts > 0) {
    out += fmt::format("{} answers whose usage is not what was asked for\n", r.wrong_counts);
  }
  return out + "\n" + table.str();
}

}  // namespace kvant::tools
