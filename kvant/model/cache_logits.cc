#include "kvant/model/cache_logits.h"

#include <algorithm>
#include <chrono>

#include "kvant/base/check.h"

namespace kvant::model {

using Clock = std::chrono::steady_clock;

Status CacheLogits::restart() {
  if (started_) cache_->remove_sequence(sequence_);
  started_ = false;
  KVANT_ASSIGN(sequence_, cache_->add_sequence());
  started_ = true;
  return {};
}

Status CacheLogits::extend(std::span<const int32_t> tokens, int64_t first_logits,
                           int64_t num_logits, std::span<float> logits) {
  KVANT_CHECK(started_, "restart comes first");
  const int64_t vocab = model_.config().vocab_size;
  KVANT_CHECK(logits.size() == static_cast<size_t>(num_logits * vocab), "one row a position");
  const auto total = static_cast<int64_t>(tokens.size());
  const int64_t step = model_.max_step_tokens();
  for (int64_t begin = 0; begin < total; begin += step) {
    const int64_t end = std::min(begin + step, total);
    // The model gives the last rows of a step; those past the wanted ones are dropped.
    const int64_t first = std::max(begin, first_logits);
    const bool wanted = first < std::min(end, first_logits + num_logits);
    const ForwardSequence part = {
        sequence_, tokens.subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin)),
        wanted ? static_cast<int>(end - first) : 0};
    const auto start = Clock::now();
    auto ready = Clock::time_point::max();
    const auto keep = [&](int64_t row, std::span<const float> values) -> Status {
      if (row == 0) ready = Clock::now();
      const int64_t target = first - first_logits + row;
      if (target < num_logits) {
        std::copy(values.begin(), values.end(), logits.begin() + target * vocab);
      }
      return {};
    };
    KVANT_TRY(model_.forward(std::span(&part, 1), *cache_, keep, cancel_));
    seconds_ += std::chrono::duration<double>(std::min(ready, Clock::now()) - start).count();
  }
  return {};
}

}  // namespace kvant::model
