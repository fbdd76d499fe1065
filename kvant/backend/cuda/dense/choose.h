// What of rows of logits a step needs: the greatest value, a draw, a few candidates. Each enqueues
// one kernel, a block a row; a row's answer depends on nothing but the row and its query.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kvant/backend/backend.h"
#include "kvant/base/result.h"

namespace kvant::backend::cuda {

// Backend::greatest_in_rows; `maxima` in memory that kernels write to.
Status greatest_in_rows(const float* x, int64_t num_rows, int64_t num_cols, RowMaximum* maxima,
                        cudaStream_t stream);
// Backend::answer_queries; queries and answers in host memory that kernels read and write.
Status answer_queries(const float* x, int64_t num_rows, int64_t num_cols, const RowQuery* queries,
                      const RowAnswers& answers, cudaStream_t stream);

}  // namespace kvant::backend::cuda
