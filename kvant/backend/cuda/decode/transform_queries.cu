#include "kvant/backend/cuda/decode/transform_queries.h"

#include "kvant/backend/cuda/decode/rotate_shared.cuh"
#include "kvant/backend/cuda/launch.h"
#include "kvant/backend/cuda/ptx.cuh"

namespace kvant::backend::cuda {
namespace {

constexpr int kThreads = 128;

// A block per row and query head.
__global__ void __launch_bounds__(kThreads) transform_kernel(QueryTransform t) {
  __shared__ float row[kMaxRotated];
  __shared__ float sums[kThreads / 32];
  const int head = static_cast<int>(blockIdx.y);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * t.num_query_heads + head;
  const int terms = head / t.group * t.head_dim;
  const int thread = static_cast<int>(threadIdx.x);
  ptx::launch_dependents();
  ptx::wait_prerequisites();
  for (int c = thread; c < t.head_dim; c += kThreads) {
    const float q = t.q[at * t.head_dim + c];
    row[c] = t.smooth != nullptr ? q * t.smooth[terms + c] : q;
  }
  rotate_shared(row, t.head_dim, t.rotation_block, t.rotation_scale);
  float sum = 0.0f;
  for (int c = thread; c < t.head_dim; c += kThreads) {
    t.stored_q[at * t.head_dim + c] = row[c];
    if (t.bias != nullptr) sum = fmaf(row[c], t.bias[terms + c], sum);
  }
  if (t.bias == nullptr) return;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (thread % 32 == 0) sums[thread / 32] = sum;
  __syncthreads();
  if (thread > 0) return;
#pragma unroll
  for (int w = 1; w < kThreads / 32; ++w) sum += sums[w];
  t.q_bias[at] = sum;
}

}  // namespace

Status transform_queries(const QueryTransform& transform, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(transform.num_rows),
                  static_cast<unsigned>(transform.num_query_heads));
  return launch_overlapped("queries for transformed keys", &transform_kernel,
                           {grid, kThreads, 0, stream}, transform);
}

}  // namespace kvant::backend::cuda
