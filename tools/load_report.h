// What a load on a server showed: latencies, throughput, errors.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "tools/json_output.h"
#include "tools/load_client.h"

namespace kvant::tools {

// Of values in ascending order between the two that surround it; 0 for none. `percent` 0 to 100.
double percentile(std::span<const double> sorted, double percent);

struct LatencySummary {
  size_t count = 0;
  double mean = 0;
  double p50 = 0;
  double p90 = 0;
  double p95 = 0;
  double p99 = 0;
  double max = 0;
};
LatencySummary summarize(std::vector<double> values);

// What a request must keep to count as good; 0: any.
struct LoadGoals {
  double ttft_seconds = 0;
  double itl_seconds = 0;  // mean gap between its tokens
  double e2e_seconds = 0;
};

struct LoadReport {
  size_t completed = 0;
  std::map<std::string, size_t> errors;  // by what went wrong
  size_t wrong_counts = 0;               // usage that is not what was asked for
  double seconds = 0;                    // first request sent to last one finished
  int64_t prompt_tokens = 0;
  int64_t cached_tokens = 0;
  int64_t output_tokens = 0;
  size_t good = 0;      // completed within the goals
  LatencySummary ttft;  // seconds, all below
  LatencySummary itl;   // every gap between pieces of an answer
  LatencySummary tpot;  // of a request, per token after the first
  LatencySummary e2e;
};
LoadReport make_report(const std::vector<LoadResult>& results, const LoadGoals& goals);

// Times in milliseconds.
Json report_json(const LoadReport& report);
std::string report_text(const LoadReport& report);

}  // namespace kvant::tools
