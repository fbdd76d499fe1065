// The inside of Engine. Internal to kvant/serve/engine*.cc.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "kvant/base/thread_pool.h"
#include "kvant/serve/engine.h"
#include "kvant/serve/engine_sequence.h"
#include "kvant/serve/prefill_cost.h"
#include "kvant/serve/sampling.h"
#include "kvant/serve/scheduler.h"
#include "kvant/serve/tiers/page_tiers.h"

namespace kvant::serve {

struct Engine::State {
  using SequencePtr = std::unique_ptr<Sequence>;
  using BetweenSteps = std::packaged_task<void()>;

  EngineOptions options;
  model::Model* model = nullptr;
  EngineObserver* observer = nullptr;  // never null: a silent one stands in
  std::unique_ptr<cache::KvCache> cache;
  std::unique_ptr<cache::PrefixTree> tree;  // null: no prefix caching
  std::unique_ptr<PageTiers> tiers;         // null: none; its threads end before the tree does
  SamplingLimits limits;
  std::thread thread;
  const Clock::time_point started = Clock::now();

  // ---- between threads, under `mutex` ----
  mutable std::mutex mutex;
  std::condition_variable wake;  // the engine thread: something came
  std::condition_variable idle;  // drain(): all is done
  std::vector<SequencePtr> submitted;
  std::vector<RequestNumber> cancelled;
  std::vector<BetweenSteps> between_steps;
  bool tiers_done = false;  // they have something to poll
  bool stopping = false;
  bool draining = false;
  bool ending_all = false;       // a drain ran out of time
  std::optional<Error> failure;  // the engine's own; nothing runs any more
  int64_t in_engine = 0;         // submitted and not finished
  RequestNumber last_number = 0;
  EngineStats stats;

  // ---- engine thread ----
  std::vector<SequencePtr> waiting;  // in order of arrival
  std::vector<SequencePtr> running;  // in order of admission
  int64_t admissions = 0;
  bool all_wait = false;  // nothing runs, and what waits does so for tiers
  FairShare fair_share;
  PrefillCost prefill_cost;
  std::unique_ptr<ThreadPool> sampling_pool;
  struct SamplingWorker {
    std::unique_ptr<RowSampler> sampler;  // made when it is first needed
    std::vector<uint32_t> bitmask;        // [vocab bits], while a constrained row is sampled
  };
  std::vector<SamplingWorker> sampling_workers;  // one for each thread of the pool
  std::vector<bool> ends;                        // [vocab]: the model's end-of-generation tokens
  EngineStats totals;                            // counters; copied into `stats` after each step

  // engine.cc
  struct Inbox {
    std::vector<SequencePtr> submitted;
    std::vector<RequestNumber> cancelled;
    std::vector<BetweenSteps> between_steps;
    bool stopping = false;
    bool ending_all = false;
  };
  void loop();
  Inbox wait_for_work();
  void take(Inbox inbox);
  void fail(const char* what);
  void end_expired();
  void end_all(FinishReason reason);
  void publish_stats();
  void open_tiers(std::vector<TierSetup> setups, cache::PageObserver* page_observer);

  // engine_admission.cc
  void admit();
  int64_t cacheable_tokens(const Sequence& sequence) const;
  bool shares_running_prefix(const Sequence& sequence, int64_t cached_tokens) const;
  WaitingView waiting_view(size_t index, Clock::time_point now);
  bool has_room(const Sequence& sequence, int64_t cached_tokens) const;
  Status start(Sequence& sequence);
  bool make_room(std::span<const cache::StepSequence> step);
  void preempt(size_t index);
  void release(Sequence& sequence);
  void finish(SequencePtr sequence, FinishReason reason, std::optional<Error> error = {});
  void tell_finish(Sequence& sequence);

  // engine_loading.cc
  bool waits_for_load(size_t index, int64_t matched_pages, Clock::time_point now);
  bool shares_loading_prefix(size_t index, int64_t next_page) const;
  void install_loaded(Sequence& sequence, int64_t max_tokens);
  void cancel_loading(Sequence& sequence);
  void observe_cost(const StepRecord& record, double context_pairs);

  // engine_step.cc
  struct Ending {
    FinishReason reason;
    std::optional<Error> error;
  };
  void step();
  std::vector<Sequence*> choose_batch();
  std::vector<Sequence*> choose_rows();
  void propose_draft(Sequence& sequence);
  int64_t max_known(const Sequence& sequence) const;
  Status run(std::span<Sequence* const> batch);
  void run_alone(std::span<Sequence* const> batch, const Error& error);
  struct WantedRow {
    Sequence* sequence;
    int64_t position;  // of the token whose successor the logits are of
  };
  Status sample_turn(std::span<const model::LogitsRow> turn, std::span<const WantedRow> rows);
  Status sample(Sequence& sequence, int64_t position, const model::LogitsRow& row,
                SamplingWorker& worker);
  Result<SampledToken> choose(Sequence& sequence, std::span<const float> logits,
                              SamplingWorker& worker);
  RowSampler& sampler_of(SamplingWorker& worker) const;
  void settle(Sequence& sequence);
  Status publish_pages(Sequence& sequence);
  std::optional<Ending> hand_over(Sequence& sequence);
  std::optional<Ending> tell_tokens(Sequence& sequence);
  void note_time(Sequence& sequence);
  bool ends_answer(const Sequence& sequence, int32_t id) const;
  SequencePtr take_running(const Sequence& sequence);
};

}  // namespace kvant::serve
