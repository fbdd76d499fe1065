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

int64_t float_bytes(int64_t rows, int64_t cols) {
  return round_up(rows * num_blocks(cols) * kFloatBlockBytes, 64);
}

const CpuMatrix& matrix_of(const LinearTarget& target) {
  return static_cast<const CpuMatrix&>(*target.matrix);
}

// Tiles of all targets, cut into tasks: each takes a share of what is left, so that long runs of
// memory go to one thread and the threads still end together.
class Tasks {
 public:
  // Tasks have `least` tiles or a multiple.
  Tasks(int64_t num_tiles, int num_threads, int64_t least) {
    least = std::max(least, (num_tiles + kMaxTasks - 1) / kMaxTasks);
    for (int64_t at = 0; at < num_tiles;) {
      const int64_t share = (num_tiles - at) / (kSharesPerThread * num_threads);
      at = std::min(num_tiles, at + std::max(least, share / least * least));
      ends_[count_++] = at;
    }
  }
  int64_t count() const { return count_; }
  int64_t begin(int64_t task) const { return task == 0 ? 0 : ends_[task - 1]; }
  int64_t end(int64_t task) const { return ends_[task]; }

 private:
  static constexpr int64_t kMaxTasks = 256;
  static constexpr int64_t kSharesPerThread = 2;
  int64_t count_ = 0;
  int64_t ends_[kMaxTasks];
};

// The smallest task: 16 KiB of weights take longer than handing it out; wide kernels read all
// activations once per task and unpack 4 tiles at a time.
constexpr int64_t kLeastTaskBytes = 16384;
constexpr int64_t kLeastWideTiles = 4;

// Rows that are left behind full wide panels take one of their own from here on.
constexpr int64_t kMinWideRows = 6;

}  // namespace

Linear::Linear(ThreadPool& pool, const Kernels& kernels, const WideKernels* wide)
    : pool_(pool), kernels_(kernels), wide_(wide) {}

int64_t Linear::quantised_bytes(int64_t rows, int64_t cols) const {
  const int64_t blocks = num_blocks(cols);
  const int64_t wide = (rows + kWidePanelRows - 1) / kWidePanelRows * kWideBlockBytes * blocks;
  const int64_t narrow = rows * blocks * kQuantisedBlockBytes;
  return round_up(wide_ != nullptr ? std::max(wide, narrow) : narrow, 64);
}

int64_t Linear::workspace_bytes(int64_t max_rows, int64_t max_cols) const {
  const int64_t rows = std::min(max_rows, kChunkRows);
  return quantised_bytes(rows, max_cols) + float_bytes(rows, max_cols);
}

void Linear::set_workspace(uint8_t* workspace, int64_t max_rows, int64_t max_cols) {
  chunk_rows_ = std::min(max_rows, kChunkRows);
  max_cols_ = max_cols;
  quantised_ = workspace;
  floats_ = workspace + quantised_bytes(chunk_rows_, max_cols);
}

int64_t Linear::Split::wide_bytes(int64_t cols) const {
  return num_wide * num_blocks(cols) * kWideBlockBytes;
}

Linear::Split Linear::split(int64_t num_rows, bool may_be_wide) const {
  Split split;
  if (may_be_wide && wide_ != nullptr) {
    const int64_t left = num_rows % kWidePanelRows;
    split.wide_rows = left >= kMinWideRows ? num_rows : num_rows - left;
    split.num_wide = static_cast<int>((split.wide_rows + kWidePanelRows - 1) / kWidePanelRows);
  }
  const auto& sizes = kernels_.product[0];  // all kinds have kernels for the same sizes
  int size = kMaxPanelRows;
  for (int64_t row = split.wide_rows; row < num_rows;) {
    while (sizes[size] == nullptr || row + size > num_rows) --size;
    split.panels[split.num_panels++] = {row, size};
    row += size;
  }
  return split;
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
    const Split of_integers = split(chunk.num_rows, cols >= kMinWideCols);
    const Split of_floats = split(chunk.num_rows, false);
    prepare(chunk, cols, quantised ? &of_integers : nullptr, floats ? &of_floats : nullptr);
    multiply(first, of_integers, of_floats, targets);
  }
}

void Linear::prepare(const LinearInput& input, int64_t cols, const Split* quantised,
                     const Split* floats) {
  const int num_wide = quantised != nullptr ? quantised->num_wide : 0;
  const int num_quantised = quantised != nullptr ? quantised->num_panels : 0;
  const int num_floats = floats != nullptr ? floats->num_panels : 0;
  pool_.parallel_for(num_wide + num_quantised + num_floats, [&](int64_t task, int) {
    const auto rows_of = [&](const Panel& panel, const float** rows) {
      for (int i = 0; i < panel.num_rows; ++i) {
        const int64_t row = panel.first_row + i;
        rows[i] = input.x + (input.rows != nullptr ? input.rows[row] : row) * cols;
      }
    };
    const float* rows[kWidePanelRows];
    if (task < num_wide) {
      const int64_t first = task * kWidePanelRows;
      const int64_t count = std::min<int64_t>(kWidePanelRows, quantised->wide_rows - first);
      rows_of({first, static_cast<int>(count)}, rows);
      wide_->quantise_panel(rows, static_cast<int>(count), cols,
                            quantised_ + task * num_blocks(cols) * kWideBlockBytes);
      return;
    }
    task -= num_wide;
    if (task < num_quantised) {
      const Panel& panel = quantised->panels[task];
      rows_of(panel, rows);
      const int64_t rows_before = panel.first_row - quantised->wide_rows;
      kernels_.quantise_panel(rows, panel.num_rows, cols,
                              quantised_ + quantised->wide_bytes(cols) +
                                  rows_before * num_blocks(cols) * kQuantisedBlockBytes);
      return;
    }
    const Panel& panel = floats->panels[task - num_quantised];
    rows_of(panel, rows);
    kernels_.float_panel(rows, panel.num_rows, cols,
                         floats_ + panel.first_row * num_blocks(cols) * kFloatBlockBytes);
  });
}

void Linear::multiply(int64_t first_row, const Split& quantised, const Split& floats,
                      std::span<const LinearTarget> targets) {
  int64_t num_tiles = 0;
  int64_t bytes = 0;
  for (const LinearTarget& target : targets) {
    num_tiles += matrix_of(target).layout().num_tiles;
    bytes += matrix_of(target).layout().bytes();
  }
  const int64_t least = quantised.num_wide > 0 ? kLeastWideTiles
                                               : (kLeastTaskBytes * num_tiles + bytes - 1) /
                                                     std::max<int64_t>(1, bytes);
  const Tasks tasks(num_tiles, pool_.num_threads(), least);
  pool_.parallel_for(tasks.count(), [&](int64_t task, int) {
    int64_t before = 0;  // tiles of the targets before
    for (const LinearTarget& target : targets) {
      const MatrixLayout& layout = matrix_of(target).layout();
      const int64_t begin = std::max<int64_t>(tasks.begin(task) - before, 0);
      const int64_t end = std::min(tasks.end(task) - before, layout.num_tiles);
      if (begin < end) {
        multiply_tiles(first_row, is_float_kind(layout.kind) ? floats : quantised, target, begin,
                       end - begin);
      }
      before += layout.num_tiles;
    }
  });
}

void Linear::multiply_tiles(int64_t first_row, const Split& split, const LinearTarget& target,
                            int64_t first_tile, int64_t num_tiles) {
  const CpuMatrix& matrix = matrix_of(target);
  const MatrixLayout& layout = matrix.layout();
  const int kind = static_cast<int>(layout.kind);
  const auto args_of = [&](int64_t tile, int64_t count) {
    const int64_t out_row = tile * kTileRows;
    ProductArgs args;
    args.tiles = matrix.tile(tile);
    args.tile_bytes = layout.tile_bytes;
    args.scale_offset = layout.scale_offset;
    args.cols = matrix.cols();
    args.bias = target.bias != nullptr ? target.bias + out_row : nullptr;
    args.out = static_cast<float*>(target.out) + first_row * matrix.rows() + out_row;
    args.out_stride = matrix.rows();
    args.num_rows = std::min((tile + count) * kTileRows, matrix.rows()) - out_row;
    args.accumulate = target.accumulate;
    return args;
  };
  if (split.num_wide > 0) {
    ProductArgs args = args_of(first_tile, num_tiles);
    args.panel = quantised_;
    wide_->product[kind](args, split.num_wide, split.wide_rows);
  }
  const bool is_float = is_float_kind(layout.kind);
  const int64_t block_bytes = is_float ? kFloatBlockBytes : kQuantisedBlockBytes;
  const uint8_t* prepared = is_float ? floats_ : quantised_ + split.wide_bytes(matrix.cols());
  // One panel: all tiles in one call. Several: a tile stays in L1 while the panels pass by.
  const int64_t step = split.num_panels <= 1 ? num_tiles : 1;
  for (int64_t tile = 0; tile < num_tiles; tile += step) {
    const ProductArgs of_tiles = args_of(first_tile + tile, step);
    for (int i = 0; i < split.num_panels; ++i) {
      const Panel& panel = split.panels[i];
      ProductArgs args = of_tiles;
      args.panel =
          prepared + (panel.first_row - split.wide_rows) * num_blocks(matrix.cols()) * block_bytes;
      args.out += panel.first_row * matrix.rows();
      kernels_.product[kind][panel.num_rows](args);
    }
  }
}

}  // namespace kvant::backend::cpu
