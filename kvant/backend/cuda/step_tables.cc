#include "kvant/backend/cuda/step_tables.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "kvant/backend/cuda/status.h"

namespace kvant::backend::cuda {

// One layer group. Two pinned buffers take turns, so that a step's lists are written while the copy
// of the step before may still run.
struct StepTables::Slot {
  const cache::GroupView* view = nullptr;
  AppendLists lists;
  bool sent = false;
  int64_t capacity = 0;  // bytes of each buffer
  std::byte* device = nullptr;
  std::byte* pinned[2] = {nullptr, nullptr};
  cudaEvent_t copied[2] = {nullptr, nullptr};
  int turn = 0;

  ~Slot() { release(); }
  void release() {
    cudaFree(device);
    device = nullptr;
    for (int i = 0; i < 2; ++i) {
      if (copied[i] != nullptr) {
        cudaEventSynchronize(copied[i]);
        cudaEventDestroy(copied[i]);
        copied[i] = nullptr;
      }
      cudaFreeHost(pinned[i]);
      pinned[i] = nullptr;
    }
    capacity = 0;
  }
  Status reserve(int64_t bytes) {
    if (bytes <= capacity) return {};
    release();  // cudaFree waits for the device: nothing reads the buffers any more
    const int64_t room = std::max<int64_t>(4096, bytes + bytes / 2);
    KVANT_TRY(cuda_status(cudaMalloc(&device, room), "allocating step tables"));
    for (int i = 0; i < 2; ++i) {
      KVANT_TRY(cuda_status(cudaMallocHost(&pinned[i], room), "allocating pinned step tables"));
      KVANT_TRY(cuda_status(cudaEventCreateWithFlags(&copied[i], cudaEventDisableTiming),
                            "making an event"));
    }
    capacity = room;
    return {};
  }
  int64_t row_bytes() const { return static_cast<int64_t>(lists.rows.size() * sizeof(AppendItem)); }
  int64_t close_bytes() const {
    return static_cast<int64_t>(lists.closes.size() * sizeof(ClosedPage));
  }
};

StepTables::StepTables() = default;
StepTables::~StepTables() = default;

Status StepTables::send(Slot& slot, cudaStream_t stream) {
  const int64_t bytes = slot.row_bytes() + slot.close_bytes();
  KVANT_TRY(slot.reserve(bytes));
  if (bytes == 0) return {};
  slot.turn = 1 - slot.turn;
  KVANT_TRY(cuda_status(cudaEventSynchronize(slot.copied[slot.turn]), "copying step tables"));
  std::byte* host = slot.pinned[slot.turn];
  if (slot.row_bytes() > 0) std::memcpy(host, slot.lists.rows.data(), slot.row_bytes());
  if (slot.close_bytes() > 0)
    std::memcpy(host + slot.row_bytes(), slot.lists.closes.data(), slot.close_bytes());
  KVANT_TRY(cuda_status(cudaMemcpyAsync(slot.device, host, bytes, cudaMemcpyHostToDevice, stream),
                        "copying step tables"));
  return cuda_status(cudaEventRecord(slot.copied[slot.turn], stream), "copying step tables");
}

Result<StepTables::Table> StepTables::get(const cache::GroupView& view, cudaStream_t stream) {
  KVANT_TRY(list_append_items(view, lists_));
  Slot* slot = nullptr;
  for (const std::unique_ptr<Slot>& known : slots_) {
    if (known->view == &view) slot = known.get();
  }
  if (slot == nullptr) {
    slots_.push_back(std::make_unique<Slot>());
    slot = slots_.back().get();
    slot->view = &view;
  }
  if (!slot->sent || !(slot->lists == lists_)) {
    slot->sent = false;
    std::swap(slot->lists, lists_);
    KVANT_TRY(send(*slot, stream));
    slot->sent = true;
  }
  return Table{.rows = reinterpret_cast<const AppendItem*>(slot->device),
               .num_rows = static_cast<int>(slot->lists.rows.size()),
               .closes = reinterpret_cast<const ClosedPage*>(slot->device + slot->row_bytes()),
               .num_closes = static_cast<int>(slot->lists.closes.size()),
               .closes_append = std::ranges::any_of(
                   slot->lists.closes, [](const ClosedPage& page) { return page.row >= 0; })};
}

}  // namespace kvant::backend::cuda
