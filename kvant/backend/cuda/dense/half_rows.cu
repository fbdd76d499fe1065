#include "kvant/backend/cuda/dense/half_rows.cuh"

#include "kvant/backend/cuda/dense/decoded_product.h"
#include "kvant/backend/cuda/dense/row_norm.cuh"
#include "kvant/backend/cuda/launch.h"
#include "kvant/base/check.h"

namespace kvant::backend::cuda {

namespace {

constexpr int kHeldGroups = 4;  // of 8 inputs that a thread keeps in registers

// A block a row; what follows the held groups is read again.
template <bool kNormed>
__global__ void __launch_bounds__(kNormThreads)
    prepare_kernel(const float* x, RowNorm norm, int64_t cols, int padded, HalfRows rows) {
  constexpr int kStep = 8 * kNormThreads;
  __shared__ float parts[kNormThreads / 32];
  ptx::launch_dependents();
  const int64_t row = blockIdx.x;
  const int first = 8 * static_cast<int>(threadIdx.x);
  const float* const from = x + row * cols;
  float held_weights[8] = {};
  if constexpr (kNormed) load_eight(norm.weight, first, cols, held_weights);
  ptx::wait_prerequisites();
  float held[kHeldGroups][8];
#pragma unroll
  for (int i = 0; i < kHeldGroups; ++i) load_eight(from, first + i * kStep, cols, held[i]);
  float factor = 1.0f;
  if constexpr (kNormed) factor = norm_factor(from, cols, held[0], norm.epsilon);
  const auto finish = [&](int at, float(&v)[8]) {  // norms values as they were read
    if constexpr (kNormed) {
      float w[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) w[i] = held_weights[i];
      if (at != first) load_eight(norm.weight, at, cols, w);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = v[i] * factor * w[i];
    }
  };
  float most = 0.0f;
  const auto look = [&](const float(&v)[8]) {
#pragma unroll
    for (const float value : v) most = fmaxf(most, fabsf(value));
  };
#pragma unroll
  for (int i = 0; i < kHeldGroups; ++i) {
    if (first + i * kStep >= padded) break;
    finish(first + i * kStep, held[i]);
    look(held[i]);
  }
  float more[8];
  for (int at = first + kHeldGroups * kStep; at < padded; at += kStep) {
    load_eight(from, at, cols, more);
    finish(at, more);
    look(more);
  }
  most = ptx::warp_max(most);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = most;
  __syncthreads();
#pragma unroll
  for (const float part : parts) most = fmaxf(most, part);

  // The largest magnitude times 2^shift is below 2^15; what is not finite stays so.
  const int exponent = static_cast<int>(__float_as_uint(most) >> 23) - 127;
  const int shift = most > 0.0f ? min(14 - exponent, 100) : 0;
  const float scale = __uint_as_float(static_cast<uint32_t>(127 + shift) << 23);
  if (threadIdx.x == 0) {
    rows.factors[row] = __uint_as_float(static_cast<uint32_t>(127 - shift) << 23);
  }
  const auto put = [&](int at, float(&v)[8]) {
#pragma unroll
    for (float& value : v) value *= scale;
    rows.put(row, at, v);
  };
#pragma unroll
  for (int i = 0; i < kHeldGroups; ++i) {
    if (first + i * kStep < padded) put(first + i * kStep, held[i]);
  }
  for (int at = first + kHeldGroups * kStep; at < padded; at += kStep) {
    load_eight(from, at, cols, more);
    finish(at, more);
    put(at, more);
  }
}

}  // namespace

int64_t half_rows_bytes(int64_t rows, int64_t padded_cols) {
  return padded_rows(rows) * (padded_cols * 2 + 4);
}

Status prepare_half_rows(const RowProduct& product, int64_t cols, cudaStream_t stream) {
  if (product.num_rows == 0) return {};
  WeightTiles tiles;
  tiles.cols = cols;
  KVANT_CHECK(half_rows_bytes(product.num_rows, tiles.padded_cols()) <= product.workspace_bytes,
              "reserve_workspace covers the prepared rows");
  const HalfRows rows(product.workspace, product.num_rows, tiles.padded_cols());
  const auto kernel = product.norm.weight != nullptr ? prepare_kernel<true> : prepare_kernel<false>;
  return launch_overlapped("preparation of rows", kernel,
                           {static_cast<unsigned>(product.num_rows), kNormThreads, 0, stream},
                           product.x, product.norm, cols, static_cast<int>(tiles.padded_cols()),
                           rows);
}

}  // namespace kvant::backend::cuda
