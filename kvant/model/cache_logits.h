// A model with one cache format as evaluate() sees it: one sequence that starts over and grows.
//
// Several may share a model, since a step uses only its own cache. Single-thread, like the model.
#pragma once

#include <atomic>
#include <memory>
#include <span>

#include "kvant/base/result.h"
#include "kvant/cache/kv_cache.h"
#include "kvant/model/evaluate.h"
#include "kvant/model/model.h"

namespace kvant::model {

class CacheLogits final : public LogitsSource {
 public:
  // The model must have been reserved for the context that will be fed; it and `cancel` (may be
  // null) outlive the object.
  CacheLogits(Model& model, std::unique_ptr<cache::KvCache> cache, const std::atomic<bool>* cancel)
      : model_(model), cache_(std::move(cache)), cancel_(cancel) {}

  Status restart() override;
  // Steps are as long as the model's reservation allows.
  Status extend(std::span<const int32_t> tokens, int64_t first_logits, int64_t num_logits,
                std::span<float> logits) override;

  const cache::KvCache& cache() const { return *cache_; }
  // Time that steps took until their first row of logits was ready (or to their end, where none was
  // wanted), all steps together: what reading the text costs without the predictions that only a
  // comparison needs.
  double seconds() const { return seconds_; }

 private:
  Model& model_;
  std::unique_ptr<cache::KvCache> cache_;
  const std::atomic<bool>* cancel_;
  cache::SequenceId sequence_ = 0;
  bool started_ = false;
  double seconds_ = 0;
};

}  // namespace kvant::model
