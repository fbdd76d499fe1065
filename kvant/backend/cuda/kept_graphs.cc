#include "kvant/backend/cuda/kept_graphs.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "kvant/backend/cuda/status.h"

namespace kvant::backend::cuda {
namespace {

constexpr int kTimesBefore = 3;              // a run is captured
constexpr size_t kMostRemembered = 1 << 12;  // runs; a model has one a layer and number of rows
constexpr int64_t kMostGraphs = 1 << 11;
constexpr int64_t kOtherSizes = 4;  // of steps: prompts and drafts that come again
constexpr int64_t kOtherRuns = 2;   // of a step, beside one a layer: both of its ends

}  // namespace

int64_t KeptGraphs::most_graphs(const WorkspaceNeeds& needs, int64_t least_rows,
                                int64_t most_rows) {
  const int64_t possible = std::min(needs.max_rows, most_rows) - least_rows + 1;
  if (possible <= 0 || needs.num_experts > 0) return 0;
  const int64_t wanted = std::max<int64_t>(0, needs.max_sequences - least_rows + 1) + kOtherSizes;
  return std::min(std::min(possible, wanted) * (needs.num_layers + kOtherRuns), kMostGraphs);
}

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

Status KeptGraphs::forget_half(bool graphs_only, cudaStream_t stream) {
  KVANT_TRY(cuda_status(cudaStreamSynchronize(stream), "waiting for graphs in use"));
  const auto meant = [&](const Kept& kept) { return !graphs_only || kept.graph != nullptr; };
  std::vector<int64_t> used;
  for (const auto& [key, kept] : kept_) {
    if (meant(kept)) used.push_back(kept.used);
  }
  if (used.empty()) return {};
  const auto middle = used.begin() + static_cast<std::ptrdiff_t>((used.size() - 1) / 2);
  std::nth_element(used.begin(), middle, used.end());
  std::erase_if(kept_, [&](const auto& entry) {
    return meant(entry.second) && entry.second.used <= *middle;
  });
  num_graphs_ =
      std::ranges::count_if(kept_, [](const auto& entry) { return entry.second.graph != nullptr; });
  return {};
}

// `kept` was used last, so that it stays.
Status KeptGraphs::keep(Kept& kept, cudaStream_t stream, const std::function<Status()>& enqueue) {
  if (num_graphs_ >= most_) KVANT_TRY(forget_half(true, stream));
  kept.graph = capture(stream, enqueue);
  kept.can = kept.graph != nullptr;
  if (kept.can) ++num_graphs_;
  return {};
}

Status KeptGraphs::run(const RepeatKey& key, cudaStream_t stream,
                       const std::function<Status()>& enqueue) {
  if (most_ == 0) return enqueue();
  auto found = kept_.find(key);
  if (found == kept_.end()) {
    if (kept_.size() >= kMostRemembered) KVANT_TRY(forget_half(false, stream));
    found = kept_.emplace(key, Kept()).first;
  }
  Kept& kept = found->second;
  kept.used = ++clock_;
  if (kept.graph == nullptr && kept.can && kept.times >= kTimesBefore) {
    KVANT_TRY(keep(kept, stream, enqueue));
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
  num_graphs_ = 0;
  return waited;
}

}  // namespace kvant::backend::cuda
