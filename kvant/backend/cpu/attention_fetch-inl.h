// Fetching the unit that is read next while this one is computed with. Included like
// attention_simd.h, after KVANT_LEVEL is defined.
#pragma once

#include "kvant/backend/cpu/attention_kernels.h"
#include "kvant/backend/cpu/attention_simd.h"

namespace kvant::backend::cpu::KVANT_LEVEL {
namespace {

// Spreads the lines of a FetchAhead over the steps of a pass.
class Fetcher {
 public:
  Fetcher(const FetchAhead& fetch, int steps)
      : line_(fetch.line),
        end_(fetch.line == nullptr ? nullptr : fetch.line + 64 * static_cast<int64_t>(fetch.lines)),
        lines_a_step_(steps > 0 ? (fetch.lines + steps - 1) / steps : 0) {}
  KVANT_INLINE void step() {
    for (int i = 0; i < lines_a_step_ && line_ < end_; ++i, line_ += 64) {
      __builtin_prefetch(line_, 0, 2);
    }
  }

 private:
  const uint8_t* line_;
  const uint8_t* end_;
  int lines_a_step_;
};

}  // namespace
}  // namespace kvant::backend::cpu::KVANT_LEVEL
