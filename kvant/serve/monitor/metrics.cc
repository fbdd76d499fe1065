#include "kvant/serve/monitor/metrics.h"

#include <fmt/format.h>
#include <prometheus/text_serializer.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <mutex>
#include <sstream>

#include "kvant/serve/monitor/metric_table.h"
#include "kvant/serve/monitor/metrics_json.h"

namespace kvant::serve {

using monitor::Counter;
using monitor::FollowingCounter;
using monitor::Gauge;
using monitor::Histogram;
using monitor::Labels;
using monitor::MetricTable;
using monitor::Series;

namespace {

constexpr std::array<const char*, cache::kNumMedia> kTiers = {"device", "host", "disk", "remote"};

constexpr std::array<FinishReason, 4> kReasons = {FinishReason::kStop, FinishReason::kLength,
                                                  FinishReason::kCancelled, FinishReason::kError};

// vLLM's: names and texts that dashboards know.
struct VllmMetrics {
  explicit VllmMetrics(MetricTable& t, const MetricsConfig& config);

  Gauge &running, &waiting, &usage, &old_usage;
  FollowingCounter prompt_tokens, generation_tokens;
  // Hits before queries: they are read in this order and written in the other, so that nobody ever
  // sees more hits than queries.
  Counter &hits, &queries, &external_hits, &external_queries, &preemptions;
  std::array<Counter*, kReasons.size()> success{};
  Histogram &first_token, &per_output_token, &inter_token;
  Histogram &e2e, &queue, &inference, &prefill, &decode;
  Histogram &prompt_length, &generation_length, &max_generation, &max_tokens, &choices;
  Histogram& iteration_tokens;
};

VllmMetrics::VllmMetrics(MetricTable& t, const MetricsConfig& config)
    : running(t.gauge("vllm:num_requests_running", "Requests that are being computed.")),
      waiting(t.gauge("vllm:num_requests_waiting", "Requests that wait to be computed.")),
      usage(t.gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.")),
      old_usage(t.gauge("vllm:gpu_cache_usage_perc",
                        "Older name of vllm:kv_cache_usage_perc; on CPUs the same.")),
      prompt_tokens(t.counter("vllm:prompt_tokens_total", "Prompt tokens processed.")),
      generation_tokens(t.counter("vllm:generation_tokens_total", "Tokens generated.")),
      hits(t.counter("vllm:prefix_cache_hits_total", "Tokens found in the prefix cache.")),
      queries(
          t.counter("vllm:prefix_cache_queries_total", "Tokens looked up in the prefix cache.")),
      external_hits(t.counter("vllm:external_prefix_cache_hits_total",
                              "Tokens found in the tiers below the device.")),
      external_queries(t.counter("vllm:external_prefix_cache_queries_total",
                                 "Tokens looked up in the tiers below the device.")),
      preemptions(
          t.counter("vllm:num_preemptions_total", "Requests that gave their pages up for others.")),
      first_token(t.histogram("vllm:time_to_first_token_seconds",
                              "From a request's arrival to its first token.",
                              monitor::kFirstTokenBounds)),
      per_output_token(t.histogram("vllm:time_per_output_token_seconds",
                                   "Older name of vllm:inter_token_latency_seconds.",
                                   monitor::kInterTokenBounds)),
      inter_token(t.histogram("vllm:inter_token_latency_seconds",
                              "From one token of a request to the next.",
                              monitor::kInterTokenBounds)),
      e2e(t.histogram("vllm:e2e_request_latency_seconds",
                      "From a request's arrival to its last token.", monitor::kRequestBounds)),
      queue(t.histogram("vllm:request_queue_time_seconds", "Spent waiting.",
                        monitor::kRequestBounds)),
      inference(t.histogram("vllm:request_inference_time_seconds", "Spent running.",
                            monitor::kRequestBounds)),
      prefill(t.histogram("vllm:request_prefill_time_seconds", "Until the first token, running.",
                          monitor::kRequestBounds)),
      decode(t.histogram("vllm:request_decode_time_seconds", "From the first token to the last.",
                         monitor::kRequestBounds)),
      prompt_length(t.histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.",
                                monitor::one_two_five(config.max_model_len))),
      generation_length(t.histogram("vllm:request_generation_tokens",
                                    "Tokens generated for a request.",
                                    monitor::one_two_five(config.max_model_len))),
      max_generation(t.histogram("vllm:request_max_num_generation_tokens",
                                 "Most tokens generated for one choice of a request.",
                                 monitor::one_two_five(config.max_model_len))),
      max_tokens(t.histogram("vllm:request_params_max_tokens", "max_tokens of a request.",
                             monitor::one_two_five(config.max_model_len))),
      choices(t.histogram("vllm:request_params_n", "n of a request.", monitor::kChoiceBounds)),
      iteration_tokens(t.histogram("vllm:iteration_tokens_total", "Tokens of one engine step.",
                                   monitor::kIterationBounds)) {
  Series<Counter> reasons =
      t.counters("vllm:request_success_total", "Requests that ended, by why.");
  for (size_t i = 0; i < kReasons.size(); ++i) {
    success[i] = &reasons.with({{"finished_reason", std::string(finish_reason_name(kReasons[i]))}});
  }
  t.gauges("vllm:cache_config_info", "What the cache was made with; always 1.")
      .with({{"cache_dtype", config.format},
             {"block_size", std::to_string(config.page_tokens)},
             {"num_gpu_blocks", std::to_string(config.pages_total)},
             {"num_cpu_blocks", "0"},
             {"enable_prefix_caching", config.prefix_caching ? "True" : "False"}})
      .Set(1);
  t.gauges("vllm:lora_requests_info", "LoRA adapters; kvant has none.")
      .with({{"max_lora", "0"}, {"running_lora_adapters", ""}, {"waiting_lora_adapters", ""}})
      .SetToCurrentTime();
}

// One tier and the format of its pages.
struct TierMetrics {
  Gauge *bytes, *capacity, *pages;
  Counter* hit_tokens;
  FollowingCounter lower_hit_tokens, queries, hits, loads, load_bytes, load_seconds, stores,
      store_bytes, dropped, failures, lower_evictions;
  Counter *stored_pages, *removed_pages;
};

struct KvantMetrics {
  KvantMetrics(MetricTable& t, const MetricsConfig& config);

  std::vector<TierMetrics> tiers;           // [medium]
  std::vector<FollowingCounter> evictions;  // [cause]
  Gauge &tree_pages, &tree_leased, &tree_bytes;
  FollowingCounter tree_inserted, skipped_loads;
  Gauge &cache_reserved, &cache_per_value, &cache_tokens;
  FollowingCounter steps, model_seconds, loop_seconds;
  Counter &drafted, &accepted, &prefill_rows, &decode_rows;
  Histogram &enqueued, &written, &http_seconds;
  Gauge& connections;
  Counter& client_left;
  Series<Counter> refused, responses, cut;
  FollowingCounter event_batches, events, events_dropped, events_missed, event_replays;
  Gauge &event_queue, &event_subscriptions;
  std::array<Histogram*, 2> error{};  // values, keys
  std::array<Counter*, 2> sampled{}, saturated{}, outliers{}, samples{};
  Series<Gauge> scale_audit;
};

std::vector<TierMetrics> make_tiers(MetricTable& t, const std::string& format) {
  Series<Gauge> bytes = t.gauges("kvant:cache_bytes", "Bytes of pages in use, by tier and format.");
  Series<Gauge> capacity = t.gauges("kvant:cache_capacity_bytes", "Bytes that the tier may take.");
  Series<Gauge> pages =
      t.gauges("kvant:cache_pages", "Reusable pages (of each layer group), by tier and format.");
  const auto counters = [&](const char* name, const char* help) { return t.counters(name, help); };
  Series<Counter> hit_tokens =
      counters("kvant:cache_hit_tokens_total", "Prompt tokens served from the tier.");
  Series<Counter> queries =
      counters("kvant:cache_tier_queries_total", "Pages looked for in a tier below the device.");
  Series<Counter> hits =
      counters("kvant:cache_tier_hits_total", "Pages found in a tier below the device.");
  Series<Counter> loads = counters("kvant:cache_loads_total", "Pages loaded from the tier.");
  Series<Counter> load_bytes = counters("kvant:cache_load_bytes_total", "Bytes of these.");
  Series<Counter> load_seconds = counters("kvant:cache_load_seconds_total", "Time they took.");
  Series<Counter> stores = counters("kvant:cache_stores_total", "Pages copied to the tier.");
  Series<Counter> store_bytes = counters("kvant:cache_store_bytes_total", "Bytes of these.");
  Series<Counter> dropped =
      counters("kvant:cache_dropped_stores_total", "Pages that a tier was too busy to take.");
  Series<Counter> failures = counters("kvant:cache_failures_total",
                                      "Pages that a tier refused, spoilt or did not bring in "
                                      "time; each is a miss.");
  Series<Counter> evictions =
      counters("kvant:cache_tier_evictions_total", "Pages that left a tier below the device.");
  Series<Counter> stored =
      counters("kvant:cache_stored_pages_total", "Pages that became reusable at the tier.");
  Series<Counter> removed =
      counters("kvant:cache_removed_pages_total", "Pages that left the tier.");
  std::vector<TierMetrics> tiers;
  for (const char* tier : kTiers) {
    const Labels labels = {{"tier", tier}, {"format", format}};
    const auto follow = [&](Series<Counter>& series) {
      return FollowingCounter(series.with(labels));
    };
    Counter& tokens = hit_tokens.with(labels);
    tiers.push_back({.bytes = &bytes.with(labels),
                     .capacity = &capacity.with(labels),
                     .pages = &pages.with(labels),
                     .hit_tokens = &tokens,
                     .lower_hit_tokens = FollowingCounter(tokens),
                     .queries = follow(queries),
                     .hits = follow(hits),
                     .loads = follow(loads),
                     .load_bytes = follow(load_bytes),
                     .load_seconds = follow(load_seconds),
                     .stores = follow(stores),
                     .store_bytes = follow(store_bytes),
                     .dropped = follow(dropped),
                     .failures = follow(failures),
                     .lower_evictions = follow(evictions),
                     .stored_pages = &stored.with(labels),
                     .removed_pages = &removed.with(labels)});
  }
  return tiers;
}

std::vector<FollowingCounter> make_evictions(MetricTable& t) {
  Series<Counter> series =
      t.counters("kvant:cache_evictions_total", "Pages that left the prefix tree, by why.");
  std::vector<FollowingCounter> evictions;
  for (int i = 0; i < cache::kNumEvictionCauses; ++i) {
    const auto cause = static_cast<cache::EvictionCause>(i);
    evictions.emplace_back(
        series.with({{"cause", std::string(cache::eviction_cause_name(cause))}}));
  }
  return evictions;
}

KvantMetrics::KvantMetrics(MetricTable& t, const MetricsConfig& config)
    : tiers(make_tiers(t, config.format)),
      evictions(make_evictions(t)),
      tree_pages(t.gauge("kvant:prefix_tree_pages", "Pages in the prefix tree.")),
      tree_leased(
          t.gauge("kvant:prefix_tree_leased_pages", "Of these, pages that requests use now.")),
      tree_bytes(t.gauge("kvant:prefix_tree_bytes", "Bytes of the prefix tree's pages.")),
      tree_inserted(
          t.counter("kvant:prefix_tree_inserted_pages_total", "Pages added to the prefix tree.")),
      skipped_loads(
          t.counter("kvant:cache_loads_skipped_total",
                    "Prompts computed although a tier had pages: that was expected to be faster.")),
      cache_reserved(t.gauge("kvant:cache_reserved_bytes", "Bytes reserved for the cache.")),
      cache_per_value(
          t.gauge("kvant:cache_bytes_per_value",
                  "Bytes in use over values held: what a value costs, open pages included.")),
      cache_tokens(t.gauge("kvant:cache_tokens", "Tokens of all requests in the cache.")),
      steps(t.counter("kvant:engine_steps_total", "Steps of the engine.")),
      model_seconds(t.counter("kvant:engine_model_seconds_total", "Time inside the model.")),
      loop_seconds(t.counter("kvant:engine_loop_seconds_total",
                             "Time of all steps, that of the model included.")),
      drafted(t.counter("kvant:speculative_drafted_tokens_total", "Tokens proposed by lookup.")),
      accepted(t.counter("kvant:speculative_accepted_tokens_total",
                         "Of these, the model's own choice.")),
      prefill_rows(t.counter("kvant:engine_prefill_tokens_total",
                             "Tokens computed of prompts; those from the cache are not.")),
      decode_rows(t.counter("kvant:engine_decode_tokens_total",
                            "Tokens computed behind prompts, drafts included.")),
      enqueued(t.histogram("kvant:http_accept_to_enqueue_seconds",
                           "From a request's first byte to the engine's queue.",
                           monitor::kHttpBounds)),
      written(t.histogram("kvant:http_token_to_written_seconds",
                          "From a piece of an answer being ready to the socket.",
                          monitor::kHttpBounds)),
      http_seconds(t.histogram("kvant:http_response_seconds",
                               "From a request's first byte to its response's last.",
                               monitor::kFirstTokenBounds)),
      connections(t.gauge("kvant:http_connections", "Open connections.")),
      client_left(t.counter("kvant:http_clients_left_total",
                            "Responses whose client left before their end.")),
      refused(t.counters("kvant:http_refused_total",
                         "Requests refused before they were read whole, by status.")),
      responses(t.counters("kvant:http_responses_total", "Responses, by status.")),
      cut(t.counters("kvant:http_cut_total", "Responses that the server ended, by why.")),
      event_batches(t.counter("kvant:kv_event_batches_total", "Batches of KV events published.")),
      events(t.counter("kvant:kv_events_total", "KV events published.")),
      events_dropped(t.counter("kvant:kv_event_batches_dropped_total",
                               "Batches lost because the queue was full.")),
      events_missed(t.counter("kvant:kv_event_batches_missed_total",
                              "Batches that some subscriber was too slow for.")),
      event_replays(t.counter("kvant:kv_event_replays_total", "Replays answered.")),
      event_queue(t.gauge("kvant:kv_event_queue_batches", "Batches that wait or are being sent.")),
      event_subscriptions(t.gauge("kvant:kv_event_subscriptions", "Subscriptions.")),
      scale_audit(t.gauges("kvant:scale_audit_layers",
                           "Layers by where the tensor scale of a side comes from: plan, unit "
                           "(none given: 1), or none (the format reads none).")) {
  Series<Histogram> errors =
      t.histograms("kvant:quantization_error_ratio",
                   "Sampled pages: RMS of what encoding changed over RMS of the values.");
  Series<Counter> pages = t.counters("kvant:quantization_samples_total", "Pages sampled.");
  Series<Counter> values =
      t.counters("kvant:quantization_sampled_values_total", "Values of these pages.");
  Series<Counter> beyond = t.counters("kvant:quantization_saturated_values_total",
                                      "Of these, beyond what the format can hold.");
  Series<Counter> outside =
      t.counters("kvant:quantization_outlier_values_total", "Of these, beyond six times the RMS.");
  for (const bool keys : {false, true}) {
    const Labels labels = {{"side", keys ? "k" : "v"}, {"format", config.format}};
    error[keys] = &errors.with(labels, monitor::kErrorBounds);
    samples[keys] = &pages.with(labels);
    sampled[keys] = &values.with(labels);
    saturated[keys] = &beyond.with(labels);
    outliers[keys] = &outside.with(labels);
  }
  t.gauges("kvant:build_info", "The server's version; always 1.")
      .with({{"version", config.version}})
      .Set(1);
  for (const char* status : {"200", "400", "401", "404", "429", "503"}) {
    responses.with({{"status", status}});
  }
  for (const char* status : {"400", "408", "413", "431", "503"}) {
    refused.with({{"status", status}});
  }
}

}  // namespace

std::vector<double> monitor::one_two_five(int64_t largest) {
  std::vector<double> bounds;
  for (double power = 1;; power *= 10) {
    for (const double factor : {1.0, 2.0, 5.0}) {
      if (power * factor > static_cast<double>(largest)) return bounds;
      bounds.push_back(power * factor);
    }
  }
}

struct Metrics::State {
  explicit State(const MetricsConfig& made_with)
      : config(made_with),
        table({{"model_name", config.model_name}, {"engine", config.engine}}),
        vllm(table, config),
        kvant(table, config) {}

  void refresh();
  void refresh_engine(const EngineStats& stats);
  void refresh_tier(cache::Medium medium, const TierStats& stats, const PrefetchStats& prefetch);
  void refresh_external(const EngineStats& stats);
  void refresh_events(const EventCounts& counts);

  const MetricsConfig config;
  MetricTable table;
  VllmMetrics vllm;
  KvantMetrics kvant;
  std::mutex mutex;  // of the sources, and of refreshing from them
  std::function<EngineStats()> engine;
  double loaded_tokens = 0;  // of the tiers below the device, as last read
  std::atomic<bool> has_tiers = false;
  std::function<EventCounts()> events;
};

void Metrics::State::refresh() {
  const std::lock_guard lock(mutex);
  if (engine) refresh_engine(engine());
  if (events) refresh_events(events());
}

void Metrics::State::refresh_engine(const EngineStats& stats) {
  vllm.running.Set(static_cast<double>(stats.running));
  vllm.waiting.Set(static_cast<double>(stats.waiting));
  vllm.usage.Set(stats.usage());
  vllm.old_usage.Set(stats.usage());
  vllm.prompt_tokens.follow(static_cast<double>(stats.prompt_tokens));
  vllm.generation_tokens.follow(static_cast<double>(stats.generation_tokens));
  kvant.steps.follow(static_cast<double>(stats.steps));
  kvant.model_seconds.follow(stats.model_seconds);
  kvant.loop_seconds.follow(stats.loop_seconds);
  for (size_t i = 0; i < kvant.evictions.size(); ++i) {
    kvant.evictions[i].follow(static_cast<double>(stats.tree.evicted[i]));
  }
  kvant.tree_pages.Set(static_cast<double>(stats.tree.nodes));
  kvant.tree_leased.Set(static_cast<double>(stats.tree.leased_nodes));
  kvant.tree_bytes.Set(static_cast<double>(stats.tree.bytes));
  kvant.tree_inserted.follow(static_cast<double>(stats.tree.inserted_pages));
  const cache::CacheBytes& bytes = stats.cache;
  kvant.cache_reserved.Set(static_cast<double>(bytes.total_reserved()));
  kvant.cache_per_value.Set(bytes.values_now > 0 ? bytes.bits_per_value() / 8 : 0);
  kvant.cache_tokens.Set(static_cast<double>(bytes.tokens_now));
  TierMetrics& device = kvant.tiers[0];
  device.bytes->Set(static_cast<double>(bytes.stored_pages_now + bytes.bf16_pages_now));
  device.capacity->Set(static_cast<double>(bytes.pages_reserved()));
  has_tiers = !stats.tiers.empty();
  for (const EngineStats::OfTier& tier : stats.tiers) {
    refresh_tier(tier.medium, tier.stats, stats.prefetch);
  }
  refresh_external(stats);
  kvant.skipped_loads.follow(static_cast<double>(stats.prefetch.skipped_by_cost));
}

void Metrics::State::refresh_tier(cache::Medium medium, const TierStats& stats,
                                  const PrefetchStats& prefetch) {
  const auto index = static_cast<size_t>(medium);
  TierMetrics& tier = kvant.tiers[index];
  tier.bytes->Set(static_cast<double>(stats.usage.bytes));
  tier.capacity->Set(static_cast<double>(stats.usage.limit_bytes));
  tier.pages->Set(static_cast<double>(stats.usage.pages));
  tier.lower_hit_tokens.follow(static_cast<double>(prefetch.loaded_tokens[index]));
  tier.queries.follow(static_cast<double>(stats.gets));
  tier.hits.follow(static_cast<double>(stats.hits));
  tier.loads.follow(static_cast<double>(prefetch.loaded_pages[index]));
  tier.load_bytes.follow(static_cast<double>(stats.hit_bytes));
  tier.load_seconds.follow(stats.get_seconds);
  tier.stores.follow(static_cast<double>(stats.puts));
  tier.store_bytes.follow(static_cast<double>(stats.put_bytes));
  tier.dropped.follow(static_cast<double>(stats.dropped));
  tier.lower_evictions.follow(static_cast<double>(stats.evictions));
  tier.failures.follow(
      static_cast<double>(stats.failures + stats.put_failures + prefetch.late_answers[index]));
}

// What lower tiers gave; on_lookup has counted what the device lacked. Queries first, as always.
void Metrics::State::refresh_external(const EngineStats& stats) {
  double total = 0;
  for (const int64_t tokens : stats.prefetch.loaded_tokens) total += static_cast<double>(tokens);
  if (total <= loaded_tokens) return;
  vllm.external_queries.Increment(total - loaded_tokens);
  vllm.external_hits.Increment(total - loaded_tokens);
  loaded_tokens = total;
}

void Metrics::State::refresh_events(const EventCounts& counts) {
  kvant.event_batches.follow(static_cast<double>(counts.batches));
  kvant.events.follow(static_cast<double>(counts.events));
  kvant.events_dropped.follow(static_cast<double>(counts.dropped));
  kvant.events_missed.follow(static_cast<double>(counts.missed));
  kvant.event_replays.follow(static_cast<double>(counts.replays));
  kvant.event_queue.Set(static_cast<double>(counts.queue));
  kvant.event_subscriptions.Set(static_cast<double>(counts.subscriptions));
}

Metrics::Metrics(const MetricsConfig& config) : state_(std::make_unique<State>(config)) {}
Metrics::~Metrics() = default;

void Metrics::watch_engine(std::function<EngineStats()> source) {
  const std::lock_guard lock(state_->mutex);
  state_->engine = std::move(source);
}

void Metrics::watch_events(std::function<EventCounts()> source) {
  const std::lock_guard lock(state_->mutex);
  state_->events = std::move(source);
}

void Metrics::unwatch() {
  const std::lock_guard lock(state_->mutex);
  state_->engine = nullptr;
  state_->events = nullptr;
}

void Metrics::set_scale_audit(bool keys, std::span<const ScaleAudit> audit) {
  for (const ScaleAudit& one : audit) {
    const char* source = one.source == ScaleSource::kPlan   ? "plan"
                         : one.source == ScaleSource::kUnit ? "unit"
                                                            : "none";
    state_->kvant.scale_audit.with({{"side", keys ? "k" : "v"}, {"source", source}})
        .Set(one.layers);
  }
}

std::string Metrics::text() const {
  state_->refresh();
  std::ostringstream out;
  prometheus::TextSerializer().Serialize(out, state_->table.registry().Collect());
  return out.str();
}

std::string Metrics::json() const {
  state_->refresh();
  const MetricsConfig& config = state_->config;
  return monitor::metrics_json(state_->table.registry().Collect(), config);
}

void Metrics::observe_enqueued(double seconds) {
  state_->kvant.enqueued.Observe(seconds);
}

void Metrics::observe_quality(const QualitySample& sample) {
  KvantMetrics& kvant = state_->kvant;
  kvant.error[sample.keys]->Observe(sample.error);
  kvant.samples[sample.keys]->Increment();
  kvant.sampled[sample.keys]->Increment(static_cast<double>(sample.values));
  kvant.saturated[sample.keys]->Increment(static_cast<double>(sample.saturated));
  kvant.outliers[sample.keys]->Increment(static_cast<double>(sample.outliers));
}

void Metrics::on_step(const StepRecord& record) {
  const auto prefill = static_cast<double>(record.prefill_tokens);
  const auto decode = static_cast<double>(record.decode_tokens);
  state_->vllm.iteration_tokens.Observe(prefill + decode);
  state_->kvant.prefill_rows.Increment(prefill);
  state_->kvant.decode_rows.Increment(decode);
}

void Metrics::on_first_token(double seconds_since_submission) {
  state_->vllm.first_token.Observe(seconds_since_submission);
}

void Metrics::on_inter_token(double seconds) {
  state_->vllm.inter_token.Observe(seconds);
  state_->vllm.per_output_token.Observe(seconds);
}

// Queries first: see VllmMetrics.
void Metrics::on_lookup(int64_t queried, int64_t found) {
  state_->vllm.queries.Increment(static_cast<double>(queried));
  state_->vllm.hits.Increment(static_cast<double>(found));
  if (state_->has_tiers) {
    state_->vllm.external_queries.Increment(static_cast<double>(queried - found));
  }
  state_->kvant.tiers[0].hit_tokens->Increment(static_cast<double>(found));
}

void Metrics::on_preemption() {
  state_->vllm.preemptions.Increment();
}

void Metrics::on_finish(const FinishRecord& record, const SamplingParams& params) {
  VllmMetrics& m = state_->vllm;
  for (size_t i = 0; i < kReasons.size(); ++i) {
    if (finish_reason_name(kReasons[i]) == finish_reason_name(record.reason)) {
      m.success[i]->Increment();
    }
  }
  m.e2e.Observe(record.total_seconds);
  const auto generated = static_cast<double>(record.output_tokens);
  m.prompt_length.Observe(static_cast<double>(record.prompt_tokens));
  m.generation_length.Observe(generated);
  m.max_generation.Observe(generated);
  m.choices.Observe(params.n);
  if (params.max_tokens) m.max_tokens.Observe(*params.max_tokens);
  state_->kvant.drafted.Increment(static_cast<double>(record.drafted_tokens));
  state_->kvant.accepted.Increment(static_cast<double>(record.accepted_tokens));
  if (record.queue_seconds < 0) return;
  m.queue.Observe(record.queue_seconds);
  m.inference.Observe(record.total_seconds - record.queue_seconds);
  if (record.first_token_seconds < 0) return;
  m.prefill.Observe(record.first_token_seconds - record.queue_seconds);
  m.decode.Observe(record.total_seconds - record.first_token_seconds);
}

void Metrics::pages_stored(const cache::StoredPages& pages) {
  TierMetrics& tier = state_->kvant.tiers[static_cast<size_t>(pages.medium)];
  const auto count = static_cast<double>(pages.keys.size());
  tier.stored_pages->Increment(count);
  tier.pages->Increment(count);
}

void Metrics::pages_removed(const cache::RemovedPages& pages) {
  TierMetrics& tier = state_->kvant.tiers[static_cast<size_t>(pages.medium)];
  const auto count = static_cast<double>(pages.keys.size());
  tier.removed_pages->Increment(count);
  tier.pages->Decrement(count);
}

void Metrics::all_cleared(cache::Medium medium) {
  TierMetrics& tier = state_->kvant.tiers[static_cast<size_t>(medium)];
  tier.removed_pages->Increment(tier.pages->Value());
  tier.pages->Set(0);
}

void Metrics::on_connections(int64_t open) {
  state_->kvant.connections.Set(static_cast<double>(open));
}

void Metrics::on_refused(int status, std::string_view) {
  state_->kvant.refused.with({{"status", std::to_string(status)}}).Increment();
}

void Metrics::on_written(double seconds) {
  state_->kvant.written.Observe(seconds);
}

void Metrics::on_response(const http::AccessRecord& record) {
  KvantMetrics& kvant = state_->kvant;
  kvant.http_seconds.Observe(record.seconds);
  kvant.responses.with({{"status", std::to_string(record.status)}}).Increment();
  if (record.client_left) kvant.client_left.Increment();
  if (!record.cut_by.empty()) kvant.cut.with({{"by", std::string(record.cut_by)}}).Increment();
}

}  // namespace kvant::serve
