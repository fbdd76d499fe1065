// The error by layer of `kvant eval --by-layer`: each layer's cache quantised alone.
// Single-thread, like the model.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "kvant/base/result.h"
#include "tools/eval_report.h"
#include "tools/model_options.h"

namespace kvant::tools {

struct LayerRequest {
  formats::CacheFormat format;
  std::span<const int32_t> tokens;  // [chunks][ctx]
  int64_t ctx = 0;
  int32_t bos = -1;         // as EvalRequest
  std::vector<int> layers;  // those that are wanted
  int logit_rows = 64;
  // Called after each step with the tokens it took, of all caches, and an error ends the work.
  std::function<Status(int64_t tokens)> on_tokens;
  std::function<Status(const LayerError&)> on_layer;  // in the order of `layers`
};

// For each layer the mean KL and ΔNLL of a cache with that layer in the format and all others in
// BF16, relative to a BF16 cache. A few layers at a time share the pass of the BF16 cache, which
// bounds memory to that of as many caches.
Status measure_layers(const ModelOptions& options, OpenModel& open, const LayerRequest& request);
// Tokens that it feeds, all caches together.
int64_t layer_tokens(const LayerRequest& request);

}  // namespace kvant::tools
