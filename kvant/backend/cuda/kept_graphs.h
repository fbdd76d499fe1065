// What runs of dense operators enqueue, kept as CUDA graphs: Backend::repeat() on a device.
//
// A run is enqueued as it is the first times, so that all that is made at first use is there and
// steps of a size that comes once cost nothing more; then it is captured. Kernels and arguments are
// the same either way, so the results are too. What cannot be captured is enqueued as it is.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>

#include "kvant/backend/backend.h"
#include "kvant/base/result.h"

namespace kvant::backend::cuda {

// Work of one stream. Thread-compatible.
class KeptGraphs {
 public:
  Status run(const RepeatKey& key, cudaStream_t stream, const std::function<Status()>& enqueue);
  // Forgets all; waits for the stream if there is something to forget.
  Status clear(cudaStream_t stream);

 private:
  struct Destroy {
    void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
  };
  using Graph = std::unique_ptr<CUgraphExec_st, Destroy>;
  struct Kept {
    int times = 0;     // enqueued as it is
    Graph graph;       // null: not captured
    bool can = true;   // be captured
    int64_t used = 0;  // when, by clock_
  };

  static Graph capture(cudaStream_t stream, const std::function<Status()>& enqueue);
  Status make_room(cudaStream_t stream);

  std::map<RepeatKey, Kept> kept_;
  int64_t clock_ = 0;
};

}  // namespace kvant::backend::cuda
