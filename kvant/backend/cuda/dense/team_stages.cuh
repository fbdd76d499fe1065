// Stages of weights in shared memory that a team shares: of a strip, the tiles that its warps
// multiply next. A producer warp copies them in bulk.
#pragma once

#include <cstdint>

#include "kvant/backend/cuda/dense/product_items.cuh"
#include "kvant/backend/cuda/dense/product_tiles.cuh"

namespace kvant::backend::cuda {

// What a producer copies, `there` tiles from tile `first` on, at least two.
struct StageSource {
  const uint8_t* data;  // of the matrix
  int64_t strip;
  int64_t stride;  // of a strip, or of a row of floats
  int64_t rows;
  int num_tiles;
  int first;
  int there;
};

// Codes: parts of the strip's planes behind each other.
template <WeightType kType, bool kIsTiled = kTiled<kType>>
struct TeamStage {
  static constexpr TileBytes kTile = tile_bytes(kType);
  static constexpr int kUnit = kUnitTiles<kType>;  // tiles of a warp
  static constexpr int kTiles = kWarps * kUnit;
  static constexpr int kHighAt = kTiles * kTile.low;
  static constexpr int kScalesAt = kHighAt + kTiles * kTile.high;
  static constexpr int kSuperAt = kScalesAt + kTiles * kTile.scales;
  static constexpr int kBytes = (kSuperAt + kTiles / kGroupTiles * kTile.super + 127) / 128 * 128;

  template <typename Tile>
  static __device__ void load(Tile& raw, const uint8_t* stage, int tile, int lane) {
    raw.load_shared(lane_places<kType>(
        {stage, stage + kHighAt, stage + kScalesAt, stage + kSuperAt}, tile, lane));
  }

  // By a warp, whose first lane does it.
  static __device__ void copy(const StageSource& from, uint32_t target, uint32_t full, int lane,
                              uint64_t policy) {
    if (lane != 0) return;
    const StripPlanes planes(kTile, from.num_tiles);
    const uint8_t* const strip = from.data + from.strip * from.stride;
    const int groups = (from.there + kGroupTiles - 1) / kGroupTiles;
    const int super = groups * kTile.super;
    ptx::begin_copies(full, from.there * (kTile.low + kTile.high + kTile.scales) + super);
    ptx::bulk_copy(target, strip + from.first * kTile.low, from.there * kTile.low, full, policy);
    if constexpr (kTile.high > 0) {
      ptx::bulk_copy(target + kHighAt, strip + planes.high + from.first * kTile.high,
                     from.there * kTile.high, full, policy);
    }
    if constexpr (kTile.scales > 0) {
      ptx::bulk_copy(target + kScalesAt, strip + planes.scales + from.first * kTile.scales,
                     from.there * kTile.scales, full, policy);
    }
    if constexpr (kTile.super > 0) {
      ptx::bulk_copy(target + kSuperAt,
                     strip + planes.super + from.first / kGroupTiles * kTile.super, super, full,
                     policy);
    }
  }
};

// Floats of 16 bits: rows, apart by half a turn of the banks more than their tiles.
template <WeightType kType>
struct TeamStage<kType, false> {
  static constexpr int kUnit = 1;
  static constexpr int kTiles = kWarps * kUnit;
  static constexpr int kTileBytes = kTileCols * 2;  // of a row
  static constexpr int kRowBytes = kTiles * kTileBytes + 64;
  static constexpr int kBytes = kStripRows * kRowBytes;

  template <typename Tile>
  static __device__ void load(Tile& raw, const uint8_t* stage, int tile, int lane) {
    raw.load_shared(stage + lane / 4 * kRowBytes + tile * kTileBytes + lane % 4 * 16, 8 * kRowBytes,
                    64);
  }

  // By a warp; each row is one lane's. The last row stands for those that are not there.
  static __device__ void copy(const StageSource& from, uint32_t target, uint32_t full, int lane,
                              uint64_t policy) {
    const int bytes = from.there * kTileBytes;
    if (lane == 0) ptx::begin_copies(full, kStripRows * bytes);
    __syncwarp();
    if (lane < kStripRows) {
      const int64_t row = min(from.strip * kStripRows + lane, from.rows - 1);
      ptx::bulk_copy(target + lane * kRowBytes,
                     from.data + row * from.stride + from.first * kTileBytes, bytes, full, policy);
    }
  }
};

inline constexpr int kMostSlots = 8;  // of a team's ring
inline constexpr int kNoItem = -1;

// What a team and its producer have in common.
struct TeamSlots {
  uint64_t full[kMostSlots];   // barriers: copies are there,
  uint64_t empty[kMostSlots];  // and every warp has read them
  int item[kMostSlots];        // whose stage it is; kNoItem: there are no more
};

// By a warp.
__device__ inline void init_slots(TeamSlots& slots, int count, int lane) {
  if (lane < count) {
    ptx::mbarrier_init(ptx::shared_address(&slots.full[lane]), ptx::kCopyArrivals);
    ptx::mbarrier_init(ptx::shared_address(&slots.empty[lane]), kWarps);
    ptx::fence_mbarrier_init();
  }
  __syncwarp();
}

// The slot of a ring that comes next, and the turn of the ring.
struct TeamRing {
  uint32_t full;
  uint32_t empty;
  int slots;
  int slot = 0;
  uint32_t turns = 0;  // that are complete

  __device__ TeamRing(const TeamSlots& of, int count)
      : full(ptx::shared_address(of.full)), empty(ptx::shared_address(of.empty)), slots(count) {}
  __device__ uint32_t full_slot() const { return full + slot * 8; }
  __device__ void wait_full() const { ptx::mbarrier_wait(full_slot(), turns % 2); }
  __device__ void wait_empty() const { ptx::mbarrier_wait(empty + slot * 8, turns % 2 ^ 1); }
  __device__ void release() const { ptx::mbarrier_arrive(empty + slot * 8); }
  __device__ void advance() {
    if (++slot < slots) return;
    slot = 0;
    ++turns;
  }
};

}  // namespace kvant::backend::cuda
