// Cosines and sines of RoPE for the rows of one step, kept from layer to layer.
#pragma once

#include <cstdint>

#include "kvant/attention/problem.h"

namespace kvant::backend::cpu {

// A few tables (models have at most two RoPE settings), each for one setting and the positions of
// the last step that used it. Lies in workspace memory.
class RopeTables {
 public:
  static int64_t workspace_bytes(int64_t max_rows, int head_dim);
  void set_workspace(uint8_t* workspace, int64_t max_rows, int head_dim);

  // [num_rows][2][rotary_dim / 2]: cosines, then sines, times the attention factor. Valid until the
  // next call. num_rows and rotary_dim are within what the workspace was made for.
  const float* get(const attention::RopeParams& rope, const int64_t* positions, int64_t num_rows);

  // Cosines and sines of one position; also for tests.
  static void compute(const attention::RopeParams& rope, int64_t position,
                      const double* frequencies, float* cos_sin);
  // [rotary_dim / 2] radians per unit of position.
  static void compute_frequencies(const attention::RopeParams& rope, double* frequencies);

 private:
  static constexpr int kNumSlots = 2;
  struct Slot {
    attention::RopeParams rope;
    int64_t num_rows = 0;  // 0: empty
    int64_t last_use = 0;
    bool has_factors = false;
    double* frequencies = nullptr;  // [head_dim / 2]
    float* factors = nullptr;       // [head_dim / 2], a copy
    int64_t* positions = nullptr;   // [max_rows]
    float* table = nullptr;         // [max_rows][head_dim]
  };
  static bool same_setting(const Slot& slot, const attention::RopeParams& rope);
  void assign(Slot& slot, const attention::RopeParams& rope);

  Slot slots_[kNumSlots];
  int64_t max_rows_ = 0;
  int head_dim_ = 0;
  int64_t clock_ = 0;
};

}  // namespace kvant::backend::cpu
