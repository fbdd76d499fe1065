// The ring of shared-memory slots between the producer warp and one team of consumer warps.
//
// A step of the walk is one half (keys or values) of a page, or of a tile of 16 tokens of a 16-bit
// page: it takes one slot. Keys and values alternate. What the consumers must know of a step stands
// in its SlotInfo, written before the copy starts.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvant/backend/cuda/ptx.cuh"

namespace kvant::backend::cuda {

inline constexpr int kMaxSlots = 6;

struct alignas(8) SlotInfo {
  int32_t flags;
  int32_t position;  // of the first token of the page or tile
};
inline constexpr int32_t kStepIsTile = 1;    // else a whole page
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

struct Ring {
  std::byte* slots;
  RingState* state;
  int num_slots;
  int slot_bytes;
  Slot next = {0, 0};

  __device__ __forceinline__ Slot take() {
    const Slot slot = next;
    if (++next.index == num_slots) next = {0, next.parity ^ 1};
    return slot;
  }
  __device__ __forceinline__ std::byte* data(Slot slot) const {
    return slots + slot.index * slot_bytes;
  }
  __device__ __forceinline__ void wait(Slot slot) const {
    ptx::mbarrier_wait(full(slot), slot.parity);
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
};

}  // namespace kvant::backend::cuda
