// What blocks of products that decode weights multiply, and where it lies in their shared memory.
#pragma once

#include <cstdint>

#include "kvant/backend/cuda/dense/half_rows.cuh"
#include "kvant/backend/cuda/dense/product.h"
#include "kvant/backend/cuda/dense/product_tiles.cuh"

namespace kvant::backend::cuda {

inline constexpr int kConsumers = 8;    // warps
inline constexpr int kProducers = 128;  // threads
inline constexpr int kBlockThreads = 32 * kConsumers + kProducers;
inline constexpr int kConsumerRegisters = 232;
inline constexpr int kProducerRegisters = 40;
inline constexpr int kMostSplits = 8;
inline constexpr int kConsumersBarrier = 1;
inline constexpr int kAlignment = 1024;  // of swizzled rows

// What a block multiplies at a time: two strips of 16 outputs a warp, with kN rows of x. With a
// gate a warp has the same strip of both matrices, the gate's first.
inline constexpr int kStrips = 2;
inline constexpr int kSlots = kStrips * kConsumers;
inline constexpr int kOutputs = kSlots * kStripRows;
inline constexpr int kStageTiles = 2;
inline constexpr int kPartStride = kOutputs + 4;  // floats; spreads rows over banks

struct DecodedArgs {
  ProductTarget targets[kMaxProductTargets];
  int first_strip[kMaxProductTargets];  // of each target among all
  int num_targets;
  int num_strips;  // of all targets; with a gate, of one
  int num_tiles;
  int64_t strip_bytes;
  HalfRows rows;
  int num_rows;
  int num_row_tiles;
  int splits;  // blocks of a cluster, which share the inputs of an item
  int slots;   // of the ring
  int num_parts;
  bool gated;
  GateKind gate;
};

// An item, or a part of its inputs. Without splits blocks take items in turn.
template <int kN>
struct DecodedPart {
  int rank;
  int first_row;
  int item;
  int first_tile;  // and the last one's end: whole stages
  int end_tile;

  __device__ DecodedPart(const DecodedArgs& args, int index) {
    rank = index % args.splits;
    const int rest = index / args.splits;
    first_row = rest % args.num_row_tiles * kN;
    item = rest / args.num_row_tiles;
    const int stages = args.num_tiles / kStageTiles;
    first_tile = rank * stages / args.splits * kStageTiles;
    end_tile = (rank + 1) * stages / args.splits * kStageTiles;
  }
};

// Which strip of weights lies in a slot of a block.
struct SlotStrip {
  int target = 0;
  int strip;
  bool exists;

  __device__ SlotStrip(const DecodedArgs& args, int item, int slot) {
    strip = args.gated ? item * (kSlots / 2) + slot / 2 : item * kSlots + slot;
    exists = strip < args.num_strips;
    if (args.gated) {
      target = slot % 2;
      return;
    }
    while (target + 1 < args.num_targets && strip >= args.first_strip[target + 1]) ++target;
    strip -= args.first_strip[target];
  }
};

// Shared memory of a stage: rows of x, then the strips of all slots.
template <WeightType kType, int kN>
struct DecodedStage {
  static constexpr TileBytes kTile = tile_bytes(kType);
  static constexpr int kRowTile = kN * 128;
  static constexpr int kWeights = kStageTiles * kRowTile;
  static constexpr int kHighAt = kStageTiles * kTile.low;
  static constexpr int kScalesAt = kHighAt + kStageTiles * kTile.high;
  static constexpr int kSuperAt = kScalesAt + kStageTiles * kTile.scales;
  static constexpr int kStrip = kSuperAt + kTile.super;
  static constexpr int kBytes =
      (kWeights + kSlots * kStrip + kAlignment - 1) / kAlignment * kAlignment;

  // Tile i of a strip in shared memory, of a lane.
  static __device__ TilePlaces places(const uint8_t* strip, int i, int lane) {
    return lane_places<kType>({strip, strip + kHighAt, strip + kScalesAt, strip + kSuperAt}, i,
                              lane);
  }
};

}  // namespace kvant::backend::cuda
