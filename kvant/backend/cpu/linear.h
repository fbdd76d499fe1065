// Runs matrix products over the thread pool: prepares activations in panels, shares out tiles.
//
// Rows are taken in chunks small enough to stay in a core's L2 cache beside the weights. The sums
// of a row depend on nothing but the row: kernels walk inputs in order whatever the panel's size.
#pragma once

#include <cstdint>
#include <span>

#include "kvant/backend/backend.h"
#include "kvant/backend/cpu/kernels.h"
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
  Linear(ThreadPool& pool, const Kernels& kernels);

  // Scratch memory for products of `max_rows` rows at most (more rows take more chunks).
  static int64_t workspace_bytes(int64_t max_rows, int64_t max_cols);
  // `workspace` has workspace_bytes(max_rows, max_cols) bytes, aligned to 64.
  void set_workspace(uint8_t* workspace, int64_t max_rows, int64_t max_cols);

  // All targets have the same number of columns, which the workspace covers.
  void run(const LinearInput& input, std::span<const LinearTarget> targets);

 private:
  struct Panel {
    int64_t first_row;  // in the chunk
    int num_rows;
  };
  static constexpr int64_t kChunkRows = 96;
  static constexpr int kMaxPanels = kChunkRows / 4 + 2;

  int split_into_panels(int64_t num_rows, Panel (&panels)[kMaxPanels]) const;
  void prepare(const LinearInput& input, int64_t cols, std::span<const Panel> panels,
               bool quantised, bool floats);
  void multiply(int64_t first_row, std::span<const Panel> panels,
                std::span<const LinearTarget> targets);

  ThreadPool& pool_;
  const Kernels& kernels_;
  int64_t chunk_rows_ = 0;
  int64_t max_cols_ = 0;
  uint8_t* quantised_ = nullptr;
  uint8_t* floats_ = nullptr;
};

}  // namespace kvant::backend::cpu
