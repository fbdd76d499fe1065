// The dense operators that work on fp32 rows: norms, rotation, gates, sums, rows out of tables.
// Each enqueues one kernel. A row's bits depend on nothing but the row.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kvant/backend/backend.h"
#include "kvant/base/result.h"

namespace kvant::backend::cuda {

// Rows of up to so many values are the work of a warp, others of a block (row_norm.cuh).
inline constexpr int kMostWarpNorm = 512;
Status rms_norm(const RmsNormArgs& args, cudaStream_t stream);
// What round_rows() makes of what rms_norm() gives; args.out is not written.
Status rounded_rms_norm(const RmsNormArgs& args, int64_t padded, uint16_t* out,
                        cudaStream_t stream);

// Rows of cosines, then sines, times the attention factor: table [num_rows][rotary_dim]. The
// arguments of args.rope are as in attention::RopeParams (frequency_factors in device memory);
// `positions` [num_rows] in device memory. Angles in double, as on the CPU.
Status rope_table(const attention::RopeParams& rope, const int64_t* positions, int64_t num_rows,
                  float* table, cudaStream_t stream);
// args.positions is not read: the table has them.
Status rope(const RopeArgs& args, const float* table, cudaStream_t stream);

Status gate(GateKind kind, const float* gate, const float* up, float* out, int64_t num_values,
            cudaStream_t stream);
Status add(const float* x, float* y, int64_t num_values, cudaStream_t stream);
// out[i] = x[rows[i]]; `rows` in device memory.
Status gather_rows(const float* x, const int64_t* rows, int64_t num_rows, int dim, float* out,
                   cudaStream_t stream);
// out [num_rows][cols] = scale * values of the file's blocks `rows` [num_rows][bytes of a row], in
// device memory, aligned to 4.
Status dequantize_rows(formats::WeightType type, const uint8_t* rows, int64_t num_rows,
                       int64_t cols, float scale, float* out, cudaStream_t stream);

// out[row][i] = x[row][i] rounded to BF16, [num_rows][padded]; zeros from `cols` to `padded`.
Status round_rows(const float* x, int64_t num_rows, int64_t cols, int64_t padded, uint16_t* out,
                  cudaStream_t stream);

}  // namespace kvant::backend::cuda
