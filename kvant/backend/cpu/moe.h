// Mixture of experts on CPUs: route, group rows by expert, run each chosen expert once.
#pragma once

#include <cstdint>

#include "kvant/backend/backend.h"
#include "kvant/backend/cpu/linear.h"

namespace kvant::backend::cpu {

class MoeRunner {
 public:
  MoeRunner(ThreadPool& pool, const Kernels& kernels, Linear& linear)
      : pool_(pool), kernels_(kernels), linear_(linear) {}

  // `max_cols` covers the model dimension. 0 bytes for models without experts.
  static int64_t workspace_bytes(const WorkspaceNeeds& needs);
  void set_workspace(uint8_t* workspace, const WorkspaceNeeds& needs);

  // A row's result is summed over its experts in ascending order of their indices.
  void run(const MoeArgs& args);

 private:
  struct Layout;
  void route(const MoeArgs& args, const float* x, int64_t num_rows);
  void group_by_expert(const MoeArgs& args, int64_t num_rows);
  void run_expert(const MoeArgs& args, int expert, const float* x, float* out);

  ThreadPool& pool_;
  const Kernels& kernels_;
  Linear& linear_;

  int64_t max_rows_ = 0;             // rows routed at a time
  float* logits_ = nullptr;          // [rows][experts]
  int32_t* chosen_ = nullptr;        // [rows][used], most probable first
  float* weights_ = nullptr;         // [rows][used]
  int32_t* expert_start_ = nullptr;  // [experts + 1]: where an expert's rows begin below
  int32_t* expert_rows_ = nullptr;   // [rows * used]
  float* expert_weights_ = nullptr;  // [rows * used]
  float* gate_ = nullptr;            // [kExpertRows][expert_dim]
  float* up_ = nullptr;              // [kExpertRows][expert_dim]
  float* down_ = nullptr;            // [kExpertRows][dim]
};

// Softmax over the logits of one row, then the `used` most probable experts, ties to the lowest
// index; with `normalize` their weights sum to 1. logits are overwritten by probabilities.
void choose_experts(float* logits, int num_experts, int used, bool normalize, int32_t* chosen,
                    float* weights);

}  // namespace kvant::backend::cpu
