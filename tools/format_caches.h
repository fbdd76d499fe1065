// One model with several cache formats side by side, as the commands that compare them set it up.
//
//   std::vector<FormatCaches::Choice> choices = {{format, {}}, ...};
//   KVANT_ASSIGN(FormatCaches caches, FormatCaches::create(options, open, choices, 2048, 64));
//   request.sources = caches.sources();
//
// Single-thread, like the model.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "kvant/model/cache_logits.h"
#include "kvant/model/model.h"
#include "tools/model_options.h"

namespace kvant::tools {

class FormatCaches {
 public:
  struct Choice {
    formats::CacheFormat format;
    std::vector<formats::CacheFormat> layers;  // as RuntimeOptions::layer_formats
  };
  // Reserves the model for `context` tokens and `logit_rows` rows of logits at once and makes a
  // cache for each choice. `open` outlives the result. Errors as runtime_options().
  static Result<FormatCaches> create(const ModelOptions& options, OpenModel& open,
                                     std::span<const Choice> choices, int64_t context,
                                     int logit_rows);

  size_t size() const { return caches_.size(); }
  model::CacheLogits& operator[](size_t index) { return *caches_[index]; }
  // In the order of the choices.
  std::span<model::LogitsSource* const> sources() const { return sources_; }

 private:
  FormatCaches() = default;
  std::vector<std::unique_ptr<model::CacheLogits>> caches_;
  std::vector<model::LogitsSource*> sources_;
};

}  // namespace kvant::tools
