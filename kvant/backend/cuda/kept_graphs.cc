#include "kvant/backend/cuda/kept_graphs.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "kvant/backend/cuda/status.h"

namespace kvant::backend::cuda {
namespace {

constexpr int kTimesBefore = 3;        // a run is captured
constexpr size_t kMostKept = 1 << 11;  // runs; a model has one a layer and number of rows

}  // namespace

// Null if something in the run cannot be captured.
KeptGraphs::Graph KeptGraphs::capture(cudaStream_t stream, const std::function<Status()>& enqueue) {
  if (cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  const Status enqueued = enqueue();
  cudaGraph_t captured = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(stream, &captured);
  cudaGraphExec_t graph = nullptr;
  if (enqueued && ended == cudaSuccess &&
      cudaGraphInstantiate(&graph, captured, 0) != cudaSuccess) {
    graph = nullptr;
  }
  if (captured != nullptr) cudaGraphDestroy(captured);
  Graph kept(graph);
  // The memory that it takes on the device, which the first launch would ask for.
  if (kept != nullptr && cudaGraphUpload(kept.get(), stream) != cudaSuccess) kept = nullptr;
  cudaGetLastError();  // what could not be captured is enqueued as it is, and fails then if it must
  return kept;
}

// Half of what is kept, that which was not used for longest, goes.
Status KeptGraphs::make_room(cudaStream_t stream) {
  if (kept_.size() < kMostKept) return {};
  KVANT_TRY(cuda_status(cudaStreamSynchronize(stream), "waiting for graphs in use"));
  std::vector<int64_t> used;
  for (const auto& [key, kept] : kept_) used.push_back(kept.used);
  const auto middle = used.begin() + static_cast<std::ptrdiff_t>(used.size() / 2);
  std::nth_element(used.begin(), middle, used.end());
  std::erase_if(kept_, [&](const auto& entry) { return entry.second.used < *middle; });
  return {};
}

Status KeptGraphs::run(const RepeatKey& key, cudaStream_t stream,
                       const std::function<Status()>& enqueue) {
  auto found = kept_.find(key);
  if (found == kept_.end()) {
    KVANT_TRY(make_room(stream));
    found = kept_.emplace(key, Kept()).first;
  }
  Kept& kept = found->second;
  kept.used = ++clock_;
  if (kept.graph == nullptr && kept.can && kept.times >= kTimesBefore) {
    kept.graph = capture(stream, enqueue);
    kept.can = kept.graph != nullptr;
  }
  if (kept.graph == nullptr) {
    ++kept.times;
    return enqueue();
  }
  return cuda_status(cudaGraphLaunch(kept.graph.get(), stream), "enqueuing a graph");
}

Status KeptGraphs::clear(cudaStream_t stream) {
  if (kept_.empty()) return {};
  const Status waited = cuda_status(cudaStreamSynchronize(stream), "waiting for graphs in use");
  kept_.clear();
  return waited;
}

}  // namespace kvant::backend::cuda
