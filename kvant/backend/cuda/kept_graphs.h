// What runs of dense operators enqueue, kept as CUDA graphs: Backend::repeat() on a device.
//
// A run is enqueued as it is the first times, so that all that is made at first use is there and
// steps of a size that comes once cost nothing more; then it is captured. Kernels and arguments are
// the same either way, so the results are too. What cannot be captured is enqueued as it is.
//
// The driver keeps memory of the device for each graph, and does not give it back: the next graphs
// use it. The memory plan counts what bytes() says of the most that are kept.
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
  // A run of 5 to 25 kernels takes 124 to 170 KiB (docs/kernels/cuda-steps.md).
  static constexpr int64_t kBytesOfGraph = int64_t{176} << 10;
  // What steps of a model may keep: those of as many sequences as it serves at a time, and of a few
  // other sizes, each with a run for every layer and two more.
  static int64_t most_graphs(const WorkspaceNeeds& needs, int64_t least_rows, int64_t most_rows);

  // Keeps at most so many from now on: 0 (the default) none.
  void set_most(int64_t graphs) { most_ = graphs; }
  int64_t num_graphs() const { return num_graphs_; }

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
  // Forgets the half that was not used for longest, of all runs or of those with graphs.
  Status forget_half(bool graphs_only, cudaStream_t stream);
  Status keep(Kept& kept, cudaStream_t stream, const std::function<Status()>& enqueue);

  std::map<RepeatKey, Kept> kept_;
  int64_t most_ = 0;
  int64_t num_graphs_ = 0;
  int64_t clock_ = 0;
};

}  // namespace kvant::backend::cuda
