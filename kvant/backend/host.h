// What backends that run on the host share.
#pragma once

#include <cstdint>
#include <span>

#include "kvant/backend/backend.h"
#include "kvant/base/result.h"

namespace kvant::backend {

struct HostMemorySize {
  int64_t total = 0;      // bytes; 0: unknown
  int64_t available = 0;  // without swapping
};
HostMemorySize host_memory_size();

// kInvalidArgument, naming the matrix, if shape, bytes and row order do not go together.
Status check_matrix_source(const MatrixSource& source);

// kInvalidArgument for an id outside the table.
Status check_embed(const MatrixSource& table, std::span<const int32_t> ids);

// Row `id` of the table (after row_order), exactly, [cols].
void embed_row(const MatrixSource& table, int64_t id, float* out);

}  // namespace kvant::backend
