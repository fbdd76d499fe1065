// The inner loops of codecs as plain functions on raw memory: one table per CPU level.
//
// codec.cc calls them; nobody else does. This header is included by translation units that are
// compiled with ISA flags, so it must contain plain data only (no inline functions, no standard
// containers). Every level gives the same bits as the scalar one, which is built from the format
// headers.
#pragma once

#include <cstdint>

namespace kvant::formats::internal {

// A run of blocks that lie one after the other: x [num_blocks][block_len], codes of each block
// padded to a byte, side data of each block. Channel formats: x [block_len][num_blocks], a block is
// a column, and `row_stride` is the distance of rows in values.
struct EncodeRun {
  const float* x;
  int64_t num_blocks;
  int64_t block_len;
  int64_t row_stride;
  float global_scale;
  uint8_t* codes;
  uint8_t* scales;
  int64_t* non_finite;
  int64_t* saturated;
  // Magnitudes whose bits exceed this are non-finite or saturate: a SIMD loop hands the blocks at
  // hand to `scalar`, which counts.
  uint32_t max_plain_bits;
  void (*scalar)(const EncodeRun& run);
};

struct DecodeRun {
  const uint8_t* codes;
  const uint8_t* scales;
  int64_t num_blocks;
  int64_t block_len;
  int64_t row_stride;
  float global_scale;
  float* x;
  void (*scalar)(const DecodeRun& run);
};

using EncodeFunction = void (*)(const EncodeRun& run);
using DecodeFunction = void (*)(const DecodeRun& run);

struct FormatKernels {
  EncodeFunction encode;
  EncodeFunction encode_four_over_six;  // null where the format has no +46
  DecodeFunction decode;
};

// Operations on pages of `rows` rows of `dim` values, `dim` a multiple of 16.
struct PageKernels {
  // mean[c] = BF16(sum over rows in order, from +0, / rows), saturating; NaN gives +0.
  void (*column_mean)(const float* x, int64_t rows, int64_t dim, uint16_t* mean);
  void (*subtract_row)(float* x, int64_t rows, int64_t dim, const float* row);
  void (*add_row)(float* x, int64_t rows, int64_t dim, const float* row);
  void (*divide_row)(float* x, int64_t rows, int64_t dim, const float* row);
  void (*multiply_row)(float* x, int64_t rows, int64_t dim, const float* row);
  // Sylvester Hadamard blocks of `block` (a power of two >= 16 that divides dim), then * scale.
  void (*rotate)(float* x, int64_t rows, int64_t dim, int64_t block, float scale);
};

// A SIMD level's table. A null function means: use the scalar one.
struct LevelKernels {
  FormatKernels bf16, f16, fp8, fp8e5m2, fp8_token, mxfp8, mxfp4, nvfp4, int8, int4;
  FormatKernels int4_channel, int3_channel, int2_channel;
  PageKernels page;
};

const LevelKernels& avx2_kernels();
const LevelKernels& avx512_kernels();

}  // namespace kvant::formats::internal
