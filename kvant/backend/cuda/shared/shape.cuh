// What a shared-prefix kernel is at compile time: its memory, its barriers.
#pragma once

#include "kvant/backend/cuda/decode/shape.cuh"
#include "kvant/backend/cuda/shared/kernel_params.h"

namespace kvant::backend::cuda {

template <KeyKernel kKeyKernel, ValueKernel kValueKernel, int kDim>
struct SharedShape {
  static constexpr KeyKernel kKey = kKeyKernel;
  static constexpr ValueKernel kValue = kValueKernel;
  static constexpr int kHeadDim = kDim;
  static constexpr int kSteps = kDim / 16;
  static constexpr int kPartBytes = kSharedPageTokens * 128;
  static constexpr int kSideBytes = kDim / 64 * kPartBytes;
  // BF16 pages: BF16 products with queries and weights in two parts, the rounded and the rest. The
  // queries' rest is in shared memory.
  static constexpr bool kBf16 = kKeyKernel == KeyKernel::kBf16;
  static_assert(kBf16 == (kValueKernel == ValueKernel::kBf16), "one kind of products");
  static constexpr int kStages = kBf16 ? 3 : 4;
  static constexpr int kProducers = 4;  // warps
  static constexpr int kThreads = 256 + 32 * kProducers;
  // setmaxnreg moves registers to the consumers: 3 x 168 in all.
  static constexpr int kConsumerRegisters = kBf16 ? 208 : 192;
  static constexpr int kProducerRegisters = 504 - 2 * kConsumerRegisters;
  // Shared memory from a 1024-byte boundary on.
  static constexpr int kQueries = kStages * 2 * kSideBytes;
  static constexpr int kQueryPart = kSharedRows * 128;  // bytes of 64 channels
  static constexpr int kBarriers = kQueries + (kBf16 ? kDim / 64 * kQueryPart : 0);
  static constexpr int kReferences = kBarriers + 256;  // [producer]: channel scales of a page
  static constexpr int kRing = kReferences + (is_channel(kKeyKernel) ? kProducers * kDim * 4 : 0);
  static constexpr int kFixedBytes = kRing + 1024;
};

// mbarriers, in units of 8 bytes.
enum SharedBarrier {
  kRawFull = 0,
  kRawEmpty = kRawFull + kMaxSharedSlots,
  kSharedKeysFull = kRawEmpty + kMaxSharedSlots,
  kSharedKeysEmpty = kSharedKeysFull + 4,
  kSharedValuesFull = kSharedKeysEmpty + 4,
  kSharedValuesEmpty = kSharedValuesFull + 4,
};
static_assert((kSharedValuesEmpty + 4) * 8 <= 256);

// Position in a ring and how often it was around, modulo 2.
struct SharedSlot {
  int index = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(int size) {
    if (++index == size) index = 0, parity ^= 1;
  }
};

}  // namespace kvant::backend::cuda
