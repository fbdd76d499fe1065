#include "kvant/backend/cuda/dense/matrix.h"

#include <algorithm>
#include <cstring>

#include "kvant/backend/cuda/dense/product.h"
#include "kvant/backend/cuda/status.h"
#include "kvant/backend/host.h"

namespace kvant::backend::cuda {
namespace {

WeightTiles describe(const MatrixSource& source) {
  WeightTiles tiles;
  tiles.type = source.type;
  tiles.rows = source.rows;
  tiles.cols = source.cols;
  return tiles;
}

// Copies rows [first, first + count) of the loaded matrix, in its order, from the file.
void collect_rows(const MatrixSource& source, int64_t first, int64_t count, std::byte* out) {
  const int64_t row_bytes = formats::weight_bytes(source.type, source.cols);
  if (source.row_order.empty()) {
    std::memcpy(out, source.bytes.data() + first * row_bytes,
                static_cast<size_t>(count * row_bytes));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = source.row_order[static_cast<size_t>(first + i)];
    std::memcpy(out + i * row_bytes, source.bytes.data() + row * row_bytes,
                static_cast<size_t>(row_bytes));
  }
}

}  // namespace

int64_t CudaMatrix::bytes_for(const MatrixSource& source) {
  return describe(source).bytes();
}

Result<std::unique_ptr<CudaMatrix>> CudaMatrix::load(const MatrixSource& source,
                                                     MemoryResource& memory, UploadRing& ring,
                                                     const Buffer& staging, cudaStream_t stream) {
  KVANT_TRY(check_matrix_source(source));
  auto matrix = std::unique_ptr<CudaMatrix>(new CudaMatrix());
  WeightTiles& tiles = matrix->tiles_;
  tiles = describe(source);
  KVANT_ASSIGN(matrix->data_, Buffer::create(memory, tiles.bytes(), MemoryUse::kWeights));
  tiles.data = matrix->data_.as<uint8_t>();

  const bool tiled = is_tiled(source.type);
  const int64_t row_bytes = formats::weight_bytes(source.type, source.cols);
  // Half the ring, so that the host collects rows while the device takes the others.
  const int64_t room = std::min(ring.capacity() / 2, tiled ? staging.bytes() : ring.capacity());
  const int64_t step = std::max<int64_t>(1, room / row_bytes / kStripRows) * kStripRows;
  if (std::min(step, source.rows) * row_bytes > room) {
    return Error(ErrorCode::kUnsupported, std::string(source.name) + ": rows of " +
                                              std::to_string(row_bytes) +
                                              " bytes; the CUDA backend loads rows of at most " +
                                              std::to_string(room / kStripRows));
  }
  for (int64_t first = 0; first < source.rows; first += step) {
    const int64_t count = std::min(step, source.rows - first);
    KVANT_ASSIGN(void* const rows, ring.take(count * row_bytes, stream));
    collect_rows(source, first, count, static_cast<std::byte*>(rows));
    if (!tiled) {
      const auto pitch = static_cast<size_t>(tiles.padded_cols() * tiles.element_bytes());
      const auto width = static_cast<size_t>(row_bytes);
      KVANT_TRY(cuda_status(
          cudaMemcpy2DAsync(matrix->data_.as<uint8_t>() + static_cast<size_t>(first) * pitch, pitch,
                            rows, width, width, static_cast<size_t>(count), cudaMemcpyHostToDevice,
                            stream),
          "copying weights to the device"));
      continue;
    }
    KVANT_TRY(
        cuda_status(cudaMemcpyAsync(staging.data(), rows, static_cast<size_t>(count * row_bytes),
                                    cudaMemcpyHostToDevice, stream),
                    "copying weights to the device"));
    KVANT_TRY(pack_tiles(tiles, first / kStripRows, (count + kStripRows - 1) / kStripRows,
                         staging.as<uint8_t>(), stream));
  }
  return matrix;
}

}  // namespace kvant::backend::cuda
