// A weight matrix in the CPU backend's tiles (matrix_layout.h), repacked from the file's blocks.
//
// Exact: codes and scales are moved, never rounded; memory is the file's size plus padding to 16
// rows and 64 bytes (docs/kernels/cpu-linear.md lists it by type).
#pragma once

#include <cstdint>
#include <memory>

#include "kvant/backend/backend.h"
#include "kvant/backend/cpu/matrix_layout.h"
#include "kvant/base/memory.h"
#include "kvant/base/result.h"
#include "kvant/base/thread_pool.h"

namespace kvant::backend::cpu {

// Where things lie in a matrix of one type and shape.
struct MatrixLayout {
  WeightKind kind = WeightKind::kF32;
  int64_t num_tiles = 0;
  int64_t scale_offset = 0;  // bytes from a tile's start to its scales
  int64_t tile_bytes = 0;    // a multiple of 64
  int64_t bytes() const { return num_tiles * tile_bytes; }

  static MatrixLayout of(formats::WeightType type, int64_t rows, int64_t cols);
};

inline bool is_float_kind(WeightKind kind) {
  return kind >= WeightKind::kF32;
}

class CpuMatrix final : public Matrix {
 public:
  // Repacks on all threads of the pool. kInvalidArgument if the bytes do not fit the shape.
  static Result<std::unique_ptr<CpuMatrix>> load(const MatrixSource& source, MemoryResource& memory,
                                                 ThreadPool& pool);

  int64_t rows() const override { return rows_; }
  int64_t cols() const override { return cols_; }
  int64_t memory_bytes() const override { return layout_.bytes(); }

  const MatrixLayout& layout() const { return layout_; }
  const uint8_t* tile(int64_t index) const {
    return tiles_.as<uint8_t>() + index * layout_.tile_bytes;
  }

 private:
  CpuMatrix() = default;
  int64_t rows_ = 0;
  int64_t cols_ = 0;
  MatrixLayout layout_;
  Buffer tiles_;
};

}  // namespace kvant::backend::cpu
