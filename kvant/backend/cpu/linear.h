// Runs matrix products over the thread pool: prepares activations in panels, shares out tiles.
//
// Rows are taken in chunks small enough to stay in a core's L2 cache beside the weights. The sums
// of a row depend on nothing but the row: kernels walk inputs in order whatever the panel's size.
#pragma once

#include <cstdint>
#include <span>

#include "kvant/backend/backend.h"
#include "kvant/backend/cpu/kernels.h"
#include "kvant/backend/cpu/wide_kernels.h"
#include "kvant/base/thread_pool.h"

namespace kvant::backend::cpu {

// Where the rows of x are: row i at x + (rows ? rows[i] : i) * cols.
struct LinearInput {
  const float* x = nullptr;
  const int32_t* rows = nullptr;
  int64_t num_rows = 0;
};

class Linear {
 public:
  // `wide` may be null.
  Linear(ThreadPool& pool, const Kernels& kernels, const WideKernels* wide);

  // Scratch memory for products of `max_rows` rows at most (more rows take more chunks).
  int64_t workspace_bytes(int64_t max_rows, int64_t max_cols) const;
  // `workspace` has workspace_bytes(max_rows, max_cols) bytes, aligned to 64.
  void set_workspace(uint8_t* workspace, int64_t max_rows, int64_t max_cols);

  // All targets have the same number of columns, which the workspace covers.
  void run(const LinearInput& input, std::span<const LinearTarget> targets);

 private:
  static constexpr int64_t kChunkRows = kMaxWidePanels * kWidePanelRows;
  static constexpr int kMaxPanels = kChunkRows / 4 + 2;

  struct Panel {
    int64_t first_row;  // in the chunk
    int num_rows;
  };
  // The rows of a chunk: wide panels first, then panels of sizes that kernels.h has.
  struct Split {
    int num_wide = 0;
    int64_t wide_rows = 0;  // in wide panels; the last may have fewer than kWidePanelRows
    int num_panels = 0;
    Panel panels[kMaxPanels];
    int64_t wide_bytes(int64_t cols) const;  // of all wide panels
  };

  Split split(int64_t num_rows, bool may_be_wide) const;
  int64_t quantised_bytes(int64_t rows, int64_t cols) const;
  void prepare(const LinearInput& input, int64_t cols, const Split* quantised, const Split* floats);
  void multiply(int64_t first_row, const Split& quantised, const Split& floats,
                std::span<const LinearTarget> targets);
  void multiply_tiles(int64_t first_row, const Split& split, const LinearTarget& target,
                      int64_t first_tile, int64_t num_tiles);

  ThreadPool& pool_;
  const Kernels& kernels_;
  const WideKernels* wide_;
  int64_t chunk_rows_ = 0;
  int64_t max_cols_ = 0;
  uint8_t* quantised_ = nullptr;
  uint8_t* floats_ = nullptr;
};

}  // namespace kvant::backend::cpu
