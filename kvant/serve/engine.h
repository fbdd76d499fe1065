// The serving engine: many requests over one model and one paged cache, batch after batch.
//
//   KVANT_ASSIGN(auto engine, Engine::create(*model, options));
//   KVANT_ASSIGN(RequestNumber number, engine->submit(std::move(request)));   // any thread
//   engine->cancel(number);                                                   // any thread
//
// One thread of the engine's own runs the loop: admit, choose rows under a token budget, run the
// model once, sample, publish full pages to the prefix tree. Prompts and answers are the same thing
// to it: a request is (tokens computed, tokens known), so long prompts are computed in chunks
// between the tokens of others (continuous batching with chunked prefill, research/serving.md 4.1).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "kvant/base/result.h"
#include "kvant/cache/prefix_tree.h"
#include "kvant/model/model.h"
#include "kvant/serve/prompt_lookup.h"
#include "kvant/serve/request.h"
#include "kvant/serve/tiers/page_tiers.h"

namespace kvant::serve {

// Drafts by prompt lookup: where the last `ngram` tokens stood before, what followed them is
// proposed and checked in one step. Greedy output is what it would be without.
struct SpeculationOptions {
  int max_draft_tokens = 0;  // 0: off
  PromptLookup lookup;
};

struct EngineOptions {
  // What model and cache are reserved with: context_tokens is the longest prompt and answer
  // together, max_sequences the requests computed at a time, total_tokens what pages are reserved
  // for, max_step_tokens the new tokens of one step. Its plan is read at creation.
  model::RuntimeOptions runtime;
  // kWithWeights for pages that leave the process.
  model::Model::Identity identity = model::Model::Identity::kGeometryOnly;
  std::vector<int32_t> end_ids;  // the model's end-of-generation tokens
  int64_t max_waiting = 1024;    // more requests than that are refused
  bool prefix_caching = true;    // not with +recentN
  cache::EvictionPolicy eviction = cache::EvictionPolicy::kLru;
  // Share of the pages that admission leaves free for requests that run (vLLM's watermark).
  double watermark = 0.01;
  // A waiting request is overtaken by ones with longer cached prefixes for at most so long.
  double max_overtaking_seconds = 2.0;
  // Load pages only where computing them is expected to take longer; otherwise whenever a tier has
  // them.
  bool load_by_cost = true;
  // Salts of requests whose pages lower tiers may have kept from earlier; such pages are told of at
  // the start, as those without a salt are.
  std::vector<std::string> known_salts;
  // A request waits at most so long for pages from lower tiers; then it computes them.
  double max_load_seconds = 5.0;
  SpeculationOptions speculation;
  int sampling_threads = 0;  // that choose tokens; 0: one per processor, but no more than 8
};

// The engine at one moment.
struct EngineStats {
  int64_t running = 0;
  int64_t waiting = 0;
  // Of the class of pages that fills first; pages that only the prefix tree holds count as free.
  int64_t pages_total = 0;
  int64_t pages_used = 0;
  cache::PrefixTreeStats tree;  // zeros without prefix caching
  struct OfTier {
    cache::Medium medium;
    TierStats stats;
  };
  std::vector<OfTier> tiers;  // from near to far
  PrefetchStats prefetch;
  int64_t prompt_tokens = 0;  // of requests whose prompt was computed
  int64_t generation_tokens = 0;
  int64_t preemptions = 0;
  int64_t steps = 0;
  double model_seconds = 0;  // inside Model::forward
  double loop_seconds = 0;   // of all steps, the model's included, sleeping excluded
  cache::CacheBytes cache;
  double usage() const {
    return pages_total == 0 ? 0
                            : static_cast<double>(pages_used) / static_cast<double>(pages_total);
  }
};

// One step, told after it.
struct StepRecord {
  int64_t running = 0;
  int64_t waiting = 0;
  int64_t prefill_tokens = 0;
  int64_t decode_tokens = 0;  // rows of requests that have their prompt behind them
  double seconds = 0;         // whole
  double model_seconds = 0;   // in Model::forward
};

// Who watches the engine: metrics. Called on the engine thread; must be quick.
class EngineObserver {
 public:
  virtual ~EngineObserver() = default;
  virtual void on_step(const StepRecord&) {}
  virtual void on_first_token(double seconds_since_submission) {
    static_cast<void>(seconds_since_submission);
  }
  virtual void on_inter_token(double seconds) { static_cast<void>(seconds); }
  // Tokens looked up in the prefix cache and found, when a request is first admitted.
  virtual void on_lookup(int64_t queried, int64_t found) {
    static_cast<void>(queried), static_cast<void>(found);
  }
  virtual void on_preemption() {}
  virtual void on_finish(const FinishRecord& record, const SamplingParams& params) {
    static_cast<void>(record), static_cast<void>(params);
  }
};

class Engine {
 public:
  // Reserves the model's buffers and the cache. `tiers`, from near to far, keep pages that the
  // cache has no room for. The model is the engine's alone from now on and
  // must outlive it, as must `observer` and `page_observer` (each may be null).
  static Result<std::unique_ptr<Engine>> create(model::Model& model, const EngineOptions& options,
                                                EngineObserver* observer = nullptr,
                                                cache::PageObserver* page_observer = nullptr,
                                                std::vector<TierSetup> tiers = {});
  // Ends what runs (kShutdown) and joins the thread.
  ~Engine();

  // ---- any thread ----

  // Queues the request. kInvalidArgument: prompt or parameters; kResourceExhausted: the queue is
  // full (try again later); kCancelled: the engine is draining; kInternal: it has failed.
  Result<RequestNumber> submit(Request request);
  // Its pages are free within one step; on_finish tells. Unknown and ended numbers are ignored.
  void cancel(RequestNumber number);
  // Takes no further requests; waits until all are done, or ends them after `timeout`.
  void drain(Clock::duration timeout);
  bool draining() const;  // or failed: it takes no further requests
  EngineStats stats() const;
  // Drops every page that no request uses; waits for the loop to have done it. kInternal if the
  // engine has failed.
  Status reset_prefix_cache();
  // Runs `work` on the engine thread between two steps and waits: for what must see the tree or
  // the cache whole (tests, saving a session). kInternal: it threw, or the engine has failed.
  Status run_between_steps(const std::function<void(cache::KvCache&, cache::PrefixTree*)>& work);
  // The part of submit() that needs no engine: prompt and parameters.
  Status check(const Request& request) const;
  const EngineOptions& options() const;
  const SamplingLimits& limits() const;
  const model::Model& model() const;

 private:
  Engine() = default;
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvant::serve
