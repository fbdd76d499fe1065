// Cosines and sines of a step's positions, computed on the device once per step and setting: all
// layers of a step share them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <vector>

#include "kvant/attention/problem.h"
#include "kvant/backend/cuda/device_memory.h"
#include "kvant/base/result.h"

namespace kvant::backend::cuda {

class RopeTables {
 public:
  static int64_t workspace_bytes(int64_t max_rows, int head_dim);
  // Forgets what was computed. `workspace` is aligned to 256.
  void set_workspace(std::byte* workspace, int64_t max_rows, int head_dim);

  // Device memory [num_rows][rotary_dim], see rope_table(). Frequency factors are told apart by
  // their address: they do not change while a model is loaded.
  Result<const float*> get(const attention::RopeParams& rope, std::span<const int64_t> positions,
                           UploadRing& ring, cudaStream_t stream);

 private:
  static constexpr int kNumSlots = 2;  // layers with and without a window
  struct Slot {
    attention::RopeParams rope;
    std::vector<int64_t> positions;  // of the table; empty: none
    int64_t last_use = 0;
    int64_t* device_positions = nullptr;
    float* table = nullptr;
  };

  int64_t max_rows_ = 0;
  int head_dim_ = 0;
  int64_t clock_ = 0;
  Slot slots_[kNumSlots];
};

}  // namespace kvant::backend::cuda
