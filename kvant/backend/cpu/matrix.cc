#include "kvant/backend/cpu/matrix.h"

#include "kvant/backend/cpu/repack.h"
#include "kvant/backend/host.h"
#include "kvant/base/check.h"

namespace kvant::backend::cpu {
namespace {

using formats::WeightType;

WeightKind kind_of(WeightType type) {
  switch (type) {
    case WeightType::kQ4_0: return WeightKind::kQ4_0;
    case WeightType::kQ4_1: return WeightKind::kQ4_1;
    case WeightType::kQ5_0: return WeightKind::kQ5_0;
    case WeightType::kQ5_1: return WeightKind::kQ5_1;
    case WeightType::kQ8_0: return WeightKind::kQ8_0;
    case WeightType::kQ4_K: return WeightKind::kQ4_K;
    case WeightType::kQ5_K: return WeightKind::kQ5_K;
    case WeightType::kQ6_K: return WeightKind::kQ6_K;
    case WeightType::kF32: return WeightKind::kF32;
    case WeightType::kF16: return WeightKind::kF16;
    case WeightType::kBF16: return WeightKind::kBF16;
    case WeightType::kF8_E4M3: return WeightKind::kF8_E4M3;
  }
  KVANT_CHECK(false, "every WeightType has a WeightKind");
  return WeightKind::kF32;
}

int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

}  // namespace

MatrixLayout MatrixLayout::of(WeightType type, int64_t rows, int64_t cols) {
  MatrixLayout layout;
  layout.kind = kind_of(type);
  layout.num_tiles = (rows + kTileRows - 1) / kTileRows;
  const RepackFormat& format = repack_format(layout.kind);
  const int64_t blocks = cols / format.block_inputs;
  layout.scale_offset = blocks * format.code_bytes * kTileRows;
  const int64_t row_scale_bytes = blocks * format.scale_bytes + format.row_scale_bytes;
  layout.tile_bytes = round_up(layout.scale_offset + row_scale_bytes * kTileRows, 64);
  return layout;
}

Result<std::unique_ptr<CpuMatrix>> CpuMatrix::load(const MatrixSource& source,
                                                   MemoryResource& memory, ThreadPool& pool) {
  KVANT_TRY(check_matrix_source(source));
  auto matrix = std::unique_ptr<CpuMatrix>(new CpuMatrix());
  matrix->rows_ = source.rows;
  matrix->cols_ = source.cols;
  matrix->layout_ = MatrixLayout::of(source.type, source.rows, source.cols);
  const MatrixLayout& layout = matrix->layout_;
  KVANT_ASSIGN(matrix->tiles_, Buffer::create(memory, layout.bytes(), MemoryUse::kWeights));

  const RepackFormat& format = repack_format(layout.kind);
  const int64_t row_bytes = formats::weight_bytes(source.type, source.cols);
  pool.parallel_for(layout.num_tiles, [&](int64_t tile, int) {
    uint8_t* target = matrix->tiles_.as<uint8_t>() + tile * layout.tile_bytes;
    for (int lane = 0; lane < kTileRows; ++lane) {
      const int64_t row = tile * kTileRows + lane;
      if (row >= source.rows) break;  // padding rows stay zero: their scales are zero
      const int64_t file_row = source.row_order.empty() ? row : source.row_order[row];
      format.pack_row(reinterpret_cast<const uint8_t*>(source.bytes.data()) + file_row * row_bytes,
                      source.cols / format.block_inputs, lane, target,
                      target + layout.scale_offset);
    }
  });
  return matrix;
}

}  // namespace kvant::backend::cpu
