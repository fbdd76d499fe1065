#include "tools/eval_layers.h"

#include <algorithm>

#include "kvant/base/thread_pool.h"
#include "kvant/model/evaluate.h"
#include "tools/format_caches.h"

namespace kvant::tools {
namespace {

constexpr size_t kLayersAtOnce = 4;  // a quarter of the work again goes into the BF16 cache

std::vector<std::span<const int>> groups_of(const std::vector<int>& layers) {
  std::vector<std::span<const int>> groups;
  for (size_t first = 0; first < layers.size(); first += kLayersAtOnce) {
    groups.push_back(
        std::span(layers).subspan(first, std::min(kLayersAtOnce, layers.size() - first)));
  }
  return groups;
}

Status measure_group(const ModelOptions& options, OpenModel& open, const LayerRequest& request,
                     std::span<const int> layers) {
  const model::ModelConfig& config = open.model->config();
  formats::CacheFormat plain = request.format;  // with its options of the sequence
  plain.k = plain.v = formats::SideFormat();
  std::vector<FormatCaches::Choice> choices = {{formats::CacheFormat(), {}}};
  for (const int layer : layers) {
    std::vector only(static_cast<size_t>(config.num_layers), plain);
    only[static_cast<size_t>(layer)] = request.format;
    choices.push_back({request.format, std::move(only)});
  }
  KVANT_ASSIGN(FormatCaches caches,
               FormatCaches::create(options, open, choices, request.ctx, request.logit_rows));
  ThreadPool pool(options.threads);
  model::EvalRequest eval;
  eval.tokens = request.tokens;
  eval.ctx = request.ctx;
  eval.bos = request.bos;
  eval.vocab = config.vocab_size;
  eval.sources = caches.sources();
  eval.pool = &pool;
  int64_t reported = 0;
  eval.on_progress = [&](const model::EvalProgress& now) -> Status {
    const int64_t more = now.tokens_done - reported;
    reported = now.tokens_done;
    return request.on_tokens(more);
  };
  KVANT_ASSIGN(const model::EvalResult result, model::evaluate(eval));
  for (size_t i = 0; i < layers.size(); ++i) {
    const model::EvalSummary& summary = result.summaries[i + 1];
    KVANT_TRY(request.on_layer({layers[i], summary.kl_mean, summary.delta_nll}));
  }
  return {};
}

}  // namespace

Status measure_layers(const ModelOptions& options, OpenModel& open, const LayerRequest& request) {
  for (const std::span<const int> group : groups_of(request.layers)) {
    KVANT_TRY(measure_group(options, open, request, group));
  }
  return {};
}

int64_t layer_tokens(const LayerRequest& request) {
  const size_t passes = request.layers.size() + groups_of(request.layers).size();
  return static_cast<int64_t>(passes * request.tokens.size());
}

}  // namespace kvant::tools
