// Rows of activations as right operands of the products of few rows.
//
// For codes (weights as bytes): in each block of 32 inputs x is a number of 16 bits times the
// block's scale, x = scale * (256 high + low), high and low in [-127, 127]. For float weights: two
// BF16 numbers, x = high + low up to 2^-17 of it. Parts lie so that lane 4 g + c of a warp finds
// what it needs of a tile of 64 inputs in 16 (codes) or 32 bytes (floats):
//
//   codes   [row][tile][part][c] 16 bytes: [block of 2][step of 2][input 4 c + 0, 2, 1, 3]
//   floats  [row][tile][part][half][c] 16 bytes: [step of 2][4 inputs] (input_of)
//   scales  [row][block] of scale and scale * sum of the block's numbers (codes only)
#pragma once

#include <cstdint>

#include "kvant/backend/cuda/dense/product_tiles.cuh"
#include "kvant/backend/cuda/dense/row_norm.cuh"

namespace kvant::backend::cuda {

// For weights as bytes of whole numbers, for 16-bit ones, for F32 and for F8_E4M3 (as for F32,
// times 2^64).
enum class RowForm { kCodes, kFloats, kWideFloats, kLargeFloats };

template <WeightType kType>
inline constexpr RowForm kRowForm = kAsBytes<kType>             ? RowForm::kCodes
                                    : kRowScaled<kType>         ? RowForm::kLargeFloats
                                    : kType == WeightType::kF32 ? RowForm::kWideFloats
                                                                : RowForm::kFloats;

// Where prepared rows lie. `padded` inputs, a multiple of 128.
struct PreparedRows {
  uint8_t* data = nullptr;
  uint8_t* scales = nullptr;
  int row_bytes = 0;
  int scale_bytes = 0;  // of a row; 16 more than it needs, to spread rows over banks

  PreparedRows() = default;
  __host__ __device__ PreparedRows(uint8_t* at, bool codes, int rows, int padded)
      : data(at),
        row_bytes(padded * (codes ? 2 : 4)),
        scale_bytes(codes ? padded / 32 * 8 + 16 : 0) {
    scales = at + static_cast<int64_t>(rows) * row_bytes;
  }
  __host__ __device__ int64_t bytes(int rows) const {
    return static_cast<int64_t>(rows) * (row_bytes + scale_bytes);
  }
};

// Inputs of a lane for one step as two BF16 each.
struct SplitInputs {
  uint32_t high[2];
  uint32_t low[2];
};

__device__ inline SplitInputs split(const float4& x) {
  SplitInputs out;
  out.high[0] = ptx::bf16x2_of_f32(x.x, x.y);
  out.high[1] = ptx::bf16x2_of_f32(x.z, x.w);
  out.low[0] = ptx::bf16x2_of_f32(x.x - low_bf16(out.high[0]), x.y - high_bf16(out.high[0]));
  out.low[1] = ptx::bf16x2_of_f32(x.z - low_bf16(out.high[1]), x.w - high_bf16(out.high[1]));
  return out;
}

// Writes groups of 8 inputs; four neighbours in a warp have a block of 32.
template <RowForm kForm>
struct RowWriter {
  PreparedRows rows;

  // Inputs at, .., at + 7 of a row.
  __device__ void put(int row, int at, const float (&x)[8]) const {
    uint8_t* const data = rows.data + static_cast<int64_t>(row) * rows.row_bytes;
    const int tile = at / kTileCols;
    const int in_tile = at % kTileCols;
    if constexpr (kForm == RowForm::kCodes) {
      put_codes(
          row, at, x,
          data + tile * 128 + in_tile % 16 / 4 * 16 + in_tile / 32 * 8 + in_tile % 32 / 16 * 4);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int first = in_tile + 4 * half;
        const int step = first / 16;
        const int place = kForm == RowForm::kFloats
                              ? first / 32 * 64 + first % 32 * 2
                              : step / 2 * 64 + first % 16 / 4 * 16 + step % 2 * 8;
        constexpr float kFactor = kForm == RowForm::kLargeFloats ? kOfE4m3Inputs : 1.0f;
        const SplitInputs parts = split({x[4 * half] * kFactor, x[4 * half + 1] * kFactor,
                                         x[4 * half + 2] * kFactor, x[4 * half + 3] * kFactor});
        uint8_t* const to = data + tile * 256 + place;
        *reinterpret_cast<uint2*>(to) = make_uint2(parts.high[0], parts.high[1]);
        *reinterpret_cast<uint2*>(to + 128) = make_uint2(parts.low[0], parts.low[1]);
      }
    }
  }

 private:
  // Bytes `i` of four words, in the order of prepared rows.
  __device__ static uint32_t gather(const uint32_t* words, int i) {
    const uint32_t selector = static_cast<uint32_t>(i) * 0x11 + 0x40;
    const uint32_t even = __byte_perm(words[0], words[2], selector);
    const uint32_t odd = __byte_perm(words[1], words[3], selector);
    return __byte_perm(even, odd, 0x5410);
  }

  __device__ void put_codes(int row, int at, const float (&x)[8], uint8_t* to) const {
    constexpr float kLargest = 127 * 256 + 127;
    const unsigned neighbours = 0xfu << (threadIdx.x % 32 / 4 * 4);  // all are there, or none is
    float maximum = 0.0f;  // NaN if one of the inputs is: then the scale is, too
#pragma unroll
    for (const float v : x) maximum = ptx::max_nan(maximum, fabsf(v));
    maximum = ptx::max_nan(maximum, __shfl_xor_sync(neighbours, maximum, 1));
    maximum = ptx::max_nan(maximum, __shfl_xor_sync(neighbours, maximum, 2));
    const float inverse = maximum > 0.0f ? kLargest / maximum : 0.0f;
    uint32_t low[8];
    uint32_t high[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      // 3 x 2^22 + number: the number is in the low bits, in two's complement.
      low[i] = __float_as_uint(fmaf(x[i], inverse, 12582912.0f));
      high[i] = low[i] + 128;  // byte 1: what byte 0 as a signed number leaves
    }
    int sum = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t high_bytes = gather(high + 4 * half, 1);
      const uint32_t low_bytes = gather(low + 4 * half, 0);
      *reinterpret_cast<uint32_t*>(to + 16 * half) = high_bytes;
      *reinterpret_cast<uint32_t*>(to + 16 * half + 64) = low_bytes;
      sum += 256 * __dp4a(static_cast<int>(high_bytes), 0x01010101, 0);
      sum = __dp4a(static_cast<int>(low_bytes), 0x01010101, sum);
    }
    sum += __shfl_xor_sync(neighbours, sum, 1);
    sum += __shfl_xor_sync(neighbours, sum, 2);
    if (threadIdx.x % 4 == 0) {
      const float scale = maximum * (1.0f / kLargest);
      *reinterpret_cast<float2*>(rows.scales + static_cast<int64_t>(row) * rows.scale_bytes +
                                 at / 32 * 8) = make_float2(scale, scale * static_cast<float>(sum));
    }
  }
};

// Inputs [first, first + count) of one row by all `num_threads` threads of a block; `first` and
// `count` are multiples of 128, inputs beyond `cols` zeros.
template <RowForm kForm>
__device__ void prepare_inputs(const RowWriter<kForm>& writer, int row, const float* x,
                               int64_t cols, int first, int count, int num_threads) {
  constexpr int kBatch = 2;  // groups whose loads are in flight together
  for (int base = 0; base < count; base += 8 * num_threads * kBatch) {
    float v[kBatch][8];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      load_eight(x, first + base + 8 * (i * num_threads + static_cast<int>(threadIdx.x)), cols,
                 v[i]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = base + 8 * (i * num_threads + static_cast<int>(threadIdx.x));
      if (at < count) writer.put(row, first + at, v[i]);
    }
  }
}

// `num_rows` whole rows, likewise: their groups of 8 inputs in a row, so that short rows do not
// wait for memory one after the other.
template <RowForm kForm>
__device__ void prepare_rows_whole(const RowWriter<kForm>& writer, int num_rows, const float* x,
                                   int64_t cols, int padded, int num_threads) {
  constexpr int kBatch = 4;  // groups whose loads are in flight together
  const int groups = padded / 8;
  const int count = num_rows * groups;
  for (int base = static_cast<int>(threadIdx.x); base < count; base += num_threads * kBatch) {
    float v[kBatch][8];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int group = base + i * num_threads;
      const int row = group / groups;
      if (group < count) load_eight(x + row * cols, 8 * (group - row * groups), cols, v[i]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int group = base + i * num_threads;
      const int row = group / groups;
      if (group < count) writer.put(row, 8 * (group - row * groups), v[i]);
    }
  }
}

// Rows [row, row + kRows) of x, whole and normed, by a block of kNormThreads. `held` are the
// thread's first weights.
template <int kRows, RowForm kForm>
__device__ void prepare_normed(const RowWriter<kForm>& writer, int row, const float* x,
                               int64_t cols, int padded, const float* weight, float epsilon,
                               const float (&held)[8]) {
  const int first = 8 * static_cast<int>(threadIdx.x);
  const float* from = x + row * cols;
  float v[kRows][8];
#pragma unroll
  for (int r = 0; r < kRows; ++r) load_eight(from + r * cols, first, cols, v[r]);
  float factors[kRows];
  norm_factors<kRows>(from, cols, v, epsilon, factors);
  float w[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) w[i] = held[i];
  for (int at = first; at < padded; at += 8 * kNormThreads) {
    if (at > first) load_eight(weight, at, cols, w);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (at > first) load_eight(from + r * cols, at, cols, v[r]);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[r][i] = v[r][i] * factors[r] * w[i];
      writer.put(row + r, at, v[r]);
    }
  }
}

}  // namespace kvant::backend::cuda
