#include "kvant/backend/cpu/linear.h"

#include <algorithm>

#include "kvant/backend/cpu/matrix.h"
#include "kvant/base/check.h"

namespace kvant::backend::cpu {
namespace {

int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}
int64_t num_blocks(int64_t cols) {
  return (cols + kBlock - 1) / kBlock;
}

int64_t quantised_bytes(int64_t rows, int64_t cols) {
  return round_up(rows * num_blocks(cols) * kQuantisedBlockBytes, 64);
}
int64_t float_bytes(int64_t rows, int64_t cols) {
  return round_up(rows * num_blocks(cols) * kFloatBlockBytes, 64);
}

const CpuMatrix& matrix_of(const LinearTarget& target) {
  return static_cast<const CpuMatrix&>(*target.matrix);
}

// Enough tasks that a slow thread does not hold up the others, few enough that handing them out is
// free.
constexpr int64_t kTasksPerThread = 8;

}  // namespace

Linear::Linear(ThreadPool& pool, const Kernels& kernels) : pool_(pool), kernels_(kernels) {}

int64_t Linear::workspace_bytes(int64_t max_rows, int64_t max_cols) {
  const int64_t rows = std::min(max_rows, kChunkRows);
  return quantised_bytes(rows, max_cols) + float_bytes(rows, max_cols);
}

void Linear::set_workspace(uint8_t* workspace, int64_t max_rows, int64_t max_cols) {
  chunk_rows_ = std::min(max_rows, kChunkRows);
  max_cols_ = max_cols;
  quantised_ = workspace;
  floats_ = workspace + quantised_bytes(chunk_rows_, max_cols);
}

int Linear::split_into_panels(int64_t num_rows, Panel (&panels)[kMaxPanels]) const {
  const auto& sizes = kernels_.product[0];  // all kinds have kernels for the same sizes
  int count = 0;
  int size = kMaxPanelRows;
  for (int64_t row = 0; row < num_rows;) {
    while (sizes[size] == nullptr || row + size > num_rows) --size;
    panels[count++] = {row, size};
    row += size;
  }
  return count;
}

void Linear::run(const LinearInput& input, std::span<const LinearTarget> targets) {
  if (targets.empty()) return;
  const int64_t cols = targets[0].matrix->cols();
  KVANT_CHECK(cols <= max_cols_, "reserve_workspace covers the widest input of a linear operator");
  bool quantised = false;
  bool floats = false;
  for (const LinearTarget& target : targets) {
    KVANT_CHECK(target.matrix->cols() == cols, "targets of one linear operator share x");
    (is_float_kind(matrix_of(target).layout().kind) ? floats : quantised) = true;
  }
  for (int64_t first = 0; first < input.num_rows; first += chunk_rows_) {
    LinearInput chunk = input;
    chunk.num_rows = std::min(chunk_rows_, input.num_rows - first);
    if (input.rows != nullptr) {
      chunk.rows = input.rows + first;
    } else {
      chunk.x = input.x + first * cols;
    }
    Panel panels[kMaxPanels];
    const int count = split_into_panels(chunk.num_rows, panels);
    const std::span<const Panel> used(panels, static_cast<size_t>(count));
    prepare(chunk, cols, used, quantised, floats);
    multiply(first, used, targets);
  }
}

void Linear::prepare(const LinearInput& input, int64_t cols, std::span<const Panel> panels,
                     bool quantised, bool floats) {
  pool_.parallel_for(static_cast<int64_t>(panels.size()), [&](int64_t task, int) {
    const Panel& panel = panels[static_cast<size_t>(task)];
    const float* rows[kMaxPanelRows];
    for (int i = 0; i < panel.num_rows; ++i) {
      const int64_t row = panel.first_row + i;
      rows[i] = input.x + (input.rows != nullptr ? input.rows[row] : row) * cols;
    }
    const int64_t blocks_before = panel.first_row * num_blocks(cols);
    if (quantised) {
      kernels_.quantise_panel(rows, panel.num_rows, cols,
                              quantised_ + blocks_before * kQuantisedBlockBytes);
    }
    if (floats) {
      kernels_.float_panel(rows, panel.num_rows, cols, floats_ + blocks_before * kFloatBlockBytes);
    }
  });
}

void Linear::multiply(int64_t first_row, std::span<const Panel> panels,
                      std::span<const LinearTarget> targets) {
  int64_t total_tiles = 0;
  for (const LinearTarget& target : targets) total_tiles += matrix_of(target).layout().num_tiles;
  const int64_t group = std::max<int64_t>(1, total_tiles / (pool_.num_threads() * kTasksPerThread));
  int64_t num_tasks = 0;
  for (const LinearTarget& target : targets) {
    num_tasks += (matrix_of(target).layout().num_tiles + group - 1) / group;
  }
  pool_.parallel_for(num_tasks, [&](int64_t task, int) {
    const LinearTarget* target = targets.data();
    for (;; ++target) {
      const int64_t tasks = (matrix_of(*target).layout().num_tiles + group - 1) / group;
      if (task < tasks) break;
      task -= tasks;
    }
    const CpuMatrix& matrix = matrix_of(*target);
    const MatrixLayout& layout = matrix.layout();
    const bool is_float = is_float_kind(layout.kind);
    const uint8_t* prepared = is_float ? floats_ : quantised_;
    const int64_t block_bytes = is_float ? kFloatBlockBytes : kQuantisedBlockBytes;
    const int64_t row_bytes = num_blocks(matrix.cols()) * block_bytes;
    const int64_t end = std::min((task + 1) * group, layout.num_tiles);
    // One panel: all tiles in one call. Several: a tile stays in L1 while the panels pass by.
    const int64_t step = panels.size() == 1 ? group : 1;
    for (int64_t tile = task * group; tile < end; tile += step) {
      const int64_t out_row = tile * kTileRows;
      ProductArgs args;
      args.tiles = matrix.tile(tile);
      args.tile_bytes = layout.tile_bytes;
      args.scale_offset = layout.scale_offset;
      args.cols = matrix.cols();
      args.bias = target->bias != nullptr ? target->bias + out_row : nullptr;
      args.out_stride = matrix.rows();
      args.num_rows = std::min(std::min(tile + step, end) * kTileRows, matrix.rows()) - out_row;
      args.accumulate = target->accumulate;
      for (const Panel& panel : panels) {
        args.panel = prepared + panel.first_row * row_bytes;
        args.out = static_cast<float*>(target->out) +
                   (first_row + panel.first_row) * matrix.rows() + out_row;
        kernels_.product[static_cast<int>(layout.kind)][panel.num_rows](args);
      }
    }
  });
}

}  // namespace kvant::backend::cpu
