// The warpgroup that copies what products that decode weights multiply.
#pragma once

#include <cstdint>

#include "kvant/backend/cuda/dense/decoded_items.cuh"
#include "kvant/backend/cuda/dense/team_stages.cuh"
#include "kvant/backend/cuda/hopper.cuh"

namespace kvant::backend::cuda {

// Copies stages by a warpgroup. Weights go in pieces of 16 bytes, eight threads a strip: as bulk
// copies they would be 48 small ones a stage, which a warp issues one after the other. Rows of x
// are two bulk copies.
template <WeightType kType, int kN>
class DecodedProducer {
 public:
  using Stage = DecodedStage<kType, kN>;

  __device__ DecodedProducer(const DecodedArgs& args, TeamRing ring, uint32_t memory, int thread)
      : args_(args),
        ring_(ring),
        memory_(memory),
        thread_(thread),
        piece_(thread % kThreadsOfStrip * 16),
        target_(memory + Stage::kWeights + thread / kThreadsOfStrip * Stage::kStrip) {}

  // Weights do not change; rows are there once the launch before has ended.
  __device__ void run() {
    auto index = static_cast<int>(blockIdx.x);
    const DecodedPart<kN> first(args_, index);
    find(first);
    const int ahead = min(first.first_tile + args_.slots * kStageTiles, first.end_tile);
    TeamRing weights = ring_;
    for (int tile = first.first_tile; tile < ahead; tile += kStageTiles, weights.advance()) {
      copy_weights(weights, tile);
    }
    ptx::wait_prerequisites();
    for (int tile = first.first_tile; tile < ahead; tile += kStageTiles, ring_.advance()) {
      copy_rows(tile);
    }
    copy(ahead, first.end_tile);
    for (index += gridDim.x; index < args_.num_parts; index += gridDim.x) {
      const DecodedPart<kN> part(args_, index);
      find(part);
      copy(part.first_tile, part.end_tile);
    }
  }

 private:
  static constexpr int kThreadsOfStrip = kProducers / kSlots;

  __device__ void find(const DecodedPart<kN>& part) {
    const SlotStrip place(args_, part.item, thread_ / kThreadsOfStrip);
    exists_ = place.exists;
    strip_ = args_.targets[place.target].weights.data + place.strip * args_.strip_bytes + piece_;
    row_bytes_ = min(kN, padded_rows(args_.num_rows - part.first_row)) * 128;
    rows_ = args_.rows.image + part.first_row * 128;
  }
  // Stages of tiles [tile, end).
  __device__ void copy(int tile, int end) {
    for (; tile < end; tile += kStageTiles, ring_.advance()) {
      ring_.wait_empty();
      copy_weights(ring_, tile);
      copy_rows(tile);
    }
  }
  // The thread's pieces of one plane of the strip.
  template <int kPlaneBytes>
  __device__ void copy_plane(uint32_t target, const uint8_t* source) const {
#pragma unroll
    for (int at = 0; at < kPlaneBytes; at += 16 * kThreadsOfStrip) {
      if (at + 16 * kThreadsOfStrip <= kPlaneBytes || at + piece_ < kPlaneBytes) {
        ptx::copy_16(target + piece_ + at, source + at);
      }
    }
  }
  __device__ void copy_weights(const TeamRing& ring, int tile) const {
    constexpr TileBytes kTile = Stage::kTile;
    if (exists_) {
      const StripPlanes planes(kTile, args_.num_tiles);
      const uint32_t target = target_ + ring.slot * Stage::kBytes;
      copy_plane<kStageTiles * kTile.low>(target, strip_ + tile * kTile.low);
      copy_plane<kStageTiles * kTile.high>(target + Stage::kHighAt,
                                           strip_ + planes.high + tile * kTile.high);
      copy_plane<kStageTiles * kTile.scales>(target + Stage::kScalesAt,
                                             strip_ + planes.scales + tile * kTile.scales);
      copy_plane<kTile.super>(target + Stage::kSuperAt,
                              strip_ + planes.super + tile / kGroupTiles * kTile.super);
    }
    ptx::copies_arrive(ring.full_slot());
  }
  __device__ void copy_rows(int tile) const {
    if (thread_ != 0) return;
    const uint32_t full = ring_.full_slot();
    ptx::begin_copies(full, kStageTiles * row_bytes_);
#pragma unroll
    for (int i = 0; i < kStageTiles; ++i) {
      bulk_copy(memory_ + ring_.slot * Stage::kBytes + i * Stage::kRowTile,
                rows_ + (tile + i) * args_.rows.tile_bytes, row_bytes_, full);
    }
  }

  const DecodedArgs& args_;
  TeamRing ring_;
  const uint32_t memory_;
  const int thread_;
  const int piece_;                 // where the thread's first piece of a plane is
  const uint32_t target_;           // of the strip in the first slot of the ring
  bool exists_ = false;             // the strip
  const uint8_t* strip_ = nullptr;  // from the thread's piece on
  const uint8_t* rows_ = nullptr;
  int row_bytes_ = 0;  // of a tile
};

}  // namespace kvant::backend::cuda
