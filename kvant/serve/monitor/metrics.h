// What a server tells Prometheus: the names that vLLM's dashboards and routers read, and kvant's
// own beside them.
//
//   Metrics metrics({.model_name = "smollm2", .format = "4bit", ...});
//   Engine::create(model, options, &metrics, &metrics);   // it watches engine, pages and server
//   metrics.watch_engine([&] { return engine->stats(); });
//   http: GET /metrics -> metrics.text()
//
// docs/monitoring.md lists every name. What comes at once (latencies, ends of requests) is counted
// when it happens; what the engine sums up itself is read when somebody asks.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/cache/page_events.h"
#include "kvant/serve/engine.h"
#include "kvant/serve/http/server.h"

namespace kvant::serve {

// What stays as it is while the server runs.
struct MetricsConfig {
  std::string model_name;
  std::string engine = "0";  // data-parallel rank
  std::string version;
  std::string format;  // cache format string, as it was asked for
  int page_tokens = 64;
  int64_t pages_total = 0;       // of the device tier
  int64_t max_model_len = 4096;  // longest prompt and answer: the range of token histograms
  bool prefix_caching = true;
};

// What KV events came to; KvEventStats in kvant/serve/events, without its dependencies.
struct EventCounts {
  int64_t batches = 0, events = 0, dropped = 0, missed = 0, replays = 0;
  int64_t queue = 0, subscriptions = 0;  // now
};

// One comparison of a page with what it was encoded from; see quality_sampler.h.
struct QualitySample {
  bool keys = false;
  double error = 0;  // RMS of the difference over RMS of the values
  int64_t values = 0;
  int64_t saturated = 0;  // values beyond what the format can hold
  int64_t outliers = 0;   // values beyond six times the RMS of their page and head
};

// Where the tensor scales of a side come from, found at start-up.
enum class ScaleSource { kNone, kPlan, kUnit };
struct ScaleAudit {
  ScaleSource source = ScaleSource::kNone;  // kNone: the format reads no scale of a plan
  int layers = 0;
};

class Metrics final : public EngineObserver,
                      public cache::PageObserver,
                      public http::ServerObserver {
 public:
  explicit Metrics(const MetricsConfig& config);
  ~Metrics() override;

  // ---- before the first request ----
  // Each is called on the thread that asks for metrics, one at a time. They must stay callable
  // until unwatch().
  void watch_engine(std::function<EngineStats()> source);
  void watch_events(std::function<EventCounts()> source);
  void set_scale_audit(bool keys, std::span<const ScaleAudit> audit);
  // Forgets the sources: what they read may go now. The last values stay.
  void unwatch();

  // ---- any thread ----
  // The text format of Prometheus (version 0.0.4), UTF-8.
  std::string text() const;
  static constexpr std::string_view kTextType = "text/plain; version=0.0.4; charset=utf-8";
  // The same values as JSON, for the dashboard: {"schema_version": 1, "time": seconds, "config":
  // {...}, "metrics": {NAME: {"type": ..., "series": [{"labels": {...}, "value": v} or {"labels",
  // "sum", "count", "buckets": [[bound, cumulative count], ...]}]}}}.
  std::string json() const;

  // From a request's first byte to its place in the engine's queue.
  void observe_enqueued(double seconds);
  void observe_quality(const QualitySample& sample);

  // ---- the engine's thread ----
  void on_step(const StepRecord& record) override;
  void on_first_token(double seconds_since_submission) override;
  void on_inter_token(double seconds) override;
  void on_lookup(int64_t queried, int64_t found) override;
  void on_preemption() override;
  void on_finish(const FinishRecord& record, const SamplingParams& params) override;
  void pages_stored(const cache::StoredPages& pages) override;
  void pages_removed(const cache::RemovedPages& pages) override;
  void all_cleared(cache::Medium medium) override;

  // ---- the server's threads ----
  void on_connections(int64_t open) override;
  void on_refused(int status, std::string_view peer) override;
  void on_written(double seconds) override;
  void on_response(const http::AccessRecord& record) override;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvant::serve
