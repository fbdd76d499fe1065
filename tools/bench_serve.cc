// `kvant bench serve`: load on a server that speaks OpenAI's completions API, kvant's or another.
#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <memory>
#include <string>
#include <utility>

#include "tools/bench.h"
#include "tools/load_client.h"
#include "tools/load_report.h"
#include "tools/workload_options.h"

namespace kvant::tools {
namespace {

struct Options {
  std::string url = "http://127.0.0.1:8000";
  WorkloadOptions workload;
  LoadOptions load;
  double goal_ttft_ms = 0;
  double goal_itl_ms = 0;
  double goal_e2e_ms = 0;
};

Status run(Console& console, Options options) {
  KVANT_ASSIGN(options.load.server, ServerAddress::parse(options.url));
  options.load.wants_token_ids = options.workload.kind == WorkloadKind::kMultiTurn;
  KVANT_ASSIGN(const Workload workload, Workload::create(options.workload));
  if (options.load.model.empty()) {
    KVANT_ASSIGN(options.load.model, first_model(options.load));
  }
  std::vector<LoadResult> results;
  {
    Progress progress(console, "load", static_cast<int64_t>(workload.num_requests()), "requests");
    const auto on_progress = [&](size_t done, size_t running) {
      progress.update(static_cast<int64_t>(done), fmt::format("{} running", running));
      return !Console::stop_requested();
    };
    KVANT_ASSIGN(results, run_load(workload, options.load, on_progress));
  }
  const LoadReport report = make_report(results, {.ttft_seconds = options.goal_ttft_ms / 1e3,
                                                  .itl_seconds = options.goal_itl_ms / 1e3,
                                                  .e2e_seconds = options.goal_e2e_ms / 1e3});
  if (console.json()) {
    Json json = bench_json("serve");
    json["url"] = options.url;
    json["model"] = options.load.model;
    json["workload"] = workload_kind_name(options.workload.kind);
    json["requests"] = workload.num_requests();
    json["request_rate"] = options.workload.request_rate;
    json["concurrency"] = options.load.concurrency;
    json["seed"] = options.workload.seed;
    json.update(report_json(report));
    KVANT_TRY(print_json(console, json));
  } else {
    KVANT_TRY(console.print(report_text(report)));
  }
  if (report.completed > 0) return {};
  return Error(ErrorCode::kIoError,
               report.errors.empty()
                   ? std::string("no request was sent")
                   : fmt::format("no request was answered: {}", report.errors.begin()->first));
}

CommandBody define(CLI::App& app) {
  auto options = std::make_shared<Options>();
  app.add_option("URL", options->url, "The server")->capture_default_str();
  app.add_option("--model", options->load.model,
                 "Its name in requests; default: the server's first");
  app.add_option("--api-key", options->load.api_key, "Sent as a bearer token")
      ->envname("OPENAI_API_KEY");
  add_workload_options(app, options->workload);
  app.add_option("-c,--concurrency", options->load.concurrency,
                 "Requests under way at most; 0: no limit")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 20))
      ->capture_default_str();
  app.add_option("--timeout", options->load.timeout_seconds, "Seconds for a whole request")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--goal-ttft", options->goal_ttft_ms,
                 "Milliseconds to the first token of a good request; 0: any")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--goal-itl", options->goal_itl_ms,
                 "Milliseconds between tokens of a good request, on average; 0: any")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--goal-e2e", options->goal_e2e_ms, "Milliseconds of a whole good request; 0: any")
      ->check(CLI::NonNegativeNumber);
  return [options](Console& console) { return run(console, *options); };
}

}  // namespace

const Bench serve_bench = {
    .name = "serve",
    .summary = "Load on an OpenAI-compatible server: latencies, throughput, errors",
    .define = define,
};

}  // namespace kvant::tools
