// The ring of shared-memory slots between a producer and one team of consumer warps.
//
// A step of the walk is a page, or a tile of 16 tokens of a 16-bit page. It takes one slot, values
// after keys; or two, one for its keys, one for its values. What the consumers must know of a step
// stands in the SlotInfo of its keys, written before the copy starts.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvant/backend/cuda/decode/kernel_params.h"
#include "kvant/backend/cuda/ptx.cuh"

namespace kvant::backend::cuda {

struct alignas(8) SlotInfo {
  int32_t flags;
  int32_t position;  // of the first token of the page or tile
};
inline constexpr int32_t kStepIsTile = 1;    // else a page
inline constexpr int32_t kStepIsF16 = 2;     // of a tile: fp16 instead of BF16
inline constexpr int32_t kStepIsMasked = 4;  // some query does not read some of its tokens
inline constexpr int32_t kStepIsLast = 8;    // of its segment
inline constexpr int kStepTileShift = 8;     // from here: number of the tile in its page

struct Slot {
  int index;
  uint32_t parity;
};

// In shared memory: hand-over and contents of the slots.
struct RingState {
  uint64_t full[kMaxSlots];
  uint64_t empty[kMaxSlots];
  SlotInfo infos[kMaxSlots];
};

// `kTakesSteps`: a slot takes keys and values.
template <bool kTakesSteps>
struct Ring {
  std::byte* slots;
  RingState* state;
  int num_slots;
  int slot_bytes;
  Slot next = {0, 0};

  __device__ __forceinline__ Slot after_next() const {
    return next.index + 1 == num_slots ? Slot{0, next.parity ^ 1}
                                       : Slot{next.index + 1, next.parity};
  }
  __device__ __forceinline__ Slot take() {
    const Slot slot = next;
    next = after_next();
    return slot;
  }
  // The slot of the values whose keys are in `keys`.
  __device__ __forceinline__ Slot take_values(Slot keys) { return kTakesSteps ? keys : take(); }
  __device__ __forceinline__ std::byte* data(Slot slot) const {
    return slots + slot.index * slot_bytes;
  }
  // Values in their slot, after keys of so many bytes if those are there, too.
  __device__ __forceinline__ std::byte* values(Slot slot, int key_bytes) const {
    return data(slot) + (kTakesSteps ? key_bytes : 0);
  }
  __device__ __forceinline__ void wait(Slot slot) const {
    ptx::mbarrier_wait(full(slot), slot.parity);
  }
  __device__ __forceinline__ void wait_values(Slot slot) const {
    if (!kTakesSteps) wait(slot);
  }
  __device__ __forceinline__ uint32_t full(Slot slot) const {
    return ptx::shared_address(&state->full[slot.index]);
  }
  __device__ __forceinline__ uint32_t empty(Slot slot) const {
    return ptx::shared_address(&state->empty[slot.index]);
  }
  __device__ __forceinline__ SlotInfo& info(Slot slot) const { return state->infos[slot.index]; }
  // By a warp that has read the slot.
  __device__ __forceinline__ void release(Slot slot, int lane) const {
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(empty(slot));
  }
  // By a warp that has read the keys.
  __device__ __forceinline__ void release_keys(Slot slot, int lane) const {
    if (!kTakesSteps) release(slot, lane);
  }
};

}  // namespace kvant::backend::cuda
