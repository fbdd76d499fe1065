// Fetching the unit that is read next while this one is computed with. Included like
// attention_simd.h, after KVANT_LEVEL is defined.
#pragma once

#include "kvant/backend/cpu/attention_kernels.h"
#include "kvant/backend/cpu/attention_simd.h"

namespace kvant::backend::cpu::KVANT_LEVEL {
namespace {

// Spreads the lines of a FetchPart evenly over the steps of a pass: bursts wait for the
// processor's line buffers, and while none are asked for, the memory is idle.
class Fetcher {
 public:
  // step() will be called `steps` times; oftener fetches lines behind the last.
  Fetcher(const FetchPart& part, int steps) : all_(part.all), steps_(steps > 0 ? steps : 1) {
    if (all_ == nullptr) return;
    const int first = all_->lines * part.begin / 64;
    offset_ = step_of(*all_) * first;
    lines_ = all_->lines * part.end / 64 - first;
  }
  // As many steps at once as `weight` says.
  KVANT_INLINE void step(int weight = 1) {
    due_ += weight * lines_;
    while (due_ > 0) {
      unroll<kFetchStreams>([&](auto i) __attribute__((always_inline)) {
        __builtin_prefetch(all_->stream[i.value] + offset_, 0, 2);
      });
      offset_ += step_of(*all_);
      due_ -= steps_;
    }
  }

 private:
  // Other processors have no other step, and sources that may run on them do not look.
  KVANT_INLINE static int64_t step_of(const FetchAhead& all) {
#if defined(KVANT_HALF_RATE_512)
    return all.step;
#else
    static_cast<void>(all);
    return 64;
#endif
  }

  const FetchAhead* all_;
  int64_t offset_ = 0;
  int lines_ = 0;
  const int steps_;
  int due_ = 0;  // what is owed, in parts of a line: `steps_` make one
};

}  // namespace
}  // namespace kvant::backend::cpu::KVANT_LEVEL
