// Fetching the unit that is read next while this one is computed with. Included like
// attention_simd.h, after KVANT_LEVEL is defined.
#pragma once

#include "kvant/backend/cpu/attention_kernels.h"
#include "kvant/backend/cpu/attention_simd.h"

namespace kvant::backend::cpu::KVANT_LEVEL {
namespace {

// Spreads the lines of a FetchAhead evenly over the steps of a pass: bursts wait for the
// processor's line buffers, and while none are asked for, the memory is idle.
class Fetcher {
 public:
  // step() will be called `steps` times; oftener fetches lines behind the last.
  Fetcher(const FetchAhead& fetch, int steps)
      : fetch_(fetch), offset_(fetch.begin), steps_(steps > 0 ? steps : 1) {}
  // As many steps at once as `weight` says.
  KVANT_INLINE void step(int weight = 1) {
    due_ += weight * fetch_.lines;
    while (due_ > 0) {
      unroll<kFetchStreams>([&](auto i) __attribute__((always_inline)) {
        __builtin_prefetch(fetch_.stream[i.value] + offset_, 0, 2);
      });
      offset_ += 64;
      due_ -= steps_;
    }
  }

 private:
  const FetchAhead fetch_;
  int64_t offset_;
  const int steps_;
  int due_ = 0;  // what is owed, in parts of a line: `steps_` make one
};

}  // namespace
}  // namespace kvant::backend::cpu::KVANT_LEVEL
