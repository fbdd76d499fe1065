// Sizes and barriers that the roles of a prefill attention block share (attention_kernel.cuh).
#pragma once

#include "kvant/backend/cuda/prefill/attention_kernel.h"
#include "kvant/backend/cuda/ptx.cuh"

namespace kvant::backend::cuda {

using formats::FormatId;

constexpr int kPrefillThreads = 384;

// What the producer's warpgroup does besides copying. Registers of the two roles: 512 = 2 consumers
// + 1 producer.
struct NoImages {
  static constexpr bool kWrites = false;
  // With more at 128, ptxas moves the rescaling of outputs into a warpgroup's turn.
  static constexpr int consumer_registers(int head_dim) { return head_dim == 128 ? 216 : 232; }
  static constexpr int producer_registers(int head_dim) { return head_dim == 128 ? 72 : 40; }
  struct Args {};
};
template <FormatId kK, FormatId kV>
struct WrittenImages {
  static constexpr bool kWrites = true;
  static constexpr int kHeadDim = 128;
  static constexpr int consumer_registers(int) { return 208; }
  static constexpr int producer_registers(int) { return 88; }
  static constexpr FormatId kKeys = kK;
  static constexpr FormatId kValues = kV;
  using Args = BackgroundImages;
};
constexpr int kStartRegisters = 168;  // 65536 / 384, rounded down to a multiple of 8
constexpr int kImageWarps = 3;

// What the producer says of an item in shared memory, where consumers read it, kItemSlots of them
// in turn.
struct alignas(128) TakenItem {
  QueryTile tile;        // no tokens if there is no item any more
  int32_t kv_head;       // -1: no item any more
  float value_scale[2];  // of the sequence and head, and its inverse (reference_floats)
};
constexpr int kTileWords = sizeof(QueryTile) / 4;
constexpr int kItemSlots = 4;

template <int kDim>
struct PrefillShape {
  static constexpr int kHeadDim = kDim;
  static constexpr int kKeys = key_tile_tokens(kHeadDim, ImageType::kF16);
  static constexpr int kParts = (kHeadDim + kImageChannels - 1) / kImageChannels;
  static constexpr int kRowBytes = 128;               // of a token in a part
  static constexpr int kQueryPart = kTileRows * 128;  // bytes of 64 channels of the query tile
  static constexpr int kKeyPart = kKeys * 128;
  static constexpr int kTileBytes = kParts * kKeyPart;
  static constexpr int kStages = 2;
  // Shared memory from a 1024-byte boundary on.
  static constexpr int kQueries = 0;
  static constexpr int kKeyTiles = kParts * kQueryPart;
  static constexpr int kValueTiles = kKeyTiles + kStages * kTileBytes;
  static constexpr int kShifts = kValueTiles + kStages * kTileBytes;  // [2][128] floats
  static constexpr int kBarriers = kShifts + 2 * kTileRows * 4;
  static constexpr int kItems = kBarriers + 16 * 8;
  static constexpr int kImages = kItems + kItemSlots * sizeof(TakenItem);
  static constexpr int kBytes = kImages + 1024;  // images: kImageWarps * fast_shared_bytes more
};

// Of E4M3 images: a slice is contiguous. Products take 32 channels at a time; where head_dim lacks
// 16, queries have zeros there and what keys have is what lies behind them: the next keys, or zeros
// that the block wrote.
template <int kDim>
struct PrefillShapeE4m3 {
  static constexpr int kHeadDim = kDim;
  static constexpr int kQueryDim = (kHeadDim + 31) / 32 * 32;
  static constexpr int kKeys = key_tile_tokens(kHeadDim, ImageType::kE4m3);
  static constexpr int kParts = 1;
  static constexpr int kRowBytes = kHeadDim;
  static constexpr int kKeyPart = kKeys * kRowBytes;
  static constexpr int kTileBytes = kKeyPart;
  static constexpr int kStages = 2;
  static constexpr int kQueries = 0;
  static constexpr int kKeyTiles = kTileRows * kQueryDim;
  static constexpr int kValueTiles = kKeyTiles + kStages * kTileBytes;
  static constexpr int kShifts = kValueTiles + kStages * kTileBytes;  // [2][128] floats
  static constexpr int kScales = kShifts + 2 * kTileRows * 4;         // [128] floats, of queries
  static constexpr int kOnes = kScales + kTileRows * 4;               // two core matrices
  static constexpr int kBarriers = kOnes + 2 * 128;
  static constexpr int kItems = kBarriers + 16 * 8;
  static constexpr int kBytes = kItems + kItemSlots * sizeof(TakenItem) + 1024;
};

// mbarriers, in units of 8 bytes from kBarriers; two of each, kItemSlots of the last.
enum PrefillBarrier {
  kKeysFull = 0,
  kKeysEmpty = 2,
  kValuesFull = 4,
  kValuesEmpty = 6,
  kItemFull = 8,
  kItemEmpty = kItemFull + kItemSlots
};
__device__ __forceinline__ void init_barriers(uint32_t bars) {
  for (int i = 0; i < 2; ++i) {
    ptx::mbarrier_init(bars + 8 * (kKeysFull + i), 1);
    ptx::mbarrier_init(bars + 8 * (kKeysEmpty + i), 8);  // consumer warps
    ptx::mbarrier_init(bars + 8 * (kValuesFull + i), 1);
    ptx::mbarrier_init(bars + 8 * (kValuesEmpty + i), 8);
  }
  for (int i = 0; i < kItemSlots; ++i) {
    ptx::mbarrier_init(bars + 8 * (kItemFull + i), 32);  // lanes of the producer
    ptx::mbarrier_init(bars + 8 * (kItemEmpty + i), 8);
  }
  ptx::fence_mbarrier_init();
}
// Named barriers: 1 and 2 give a warpgroup its turn, 3 and 4 are a warpgroup's own.
constexpr int kTurn = 1;
constexpr int kOwn = 3;

// Where item n of a block is; `items` is kItems.
__device__ __forceinline__ uint32_t item_address(uint32_t items, int n) {
  return items + n % kItemSlots * static_cast<uint32_t>(sizeof(TakenItem));
}
__device__ __forceinline__ const TakenItem& item_at(uint32_t items, int n) {
  return *static_cast<const TakenItem*>(__cvta_shared_to_generic(item_address(items, n)));
}
// For a consumer: waits until the producer has left it.
__device__ __forceinline__ const TakenItem& wait_for_item(uint32_t bars, uint32_t items, int n) {
  ptx::mbarrier_wait(bars + 8 * (kItemFull + n % kItemSlots), n / kItemSlots & 1);
  return item_at(items, n);
}
// A warp has read what it needs of it.
__device__ __forceinline__ void release_item(uint32_t bars, int n) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(bars + 8 * (kItemEmpty + n % kItemSlots));
}

__device__ __forceinline__ int slice_place(const QueryTile& tile, int slice) {
  if (slice < tile.num_sink) return tile.sink_place + slice;
  const int stored = slice - tile.num_sink;
  return stored < tile.num_stored ? tile.stored_place + stored
                                  : tile.bf16_place + stored - tile.num_stored;
}

}  // namespace kvant::backend::cuda
