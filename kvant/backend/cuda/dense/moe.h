// Mixture of experts on the device. Few rows: every chosen (row, expert) pair is one block row of
// the exact product, which finds its matrix through a table, so that nothing waits for the host.
// Many rows: the host learns the choices, and each expert multiplies its rows together. Experts are
// added in the order of their rank, whichever way was taken.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "kvant/backend/backend.h"
#include "kvant/backend/cuda/dense/linear.h"
#include "kvant/backend/cuda/device_memory.h"
#include "kvant/base/result.h"

namespace kvant::backend::cuda {

class CudaMoe {
 public:
  static int64_t workspace_bytes(const WorkspaceNeeds& needs);
  // `workspace` has workspace_bytes(needs) bytes, aligned to 256.
  void set_workspace(std::byte* workspace, const WorkspaceNeeds& needs);

  // Waits for the stream if there are many rows.
  Status run(const MoeArgs& args, CudaLinear& linear, UploadRing& ring, cudaStream_t stream);

 private:
  struct Layout;
  struct Call {
    const MoeArgs& args;
    CudaLinear& linear;
    UploadRing& ring;
    cudaStream_t stream;
    const float* x;  // of the chunk
    float* out;
    int64_t num_rows;
    int64_t pairs() const { return num_rows * args.num_experts_used; }
  };

  Status route(const Call& call);
  Status run_pairs(const Call& call);
  Status run_grouped(const Call& call);
  Status run_expert(const Call& call, int expert, int64_t first, int64_t count);

  int64_t max_rows_ = 0;                // of a chunk
  float* logits_ = nullptr;             // [max_rows][experts]
  int32_t* chosen_ = nullptr;           // [pair]
  float* weights_ = nullptr;            // [pair]
  int64_t* places_ = nullptr;           // [pair] grouped: its row of `down_`, then of x
  const uint8_t** matrices_ = nullptr;  // [3][experts]
  float* gathered_ = nullptr;           // [pair][dim]; grouped only
  float* gate_ = nullptr;               // [pair][expert_dim]
  float* up_ = nullptr;
  float* down_ = nullptr;  // [pair][dim]
  // Host side of run_grouped; kept between calls.
  std::vector<int32_t> host_chosen_;
  std::vector<int64_t> start_, place_of_pair_, row_of_place_;
};

}  // namespace kvant::backend::cuda
