// Times work on a CUDA stream: a graph of many calls, replayed; the median per call.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

namespace kvant::bench {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "error: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(74);
}

struct Timed {
  double median_us = 0.0;
  double least_us = 0.0;
  double most_us = 0.0;
};

// `launch(i, stream)` enqueues one call on copy i of its data, 0 <= i < copies: rotating over
// copies larger than the L2 cache together keeps it cold. A graph runs for about `graph_ms`.
inline Timed time_graph(const std::function<void(int, cudaStream_t)>& launch, int copies,
                        cudaStream_t stream, double graph_ms = 8.0, int replays = 13) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "creating an event");
  check(cudaEventCreate(&end), "creating an event");
  float ms = 0.0f;
  for (int round = 0; round < 2; ++round) {  // the second one is the estimate
    check(cudaEventRecord(begin, stream), "recording an event");
    for (int i = 0; i < copies; ++i) launch(i, stream);
    check(cudaEventRecord(end, stream), "recording an event");
    check(cudaEventSynchronize(end), "running the first calls");
    check(cudaEventElapsedTime(&ms, begin, end), "reading events");
  }
  const int rounds = std::clamp(static_cast<int>(graph_ms / std::max(ms, 1e-3f)), 1, 800 / copies);
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "beginning a capture");
  for (int i = 0; i < rounds * copies; ++i) launch(i % copies, stream);
  check(cudaStreamEndCapture(stream, &graph), "ending a capture");
  check(cudaGraphInstantiate(&executable, graph, 0), "instantiating a graph");
  std::vector<double> times;
  for (int replay = -2; replay < replays; ++replay) {  // two to warm up
    check(cudaEventRecord(begin, stream), "recording an event");
    check(cudaGraphLaunch(executable, stream), "launching a graph");
    check(cudaEventRecord(end, stream), "recording an event");
    check(cudaEventSynchronize(end), "replaying a graph");
    check(cudaEventElapsedTime(&ms, begin, end), "reading events");
    if (replay >= 0) times.push_back(ms * 1e3 / (rounds * copies));
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times.front(), times.back()};
}

}  // namespace kvant::bench
