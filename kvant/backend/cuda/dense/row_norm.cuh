// RMS norms of rows by the first kNormThreads of a block, in one order of sums wherever they are
// done: thread t has inputs [8 t, 8 t + 8) and those 8 kNormThreads further on.
#pragma once

#include <cstdint>

#include "kvant/backend/cuda/ptx.cuh"

namespace kvant::backend::cuda {

inline constexpr int kNormThreads = 512;

// Inputs at, .., at + 3 of a row; zeros beyond `cols`. at % 4 == 0.
__device__ inline float4 load_four(const float* x, int64_t at, int64_t cols) {
  if (cols % 4 == 0) {
    return at < cols ? *reinterpret_cast<const float4*>(x + at) : make_float4(0, 0, 0, 0);
  }
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = at + i < cols ? x[at + i] : 0.0f;
  return make_float4(v[0], v[1], v[2], v[3]);
}

__device__ inline void load_eight(const float* x, int64_t at, int64_t cols, float (&v)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 four = load_four(x, at + 4 * half, cols);
    v[4 * half] = four.x, v[4 * half + 1] = four.y;
    v[4 * half + 2] = four.z, v[4 * half + 3] = four.w;
  }
}

// What the values of kRows rows of `cols`, from x on, are multiplied with. `held` are the thread's
// first eight of each.
template <int kRows>
__device__ inline void norm_factors(const float* x, int64_t cols, const float (&held)[kRows][8],
                                    float epsilon, float (&factors)[kRows]) {
  constexpr int kWarps = kNormThreads / 32;
  __shared__ float parts[kRows][kWarps];
  float sums[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    sums[r] = 0.0f;
#pragma unroll
    for (const float v : held[r]) sums[r] = fmaf(v, v, sums[r]);
  }
  for (int64_t at = 8 * (kNormThreads + threadIdx.x); at < cols; at += 8 * kNormThreads) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float more[8];
      load_eight(x + r * cols, at, cols, more);
#pragma unroll
      for (const float v : more) sums[r] = fmaf(v, v, sums[r]);
    }
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
#pragma unroll
    for (float& sum : sums) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  }
  ptx::named_barrier(0, kNormThreads);  // the parts of the rows before have been read
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) parts[r][threadIdx.x / 32] = sums[r];
  }
  ptx::named_barrier(0, kNormThreads);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float sum = 0.0f;
#pragma unroll
    for (const float part : parts[r]) sum += part;
    factors[r] = 1.0f / sqrtf(sum / static_cast<float>(cols) + epsilon);
  }
}

__device__ inline float norm_factor(const float* x, int64_t cols, const float (&held)[8],
                                    float epsilon) {
  float one[1][8];
#pragma unroll
  for (int i = 0; i < 8; ++i) one[0][i] = held[i];
  float factors[1];
  norm_factors<1>(x, cols, one, epsilon, factors);
  return factors[0];
}

}  // namespace kvant::backend::cuda
