// Appends K and V rows to BF16 pages in device memory and encodes the pages that fill.
//
// All bytes that it writes are those of cache::scalar_append in the `sm90` layout, padding zero. A
// layer takes one kernel, and one more where pages fill: all closes, heads and both sides together.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "kvant/backend/backend.h"
#include "kvant/base/result.h"
#include "kvant/formats/codec.h"

namespace kvant::backend::cuda {

// Queries and keys to rotate on the way; the same numbers as rope() gives (dense/operators.h).
struct AppendRotation {
  float* q = nullptr;            // [num_rows][num_query_heads][head_dim]
  float* k = nullptr;            // AppendArgs::k
  const float* table = nullptr;  // [num_rows][rotary_dim], see rope_table()
  int num_rows = 0;
  int num_query_heads = 0;  // 0: no queries
  bool rotate_keys = false;
  int rotary_dim = 0;
};

// Work of one stream. Thread-compatible.
class CacheAppend {
 public:
  static Result<std::unique_ptr<CacheAppend>> create();
  ~CacheAppend();

  // Enqueues one layer of one step. args.k and args.v are fp32 in device memory, aligned to 16
  // bytes; pages are in device memory in the `sm90` layout; tables and plan terms are in host
  // memory and are copied before this returns, the tables once per step and group, the plan's terms
  // once per layer. Nothing is allocated once every layer and the largest step were seen; then a
  // call with the tables of the last one can be captured in a graph.
  Status run(const AppendArgs& args, cudaStream_t stream);

  // Rotates queries and keys in place, then does run(). False, and nothing is done, where pages are
  // filled by the step alone or the format is strict: then rope() comes first.
  Result<bool> run_rotated(const AppendArgs& args, const AppendRotation& rotation,
                           cudaStream_t stream);

  // What all runs since the last call could not encode: waits for the stream. `non_finite` counts
  // new values that BF16 holds as Inf or NaN; `saturated` counts while pages are closed.
  Result<formats::EncodeStats> take_stats(cudaStream_t stream);

 private:
  CacheAppend();
  Status launch(const AppendArgs& args, const AppendRotation& rotation, cudaStream_t stream);
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvant::backend::cuda
