// Rotation of one row in shared memory by all threads of a block.
#pragma once

namespace kvant::backend::cuda {

inline constexpr int kMaxRotated = 256;  // channels of a row

// Orthonormal Hadamard blocks of `block` channels (0: none), as formats::rotate_row, in place. All
// threads of the block call it; the row is complete on return.
__device__ __forceinline__ void rotate_shared(float* row, int dim, int block, float scale) {
  __syncthreads();
  for (int half = 1; half < block; half *= 2) {
    for (int i = static_cast<int>(threadIdx.x); i < dim / 2; i += static_cast<int>(blockDim.x)) {
      float* x = row + i / half * 2 * half + i % half;
      const float a = x[0], b = x[half];
      x[0] = a + b;
      x[half] = a - b;
    }
    __syncthreads();
  }
  if (block == 0) return;
  for (int i = static_cast<int>(threadIdx.x); i < dim; i += static_cast<int>(blockDim.x))
    row[i] *= scale;
  __syncthreads();
}

}  // namespace kvant::backend::cuda
