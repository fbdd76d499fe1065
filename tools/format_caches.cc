#include "tools/format_caches.h"

#include <utility>

namespace kvant::tools {

Result<FormatCaches> FormatCaches::create(const ModelOptions& options, OpenModel& open,
                                          std::span<const Choice> choices, int64_t context,
                                          int logit_rows) {
  FormatCaches result;
  for (const Choice& choice : choices) {
    KVANT_ASSIGN(model::RuntimeOptions runtime,
                 runtime_options(options, open, choice.format, context));
    runtime.layer_formats = choice.layers;
    runtime.max_logit_rows = logit_rows;
    if (result.caches_.empty()) KVANT_TRY(open.model->reserve(runtime));
    KVANT_ASSIGN(auto cache, open.model->create_cache(runtime));
    result.caches_.push_back(
        std::make_unique<model::CacheLogits>(*open.model, std::move(cache), &Console::stop_flag()));
    result.sources_.push_back(result.caches_.back().get());
  }
  return result;
}

}  // namespace kvant::tools
