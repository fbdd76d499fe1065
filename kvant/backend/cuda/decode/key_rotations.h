// Angles that decode attention rotates by where keys are stored before RoPE (pre_rope_keys.cuh):
// of the first position of every page for the queries, of the places in a page for the keys.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kvant/attention/problem.h"
#include "kvant/base/result.h"

namespace kvant::backend::cuda {

// kUnsupported for a rotary_dim that kernels of `head_dim` lack: it must be a multiple of 16.
Status check_key_rotation(const attention::RopeParams& rope, int head_dim);

// Frequency factors are told apart by their address.
bool same_rope(const attention::RopeParams& a, const attention::RopeParams& b);

// Made once for a setting and kept from step to step. Thread-compatible.
class KeyRotations {
 public:
  struct Tables {
    // [page][rotary_dim / 2]: cosine and sine of p f_i, times 2 attention_factor, with p the
    // page's first position.
    const float2* pages = nullptr;
    // [tile][octet of the pairs][lane][4]: fp16 pairs cos j f_i / 2 of tokens g and g + 8, then
    // their sines, of pairs 8 octet + 2 t and the next one (lane = 4 g + t).
    const uint4* tokens = nullptr;
  };

  KeyRotations() = default;
  KeyRotations(const KeyRotations&) = delete;
  KeyRotations& operator=(const KeyRotations&) = delete;
  ~KeyRotations();

  // Device memory for contexts of up to `max_context` tokens.
  static int64_t workspace_bytes(int head_dim, int page_tokens, int64_t max_context);
  // Device memory to work in, whose owner keeps it; null takes it away. Nothing may be in use.
  void use(std::byte* memory, int64_t bytes);
  // Has memory of its own: what it was given did not do.
  bool outgrew() const { return slots_[0].owned != nullptr || slots_[1].owned != nullptr; }

  // Tables of at least `num_pages` pages of `page_tokens`. Waits for the device where it makes
  // them: kernels that read them may start before those in front of them have ended. Frequency
  // factors are device memory.
  Result<Tables> get(const attention::RopeParams& rope, int page_tokens, int64_t num_pages,
                     cudaStream_t stream);

 private:
  struct Slot {
    attention::RopeParams rope;
    int page_tokens = 0;
    int64_t num_pages = 0;  // that the tables hold; 0: none
    int64_t last_use = 0;
    std::byte* memory = nullptr;  // owned, or a part of what was given
    std::byte* owned = nullptr;
    int64_t bytes = 0;
    Tables tables;
  };
  Status fill(Slot& slot, const attention::RopeParams& rope, int page_tokens, int64_t num_pages,
              cudaStream_t stream);

  static constexpr int kNumSlots = 2;  // layers with and without a window
  Slot slots_[kNumSlots];
  int64_t clock_ = 0;
};

}  // namespace kvant::backend::cuda
