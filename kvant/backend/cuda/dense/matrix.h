// A matrix of weights in device memory (weight_tiles.h).
#pragma once

#include <memory>

#include "kvant/backend/backend.h"
#include "kvant/backend/cuda/dense/weight_tiles.h"
#include "kvant/backend/cuda/device_memory.h"
#include "kvant/base/memory.h"
#include "kvant/base/result.h"

namespace kvant::backend::cuda {

class CudaMatrix final : public Matrix {
 public:
  // Of MemoryUse::kWeights.
  static int64_t bytes_for(const MatrixSource& source);
  // Rows go through `ring` and, for tiled types, `staging` in device memory (both of a size that
  // does not depend on the matrix).
  static Result<std::unique_ptr<CudaMatrix>> load(const MatrixSource& source,
                                                  MemoryResource& memory, UploadRing& ring,
                                                  const Buffer& staging, cudaStream_t stream);

  int64_t rows() const override { return tiles_.rows; }
  int64_t cols() const override { return tiles_.cols; }
  int64_t memory_bytes() const override { return data_.bytes(); }
  const WeightTiles& tiles() const { return tiles_; }

 private:
  CudaMatrix() = default;
  WeightTiles tiles_;
  Buffer data_;
};

inline const WeightTiles& tiles_of(const Matrix* matrix) {
  return static_cast<const CudaMatrix*>(matrix)->tiles();
}

}  // namespace kvant::backend::cuda
