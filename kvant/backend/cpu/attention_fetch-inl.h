// Fetching the unit that is read next while this one is computed with. Included like
// attention_simd.h, after KVANT_LEVEL is defined.
#pragma once

#include "kvant/backend/cpu/attention_kernels.h"
#include "kvant/backend/cpu/attention_simd.h"

namespace kvant::backend::cpu::KVANT_LEVEL {
namespace {

// Spreads the lines of a FetchAhead evenly over the steps of a pass. A burst of lines waits for the
// processor's line buffers, and while none are asked for, the memory is idle: evenly, 4-bit pages
// took 12 % less time (docs/kernels/cpu-attention.md).
class Fetcher {
 public:
  // step() will be called `steps` times; oftener fetches lines behind the last.
  Fetcher(const FetchAhead& fetch, int steps)
      : line_(fetch.line), lines_(fetch.lines), steps_(steps > 0 ? steps : 1) {}
  KVANT_INLINE void step() {
    due_ += lines_;
    while (due_ > 0) {
      __builtin_prefetch(line_, 0, 2);
      line_ += 64;
      due_ -= steps_;
    }
  }

 private:
  const uint8_t* line_;
  int lines_;
  int steps_;
  int due_ = 0;  // what is owed, in parts of a line: `steps_` make one
};

}  // namespace
}  // namespace kvant::backend::cpu::KVANT_LEVEL
