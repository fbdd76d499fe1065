// From RuntimeOptions to the sizes of everything that a model and its cache allocate.
//
// plan_memory (model.h), Model::reserve and Model::create_cache all start here, so that the plan is
// what happens. Internal to kvant/model.
#pragma once

#include <cstdint>
#include <optional>

#include "kvant/backend/backend.h"
#include "kvant/base/result.h"
#include "kvant/cache/kv_cache.h"
#include "kvant/formats/plan.h"
#include "kvant/model/config.h"
#include "kvant/model/model.h"

namespace kvant::model {

// kInvalidArgument if sizes are out of range.
Status check_runtime(const RuntimeOptions& runtime);
// The backend must run every format that a layer has.
Status check_formats(const backend::Backend& backend, const ModelConfig& config,
                     const RuntimeOptions& runtime);

// New tokens of the largest step.
int step_tokens(const RuntimeOptions& runtime);
backend::WorkspaceNeeds workspace_needs(const ModelConfig& config, const RuntimeOptions& runtime);
// Rows on their way to the caller, in the host memory that devices read and write (that of tables),
// in this order: of max_logit_rows rows the greatest logits, queries, what they find, candidates
// (none of these three where the backend answers no queries) and logits. 0 where the backend's own
// memory can be read.
struct HostRowBytes {
  int64_t maxima = 0;
  int64_t queries = 0;
  int64_t choices = 0;
  int64_t candidates = 0;
  int64_t logits = 0;
  int64_t total() const { return maxima + queries + choices + candidates + logits; }
};
HostRowBytes host_row_bytes(const ModelConfig& config, const backend::Backend& backend,
                            const RuntimeOptions& runtime);

// The plan as the layers' formats read it, checked against the model; nothing without a plan.
Result<std::optional<formats::QuantPlan>> fitted_plan(const ModelConfig& config,
                                                      const RuntimeOptions& runtime);
// `plan` is copied from when the cache is created.
cache::CacheConfig cache_config(const ModelConfig& config, const backend::Backend& backend,
                                const RuntimeOptions& runtime,
                                const std::optional<formats::QuantPlan>& plan);

}  // namespace kvant::model
