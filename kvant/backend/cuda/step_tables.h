// What append needs of a step's tables, in device memory: one pinned buffer and one copy per layer
// group.
//
// Work of one stream: a table is overwritten in the order of that stream. Thread-compatible.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kvant/backend/cuda/append_items.h"
#include "kvant/base/result.h"
#include "kvant/cache/view.h"

namespace kvant::backend::cuda {

class StepTables {
 public:
  // In device memory, valid for work enqueued before the next get() of the same view.
  struct Table {
    const AppendItem* rows = nullptr;
    int num_rows = 0;
    const ClosedPage* closes = nullptr;
    int num_closes = 0;
    bool closes_append = false;  // some pages' rows are left to their closing
  };

  StepTables();
  StepTables(const StepTables&) = delete;
  StepTables& operator=(const StepTables&) = delete;
  ~StepTables();

  // The lists of `view`. They are made anew and compared with those of the last call with the same
  // view's address; only if they differ (another step) are they sent. The device memory stays where
  // it is as long as it is large enough. Waits only if the copy before the last still runs.
  Result<Table> get(const cache::GroupView& view, cudaStream_t stream);

 private:
  struct Slot;
  Status send(Slot& slot, cudaStream_t stream);

  std::vector<std::unique_ptr<Slot>> slots_;
  AppendLists lists_;
};

}  // namespace kvant::backend::cuda
