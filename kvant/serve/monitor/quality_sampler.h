// What the cache format costs on the traffic that is served: now and then one page of a prompt is
// encoded once more, decoded, and compared with the values that it was made from.
//
// The copy is made from the same rows, rounded to BF16 as open pages hold them, by a codec whose
// bytes equal those of every backend, with the plan that the cache uses; so the error is that of
// the stored page. One layer at a time, in turn; pages of prompts only (those that answers fill are
// encoded alike). The sampled step copies the rows of its layers to the host; that, and one page of
// one layer through the codec, is the whole cost.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "kvant/formats/codec.h"
#include "kvant/formats/plan.h"
#include "kvant/model/model.h"
#include "kvant/serve/engine.h"
#include "kvant/serve/monitor/metrics.h"

namespace kvant::serve {

// Where the tensor scales of one side of all layers come from. `plan` may be null.
std::vector<ScaleAudit> audit_scales(const model::RuntimeOptions& runtime, int num_layers,
                                     bool keys);

class QualitySampler final : public EngineObserver {
 public:
  using Report = std::function<void(const QualitySample&)>;

  // Of about every `every_prompts`-th prompt that has a page to compute. Null for formats that
  // change nothing. kInvalidArgument: the plan does not fit the format.
  static Result<std::unique_ptr<QualitySampler>> create(model::Model& model,
                                                        const model::RuntimeOptions& runtime,
                                                        int64_t every_prompts, Report report);
  // The engine must have ended.
  ~QualitySampler() override;

  // Engine thread.
  void on_lookup(int64_t queried, int64_t found) override;
  void on_step(const StepRecord& record) override;

 private:
  QualitySampler(model::Model& model, model::RuntimeOptions runtime, int64_t every_prompts,
                 Report report);
  const formats::CacheFormat& format_of(int layer) const;
  Status look(const model::LayerRows& rows);
  std::optional<int64_t> whole_page(std::span<const int64_t> positions, int layer) const;
  Status compare(const model::LayerRows& rows, int64_t first_row, bool keys);

  model::Model& model_;
  const model::RuntimeOptions runtime_;
  const int64_t every_prompts_;
  const Report report_;
  formats::QuantPlan plan_;  // fitted to the format
  int64_t prompts_ = 0;      // since the last sample
  int next_layer_ = 0;
  bool looking_ = false;
  bool found_ = false;  // this step has had its sample
};

}  // namespace kvant::serve
