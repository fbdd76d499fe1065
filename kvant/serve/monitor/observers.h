// The engine tells one observer; several want to know: metrics, KV events, the sampler of
// quantisation error. Engine thread.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "kvant/cache/page_events.h"
#include "kvant/serve/engine.h"

namespace kvant::serve {

class EngineObservers final : public EngineObserver {
 public:
  // In this order; each outlives the engine.
  void add(EngineObserver& observer) { all_.push_back(&observer); }
  // After every step, behind the observers: e.g. KvEventSource::end_step.
  void after_step(std::function<void()> action) { actions_.push_back(std::move(action)); }

  void on_step(const StepRecord& record) override {
    for (EngineObserver* one : all_) one->on_step(record);
    for (const auto& action : actions_) action();
  }
  void on_first_token(double seconds) override {
    for (EngineObserver* one : all_) one->on_first_token(seconds);
  }
  void on_inter_token(double seconds) override {
    for (EngineObserver* one : all_) one->on_inter_token(seconds);
  }
  void on_lookup(int64_t queried, int64_t found) override {
    for (EngineObserver* one : all_) one->on_lookup(queried, found);
  }
  void on_preemption() override {
    for (EngineObserver* one : all_) one->on_preemption();
  }
  void on_finish(const FinishRecord& record, const SamplingParams& params) override {
    for (EngineObserver* one : all_) one->on_finish(record, params);
  }

 private:
  std::vector<EngineObserver*> all_;
  std::vector<std::function<void()>> actions_;
};

class PageObservers final : public cache::PageObserver {
 public:
  void add(cache::PageObserver& observer) { all_.push_back(&observer); }

  void pages_stored(const cache::StoredPages& pages) override {
    for (cache::PageObserver* one : all_) one->pages_stored(pages);
  }
  void pages_removed(const cache::RemovedPages& pages) override {
    for (cache::PageObserver* one : all_) one->pages_removed(pages);
  }
  void all_cleared(cache::Medium medium) override {
    for (cache::PageObserver* one : all_) one->all_cleared(medium);
  }

 private:
  std::vector<cache::PageObserver*> all_;
};

}  // namespace kvant::serve
