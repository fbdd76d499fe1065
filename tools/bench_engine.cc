// `kvant bench engine`: the serving engine under load, without HTTP: what a model, a format and a
// machine give, also with random weights.
#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kvant/serve/engine.h"
#include "tools/bench.h"
#include "tools/load_client.h"
#include "tools/load_report.h"
#include "tools/model_options.h"
#include "tools/workload_options.h"

namespace kvant::tools {
namespace {

using serve::Clock;

struct Options {
  ModelOptions model;
  std::vector<std::string> kv;
  std::string cache_memory;
  WorkloadOptions workload;
  int concurrency = 8;
  int max_step_tokens = 0;  // 0: what suits the backend
  float temperature = 0;
  float top_p = 1;
  int top_k = 0;
};

// One request and its answer. The engine's thread writes until it is in `Answers`.
struct Answer {
  LoadRequest request;
  LoadResult result;
  std::vector<int32_t> ids;
};

// Answers that have ended, from the engine's thread to the one that submits. Shared with listeners:
// when a load is given up, the engine ends what still runs.
class Answers {
 public:
  void add(std::unique_ptr<Answer> answer) {
    const std::lock_guard lock(mutex_);
    answers_.push_back(std::move(answer));
    changed_.notify_one();
  }
  // Those that have ended, once there is one or the time has come.
  std::vector<std::unique_ptr<Answer>> wait_until(Clock::time_point time) {
    std::unique_lock lock(mutex_);
    changed_.wait_until(lock, time, [this] { return !answers_.empty(); });
    return std::exchange(answers_, {});
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::unique_ptr<Answer>> answers_;
};

class Listener : public serve::RequestListener {
 public:
  Listener(std::unique_ptr<Answer> answer, Clock::time_point start,
           std::shared_ptr<Answers> answers)
      : answer_(std::move(answer)), start_(start), answers_(std::move(answers)) {}

  void on_prompt(const serve::PromptRecord& record) override {
    answer_->result.prompt_tokens = record.prompt_tokens;
    answer_->result.cached_tokens = record.cached_tokens;
  }
  bool on_token(const serve::SampledToken& token, bool) override {
    LoadResult& result = answer_->result;
    const double now = std::chrono::duration<double>(Clock::now() - start_).count();
    if (answer_->ids.empty()) {
      result.first_token = now;
    } else {
      result.gaps.push_back(now - result.last_token);
    }
    result.last_token = now;
    answer_->ids.push_back(token.id);
    return true;
  }
  void on_finish(const serve::FinishRecord& record) override {
    LoadResult& result = answer_->result;
    result.finished = std::chrono::duration<double>(Clock::now() - start_).count();
    result.output_tokens = record.output_tokens;
    if (record.error) {
      result.error = record.error->message();
    } else if (record.reason != serve::FinishReason::kLength) {
      result.error = finish_reason_name(record.reason);
    }
    answers_->add(std::move(answer_));
  }

 private:
  std::unique_ptr<Answer> answer_;
  const Clock::time_point start_;
  const std::shared_ptr<Answers> answers_;
};

// Sends a workload to an engine as run_load() does to a server.
class EngineLoad {
 public:
  EngineLoad(serve::Engine& engine, const Workload& workload, const Options& options)
      : engine_(engine), workload_(workload), options_(options) {}

  Result<std::vector<LoadResult>> run(Progress& progress) {
    start_ = Clock::now();
    size_t arrived = 0;
    while (results_.size() < workload_.num_requests()) {
      if (Console::stop_requested()) return Error(ErrorCode::kCancelled, "interrupted");
      Clock::time_point wake = Clock::now() + std::chrono::milliseconds(200);
      for (; running_ < options_.concurrency && arrived < workload_.num_arrivals(); ++arrived) {
        const auto wait = std::chrono::duration<double>(workload_.arrival_seconds(arrived));
        const auto due = start_ + std::chrono::duration_cast<Clock::duration>(wait);
        if (due > Clock::now()) {
          wake = std::min(wake, due);
          break;
        }
        KVANT_TRY(submit(workload_.arrival(arrived)));
      }
      for (auto& answer : answers_->wait_until(wake)) KVANT_TRY(take(*answer));
      progress.update(static_cast<int64_t>(results_.size()), fmt::format("{} running", running_));
    }
    return std::move(results_);
  }

 private:
  Status submit(LoadRequest request) {
    auto answer = std::make_unique<Answer>();
    serve::Request sent;
    sent.prompt = request.prompt;
    sent.sampling.temperature = options_.temperature;
    sent.sampling.top_p = options_.top_p;
    sent.sampling.top_k = options_.top_k;
    sent.sampling.max_tokens = static_cast<int>(request.output_tokens);
    sent.sampling.ignore_eos = true;
    LoadResult& result = answer->result;
    result.index = request.index;
    result.turn = request.turn;
    result.asked_prompt_tokens = static_cast<int64_t>(request.prompt.size());
    result.asked_output_tokens = request.output_tokens;
    result.sent = std::chrono::duration<double>(Clock::now() - start_).count();
    answer->request = std::move(request);
    sent.listener = std::make_shared<Listener>(std::move(answer), start_, answers_);
    const auto number = engine_.submit(std::move(sent));
    if (!number) return number.error();
    ++running_;
    return {};
  }
  Status take(Answer& answer) {
    --running_;
    const bool whole = answer.result.error.empty();
    if (!whole) return Error(ErrorCode::kInternal, answer.result.error);
    results_.push_back(std::move(answer.result));
    auto next = workload_.next(answer.request, answer.ids);
    return next ? submit(*std::move(next)) : Status();
  }

  serve::Engine& engine_;
  const Workload& workload_;
  const Options& options_;
  Clock::time_point start_;
  const std::shared_ptr<Answers> answers_ = std::make_shared<Answers>();
  int running_ = 0;
  std::vector<LoadResult> results_;
};

// Prompt and answer of the longest request, its conversation included.
int64_t longest(const Workload& workload, const WorkloadOptions& options) {
  int64_t most = 0;
  for (size_t i = 0; i < workload.num_arrivals(); ++i) {
    const LoadRequest first = workload.arrival(i);
    most = std::max(most, static_cast<int64_t>(first.prompt.size()) + first.output_tokens);
  }
  if (options.kind != WorkloadKind::kMultiTurn) return most;
  const double turn =
      static_cast<double>(options.input_tokens + options.output_tokens) * (1 + options.range_ratio);
  return most + (options.num_turns - 1) * static_cast<int64_t>(turn + 1);
}

Result<serve::EngineOptions> engine_options(const Options& options, const OpenModel& open,
                                            const KvChoice& kv, int64_t context) {
  serve::EngineOptions engine;
  ModelOptions model = options.model;
  model.beyond_training = true;
  if (model.context == 0) model.context = context;
  KVANT_ASSIGN(engine.runtime, runtime_options(model, open, kv.format));
  model::RuntimeOptions& runtime = engine.runtime;
  runtime.max_sequences = options.concurrency;
  if (options.max_step_tokens > 0) runtime.max_step_tokens = options.max_step_tokens;
  runtime.max_step_tokens = std::max(runtime.max_step_tokens, runtime.max_sequences);
  runtime.max_logit_rows = std::min(64, runtime.max_sequences);
  runtime.total_tokens = runtime.context_tokens * runtime.max_sequences;
  KVANT_ASSIGN(const int64_t bytes, parse_optional_bytes(options.cache_memory));
  if (bytes > 0) {
    KVANT_ASSIGN(runtime,
                 model::fit_cache_memory(open.model->source(), *open.backend, runtime, bytes));
  }
  return engine;
}

Json engine_json(const serve::EngineStats& stats) {
  return {{"steps", stats.steps},
          {"preemptions", stats.preemptions},
          {"model_seconds", stats.model_seconds},
          {"loop_seconds", stats.loop_seconds},
          {"overhead", stats.loop_seconds > 0 ? 1 - stats.model_seconds / stats.loop_seconds : 0},
          {"cache_bytes", stats.cache.total_reserved()}};
}

Status run(Console& console, const Options& options) {
  KVANT_ASSIGN(const std::vector<KvChoice> kv, parse_kv(options.kv));
  KVANT_ASSIGN(const Workload workload, Workload::create(options.workload));
  KVANT_ASSIGN(const OpenModel open, open_model(console, options.model));
  KVANT_ASSIGN(const serve::EngineOptions engine,
               engine_options(options, open, kv.front(), longest(workload, options.workload)));
  KVANT_ASSIGN(const std::unique_ptr<serve::Engine> started,
               serve::Engine::create(*open.model, engine));
  std::vector<LoadResult> results;
  {
    Progress progress(console, "load", static_cast<int64_t>(workload.num_requests()), "requests");
    KVANT_ASSIGN(results, EngineLoad(*started, workload, options).run(progress));
  }
  const LoadReport report = make_report(results, {});
  const serve::EngineStats stats = started->stats();
  if (!console.json()) {
    return console.print(
        report_text(report) +
        fmt::format("{} steps, {:.1f} % of their time outside of the model, {} preemptions\n",
                    stats.steps, 100 * (1 - stats.model_seconds / stats.loop_seconds),
                    stats.preemptions));
  }
  Json json = bench_json("engine");
  json["model"] = options.model.model;
  json["kv"] = kv.front().asked;
  json["workload"] = workload_kind_name(options.workload.kind);
  json["requests"] = workload.num_requests();
  json["concurrency"] = options.concurrency;
  json["context"] = engine.runtime.context_tokens;
  json["cache_tokens"] = engine.runtime.total_tokens;
  json["engine"] = engine_json(stats);
  json.update(report_json(report));
  return print_json(console, json);
}

CommandBody define(CLI::App& app) {
  auto options = std::make_shared<Options>();
  add_model_options(app, options->model);
  add_kv_option(app, options->kv, KvOption::kOne);
  add_workload_options(app, options->workload);
  app.add_option("--concurrency", options->concurrency, "Requests under way at most")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app.add_option("--cache-memory", options->cache_memory,
                 "Memory for the cache's pages (default: what the requests under way can take)")
      ->type_name("SIZE");
  app.add_option("--max-num-batched-tokens", options->max_step_tokens,
                 "New tokens of one step (default: what suits the processor)")
      ->check(CLI::Range(16, 1 << 20));
  app.add_option("--temperature", options->temperature, "0: greedy")
      ->check(CLI::Range(0.0f, 100.0f))
      ->capture_default_str();
  app.add_option("--top-p", options->top_p, "Choose among the best tokens that hold this share")
      ->check(CLI::Range(0.01f, 1.0f))
      ->capture_default_str();
  app.add_option("--top-k", options->top_k, "Choose among so many tokens; 0: all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_flag(
      "--sample-on-host", [options](int64_t) { options->model.row_queries = false; },
      "Read logits and choose tokens on the host, also where a GPU would choose them");
  return [options](Console& console) { return run(console, *options); };
}

}  // namespace

const Bench engine_bench = {
    .name = "engine",
    .summary = "The serving engine under load, without HTTP: latencies, throughput, overhead",
    .define = define,
};

}  // namespace kvant::tools
