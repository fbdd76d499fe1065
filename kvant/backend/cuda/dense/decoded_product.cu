#include "kvant/backend/cuda/dense/decoded_product.h"

#include <algorithm>
#include <limits>

#include "kvant/backend/cuda/dense/file_blocks.cuh"
#include "kvant/backend/cuda/dense/gate.cuh"
#include "kvant/backend/cuda/dense/half_operands.cuh"
#include "kvant/backend/cuda/dense/row_norm.cuh"
#include "kvant/backend/cuda/dense/team_stages.cuh"
#include "kvant/backend/cuda/device.h"
#include "kvant/backend/cuda/launch.h"
#include "kvant/backend/cuda/prefill/hopper.cuh"
#include "kvant/backend/cuda/status.h"
#include "kvant/base/check.h"

namespace kvant::backend::cuda {
namespace {

// ---- rows of x ----

// Images of rows: [tile of 64 inputs][row] 128 bytes, swizzled as wgmma reads them, and what sums
// of each row are multiplied with. Rows are padded to 8. In each 16 inputs those that a lane of
// weights holds lie where it expects them (half_operands.cuh): 4 c and 4 c + 1 at 2 c, the two
// after them at 2 c + 8.
struct HalfRows {
  uint8_t* image;
  float* factors;  // [rows]
  int64_t tile_bytes;

  HalfRows() = default;
  __host__ __device__ HalfRows(std::byte* at, int64_t rows, int64_t padded_cols)
      : image(reinterpret_cast<uint8_t*>(at)), tile_bytes((rows + 7) / 8 * 8 * 128) {
    factors = reinterpret_cast<float*>(image + padded_cols / kTileCols * tile_bytes);
  }

  // Inputs at, .., at + 7 of a row.
  __device__ void put(int64_t row, int at, const float (&x)[8]) const {
    uint8_t* const tile = image + at / kTileCols * tile_bytes + row * 128;
    const int chunk = at % kTileCols / 16 * 2;
    const int in_chunk = at % 16;  // in bytes: 8 for the upper inputs
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto place = static_cast<int64_t>((chunk + half) ^ static_cast<int>(row % 8)) * 16;
      *reinterpret_cast<uint2*>(tile + place + in_chunk) =
          make_uint2(ptx::f16x2_of_f32(x[2 * half], x[2 * half + 1]),
                     ptx::f16x2_of_f32(x[2 * half + 4], x[2 * half + 5]));
    }
  }
};

constexpr int kHeldGroups = 4;  // of 8 inputs that a thread keeps in registers

// A block a row; what follows the held groups is read again.
template <bool kNormed>
__global__ void __launch_bounds__(kNormThreads)
    prepare_kernel(const float* x, RowNorm norm, int64_t cols, int padded, HalfRows rows) {
  constexpr int kStep = 8 * kNormThreads;
  __shared__ float parts[kNormThreads / 32];
  ptx::launch_dependents();
  const int64_t row = blockIdx.x;
  const int first = 8 * static_cast<int>(threadIdx.x);
  const float* const from = x + row * cols;
  float held_weights[8] = {};
  if constexpr (kNormed) load_eight(norm.weight, first, cols, held_weights);
  ptx::wait_prerequisites();
  float held[kHeldGroups][8];
#pragma unroll
  for (int i = 0; i < kHeldGroups; ++i) load_eight(from, first + i * kStep, cols, held[i]);
  float factor = 1.0f;
  if constexpr (kNormed) factor = norm_factor(from, cols, held[0], norm.epsilon);
  const auto finish = [&](int at, float(&v)[8]) {  // norms values as they were read
    if constexpr (kNormed) {
      float w[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) w[i] = held_weights[i];
      if (at != first) load_eight(norm.weight, at, cols, w);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = v[i] * factor * w[i];
    }
  };
  float most = 0.0f;
  const auto look = [&](const float(&v)[8]) {
#pragma unroll
    for (const float value : v) most = fmaxf(most, fabsf(value));
  };
#pragma unroll
  for (int i = 0; i < kHeldGroups; ++i) {
    if (first + i * kStep >= padded) break;
    finish(first + i * kStep, held[i]);
    look(held[i]);
  }
  float more[8];
  for (int at = first + kHeldGroups * kStep; at < padded; at += kStep) {
    load_eight(from, at, cols, more);
    finish(at, more);
    look(more);
  }
  most = ptx::warp_max(most);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = most;
  __syncthreads();
#pragma unroll
  for (const float part : parts) most = fmaxf(most, part);

  // The largest magnitude times 2^shift is below 2^15; what is not finite stays so.
  const int exponent = static_cast<int>(__float_as_uint(most) >> 23) - 127;
  const int shift = most > 0.0f ? min(14 - exponent, 100) : 0;
  const float scale = __uint_as_float(static_cast<uint32_t>(127 + shift) << 23);
  if (threadIdx.x == 0) {
    rows.factors[row] = __uint_as_float(static_cast<uint32_t>(127 - shift) << 23);
  }
  const auto put = [&](int at, float(&v)[8]) {
#pragma unroll
    for (float& value : v) value *= scale;
    rows.put(row, at, v);
  };
#pragma unroll
  for (int i = 0; i < kHeldGroups; ++i) {
    if (first + i * kStep < padded) put(first + i * kStep, held[i]);
  }
  for (int at = first + kHeldGroups * kStep; at < padded; at += kStep) {
    load_eight(from, at, cols, more);
    finish(at, more);
    put(at, more);
  }
}

// ---- products ----

constexpr int kConsumers = 8;    // warps
constexpr int kProducers = 128;  // threads
constexpr int kBlockThreads = 32 * kConsumers + kProducers;
constexpr int kConsumerRegisters = 232;
constexpr int kProducerRegisters = 40;
constexpr int kMostSplits = 8;
constexpr int kConsumersBarrier = 1;
constexpr int kAlignment = 1024;     // of swizzled rows
constexpr int kExchangeBarrier = 2;  // of a pair of warps; and the three after it

// What a block multiplies at a time: strips of 16 outputs, one or two a warp, with kN rows of x. As
// many sums a thread in both ways; with one strip what is decoded serves twice the rows.
template <int kN>
struct ItemShape {
  static constexpr int kStrips = kN == 256 ? 1 : 2;  // of a warp
  static constexpr int kSlots = kStrips * kConsumers;
  static constexpr int kOutputs = kSlots * kStripRows;
  static constexpr int kStageTiles = kStrips;
  static constexpr int kPartStride = kOutputs + 4;  // floats; spreads rows over banks
  // With a gate, both matrices' strip i: of one warp, or of warps that are four apart.
  static constexpr int kGated = kSlots / 2;  // strips of each
  __device__ static int gate_slot(int i) { return kStrips == 2 ? 2 * i : i; }
  __device__ static int up_slot(int i) { return kStrips == 2 ? 2 * i + 1 : i + kGated; }
  __device__ static bool is_up(int slot) { return kStrips == 2 ? slot % 2 == 1 : slot >= kGated; }
  __device__ static int gated_strip(int slot) { return kStrips == 2 ? slot / 2 : slot % kGated; }
};

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
struct Part {
  int rank;
  int first_row;
  int item;
  int first_tile;  // and the last one's end, multiples of two
  int end_tile;

  __device__ Part(const DecodedArgs& args, int index) {
    rank = index % args.splits;
    const int rest = index / args.splits;
    first_row = rest % args.num_row_tiles * kN;
    item = rest / args.num_row_tiles;
    const int pairs = args.num_tiles / 2;
    first_tile = rank * pairs / args.splits * 2;
    end_tile = (rank + 1) * pairs / args.splits * 2;
  }
};

// Which strip of weights lies in a slot of a block.
template <int kN>
struct SlotStrip {
  int target = 0;
  int strip;
  bool exists;

  __device__ SlotStrip(const DecodedArgs& args, int item, int slot) {
    using Shape = ItemShape<kN>;
    strip =
        args.gated ? item * Shape::kGated + Shape::gated_strip(slot) : item * Shape::kSlots + slot;
    exists = strip < args.num_strips;
    if (args.gated) {
      target = Shape::is_up(slot) ? 1 : 0;
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
  static constexpr int kStageTiles = ItemShape<kN>::kStageTiles;
  static constexpr int kRowTile = kN * 128;
  static constexpr int kWeights = kStageTiles * kRowTile;
  static constexpr int kHighAt = kStageTiles * kTile.low;
  static constexpr int kScalesAt = kHighAt + kStageTiles * kTile.high;
  static constexpr int kSuperAt = kScalesAt + kStageTiles * kTile.scales;
  static constexpr int kStrip = kSuperAt + kTile.super;
  static constexpr int kBytes =
      (kWeights + ItemShape<kN>::kSlots * kStrip + kAlignment - 1) / kAlignment * kAlignment;

  // Tile i of a strip in shared memory, of a lane.
  static __device__ TilePlaces places(const uint8_t* strip, int i, int lane) {
    const int g = lane / 4;
    return {strip + i * kTile.low + lane * 16,
            strip + kHighAt + i * kTile.high + lane * (kTile.high / 32),
            strip + kScalesAt + i * kTile.scales + g * (kTile.scales / 8),
            strip + kSuperAt + g * (kTile.super / 8)};
  }
};

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
    const Part<kN> first(args_, index);
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
      const Part<kN> part(args_, index);
      find(part);
      copy(part.first_tile, part.end_tile);
    }
  }

 private:
  static constexpr int kThreadsOfStrip = kProducers / ItemShape<kN>::kSlots;
  static constexpr int kStageTiles = Stage::kStageTiles;

  __device__ void find(const Part<kN>& part) {
    const SlotStrip<kN> place(args_, part.item, thread_ / kThreadsOfStrip);
    exists_ = place.exists;
    strip_ = args_.targets[place.target].weights.data + place.strip * args_.strip_bytes + piece_;
    row_bytes_ = min(kN, (args_.num_rows - part.first_row + 7) / 8 * 8) * 128;
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

template <int kN>
using Accumulators = float[ItemShape<kN>::kStrips][kN / 2];  // of a warp's strips

// A warp's strips. Products of a group of steps (of 16 inputs) are under way while the next group
// is decoded; ptxas serialises products where an instruction between the first one's issue and the
// wait for them makes one of their operands (C7513), so all operands are made before that. Groups
// are as long as registers allow, since both warpgroups wait for products about the same time.
template <WeightType kType, int kN>
class StripProducts {
 public:
  using Stage = DecodedStage<kType, kN>;
  static constexpr int kStrips = ItemShape<kN>::kStrips;
  static constexpr int kSteps = kN == 128 ? 2 : 4;
  static constexpr int kGroups = 8 / kSteps;  // of two tiles
  static constexpr int kGroupsOfStage = Stage::kStageTiles * 4 / kSteps;

  __device__ StripProducts(Accumulators<kN>& sums, int warp, int lane)
      : sums_(sums), strips_(Stage::kWeights + kStrips * warp * Stage::kStrip), lane_(lane) {}

  // Groups of two tiles in order, from the stage that has the group.
  __device__ __forceinline__ void decode(const uint8_t* stage, int group) {
    const int first = group % kGroupsOfStage * kSteps;  // step of the stage
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      if (first % 4 == 0) {
        raw_[s].load_shared(Stage::places(stage + strips_ + s * Stage::kStrip, first / 4, lane_));
      }
#pragma unroll
      for (int step = 0; step < kSteps; step += 2) {
        half_operands<kType>(raw_[s], (first + step) % 4 / 2, &operands_[group % 2][s][step]);
      }
#pragma unroll
      for (auto& step : operands_[group % 2][s]) {
#pragma unroll
        for (uint32_t& word : step) asm volatile("" : "+r"(word)::"memory");
      }
    }
  }
  __device__ __forceinline__ void issue(const uint8_t* stage, int group) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int step = group % kGroupsOfStage * kSteps + i;
      const uint64_t rows = matrix_descriptor(
          ptx::shared_address(stage) + step / 4 * Stage::kRowTile + step % 4 * 32, 0, 1024);
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        WgmmaRows<kN>::run(sums_[s], operands_[group % 2][s][i], rows);
      }
    }
    wgmma_commit();
  }

 private:
  Accumulators<kN>& sums_;
  const int strips_;
  const int lane_;
  typename TileOf<kType>::Type raw_[kStrips];
  uint32_t operands_[2][kStrips][kSteps][4];  // of a group and of the next one
};

// Multiplies all parts of a block, one after the other; done(part, sums) after each.
template <WeightType kType, int kN, typename Done>
__device__ __forceinline__ void multiply(const DecodedArgs& args, TeamRing ring,
                                         const uint8_t* memory, const Done& done) {
  using Products = StripProducts<kType, kN>;
  constexpr int kStageBytes = DecodedStage<kType, kN>::kBytes;
  const int lane = threadIdx.x % 32;
  Accumulators<kN> sums;
  Products products(sums, threadIdx.x / 32, lane);
  ring.wait_full();
  const uint8_t* stage = memory;
  products.decode(stage, 0);
  for (auto index = static_cast<int>(blockIdx.x); index < args.num_parts; index += gridDim.x) {
    const bool last = index + static_cast<int>(gridDim.x) >= args.num_parts;
    const Part<kN> part(args, index);
#pragma unroll
    for (auto& strip : sums) {
#pragma unroll
      for (float& sum : strip) sum = 0.0f;
    }
    for (int tile = part.first_tile; tile < part.end_tile; tile += 2) {
#pragma unroll
      for (int group = 0; group < Products::kGroups; ++group) {
        const bool ends_stage = (group + 1) % Products::kGroupsOfStage == 0;
        const TeamRing read = ring;
        products.issue(stage, group);
        if (group + 1 < Products::kGroups || tile + 2 < part.end_tile || !last) {
          if (ends_stage) {
            ring.advance();
            stage = memory + ring.slot * kStageBytes;
            ring.wait_full();
          }
          products.decode(stage, (group + 1) % Products::kGroups);
        }
        wgmma_wait<0>();
        if (ends_stage && lane == 0) read.release();
      }
    }
#pragma unroll
    for (auto& strip : sums) hold(strip);
    done(part, sums);
  }
}

// What is done to the sums of an output before they are written.
struct OutputTerms {
  float scale = 1.0f;     // of the row of weights
  float up_scale = 1.0f;  // of the other matrix
  float bias = 0.0f;

  template <WeightType kType>
  __device__ static OutputTerms of(const DecodedArgs& args, const ProductTarget& target,
                                   int64_t output) {
    OutputTerms terms;
    if (output >= target.weights.rows) return terms;
    if constexpr (kRowScaled<kType>) {
      const auto scale_of = [&](const WeightTiles& weights) {
        return kOfE4m3Halves * *row_scale<kType>(weights, weights.data, output / kStripRows,
                                                 static_cast<int>(output % kStripRows));
      };
      terms.scale = scale_of(target.weights);
      if (args.gated) terms.up_scale = scale_of(args.targets[1].weights);
    }
    if (target.bias != nullptr) terms.bias = target.bias[output];
    return terms;
  }
  // `factor` of the row of x.
  __device__ float apply(const DecodedArgs& args, float factor, float sum, float up) const {
    const float value = sum * (factor * scale) + bias;
    return args.gated ? activate(args.gate, value) * (up * (factor * up_scale)) : value;
  }
};

// Warps w and w + 4 have a strip of a gate and of what it is for. Each gives the other its sums of
// half the rows, so that it has sums of the gate in the lower half and of the other matrix in the
// upper one: the first warp for the lower rows, the second for the upper ones.
template <int kN>
__device__ __forceinline__ void exchange_halves(uint32_t* memory, float (&sums)[kN / 2]) {
  constexpr int kHalf = kN / 4;
  constexpr int kPiece = 16;  // sums of a thread
  const int warp = threadIdx.x / 32;
  const int pair = warp % 4;
  const bool first = warp < 4;
  auto* const own = reinterpret_cast<float*>(memory) + warp * kPiece * 32 + threadIdx.x % 32;
  const auto* const theirs =
      reinterpret_cast<const float*>(memory) + (warp ^ 4) * kPiece * 32 + threadIdx.x % 32;
#pragma unroll
  for (int at = 0; at < kHalf; at += kPiece) {
#pragma unroll
    for (int i = 0; i < kPiece; ++i) own[i * 32] = first ? sums[kHalf + at + i] : sums[at + i];
    ptx::named_barrier(kExchangeBarrier + pair, 64);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      const float received = theirs[i * 32];
      sums[at + i] = first ? sums[at + i] : received;
      sums[kHalf + at + i] = first ? received : sums[kHalf + at + i];
    }
    ptx::named_barrier(kExchangeBarrier + pair, 64);
  }
}

// Bytes that exchange_halves() takes of a block's shared memory.
template <int kN>
inline constexpr int kExchangeBytes = ItemShape<kN>::kStrips == 1 ? kConsumers * 16 * 32 * 4 : 0;

// kSums sums of one strip in registers, of an item's rows from `first` on; `up_sums` those of the
// other matrix with a gate. What is read for some rows is on its way together.
template <WeightType kType, int kN, int kSums>
__device__ __forceinline__ void write_strip(const DecodedArgs& args, const Part<kN>& part, int slot,
                                            int first, const float* sums, const float* up_sums) {
  constexpr int kPairs = kSums / 4;  // of rows, eight apart
  constexpr int kBatch = kPairs < 4 ? kPairs : 4;
  const int lane = threadIdx.x % 32;
  const SlotStrip<kN> place(args, part.item, slot);
  if (!place.exists) return;
  const ProductTarget& target = args.targets[place.target];
  const int64_t stride = target.weights.rows;
  const int64_t output = int64_t{place.strip} * kStripRows + lane / 4;
  const OutputTerms terms[2] = {OutputTerms::of<kType>(args, target, output),
                                OutputTerms::of<kType>(args, target, output + 8)};
  const int there = static_cast<int>(min((stride - output + 7) / 8, int64_t{2}));  // of the two
  const int row_of_lane = first + lane % 4 * 2;
  float* out = target.out + (part.first_row + row_of_lane) * stride + output;
  const float* factors = args.rows.factors + part.first_row + row_of_lane;
  int left = args.num_rows - part.first_row - row_of_lane;  // of rows from here on
#pragma unroll
  for (int batch = 0; batch < kPairs; batch += kBatch) {
    float2 factor[kBatch] = {};
    float before[kBatch][4] = {};
#pragma unroll
    for (int pair = 0; pair < kBatch; ++pair) {
      if (pair * 8 < left) factor[pair] = *reinterpret_cast<const float2*>(factors + pair * 8);
      if (!target.accumulate) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = pair * 8 + i % 2;
        if (row < left && i / 2 < there) before[pair][i] = out[row * stride + i / 2 * 8];
      }
    }
#pragma unroll
    for (int pair = 0; pair < kBatch; ++pair) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = pair * 8 + i % 2;
        const int at = (batch + pair) * 4 + i;
        const float of_row = i % 2 == 0 ? factor[pair].x : factor[pair].y;
        const float value =
            before[pair][i] + terms[i / 2].apply(args, of_row, sums[at], up_sums[at]);
        if (row < left && i / 2 < there) out[row * stride + i / 2 * 8] = value;
      }
    }
    out += 8 * kBatch * stride;
    factors += 8 * kBatch;
    left -= 8 * kBatch;
    asm volatile("" : "+l"(out), "+l"(factors), "+r"(left));  // addresses are not worked out ahead
  }
}

// The sums of a whole item, from registers.
template <WeightType kType, int kN>
__device__ __forceinline__ void write_sums(const DecodedArgs& args, const Part<kN>& part,
                                           uint32_t* memory, Accumulators<kN>& sums) {
  const int warp = threadIdx.x / 32;
  if constexpr (ItemShape<kN>::kStrips == 2) {
    write_strip<kType, kN, kN / 2>(args, part, 2 * warp, 0, sums[0], sums[1]);
    if (!args.gated) write_strip<kType, kN, kN / 2>(args, part, 2 * warp + 1, 0, sums[1], sums[1]);
  } else if (!args.gated) {
    write_strip<kType, kN, kN / 2>(args, part, warp, 0, sums[0], sums[0]);
  } else {
    exchange_halves<kN>(memory, sums[0]);
    write_strip<kType, kN, kN / 4>(args, part, warp % 4, warp < 4 ? 0 : kN / 2, sums[0],
                                   sums[0] + kN / 4);
  }
}

__device__ inline void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
// Of the same place in the shared memory of another block of the cluster.
__device__ inline float4 load_of_rank(uint32_t address, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(there)
               : "memory");
  return x;
}

// Of what lies at an address, over all blocks of the cluster.
__device__ inline float4 sum_of_ranks(uint32_t at, int splits) {
  float4 of[kMostSplits];  // all on their way together
#pragma unroll
  for (int rank = 0; rank < kMostSplits; ++rank) {
    of[rank] = rank < splits ? load_of_rank(at, rank) : float4{};
  }
  float4 sum = of[0];
#pragma unroll
  for (int rank = 1; rank < kMostSplits; ++rank) {
    sum.x += of[rank].x, sum.y += of[rank].y, sum.z += of[rank].z, sum.w += of[rank].w;
  }
  return sum;
}

// Leaves a warp's sums where other blocks of the cluster read them.
template <int kN>
__device__ __forceinline__ void leave_sums(float* parts, const Accumulators<kN>& sums) {
  using Shape = ItemShape<kN>;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int s = 0; s < Shape::kStrips; ++s) {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      const int row = i / 4 * 8 + lane % 4 * 2 + i % 2;
      const int output = (Shape::kStrips * warp + s) * kStripRows + lane / 4 + i % 4 / 2 * 8;
      parts[row * Shape::kPartStride + output] = sums[s][i];
    }
  }
}

// Writes the rows that are the block's among those of its cluster. A thread has four outputs, and
// reads what it needs of two rows at a time.
template <WeightType kType, int kN>
__device__ void write_joined(const DecodedArgs& args, const Part<kN>& part, uint32_t parts) {
  using Shape = ItemShape<kN>;
  constexpr int kAtOnce = 2;
  const int groups = args.gated ? Shape::kOutputs / 8 : Shape::kOutputs / 4;
  const int group = static_cast<int>(threadIdx.x) % groups;
  const int slot = args.gated ? Shape::gate_slot(group / 4) : group / 4;
  const int in_strip = group % 4 * 4;
  const SlotStrip<kN> place(args, part.item, slot);
  if (!place.exists) return;
  const ProductTarget& target = args.targets[place.target];
  const int64_t stride = target.weights.rows;
  const int64_t output = int64_t{place.strip} * kStripRows + in_strip;
  float* const out = target.out + part.first_row * stride + output;
  const bool in_fours =
      output + 4 <= stride && stride % 4 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  OutputTerms terms[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) terms[i] = OutputTerms::of<kType>(args, target, output + i);
  const auto sums_of = [&](int of_slot, int row) {
    return sum_of_ranks(parts + (row * Shape::kPartStride + of_slot * kStripRows + in_strip) * 4,
                        args.splits);
  };
  const int first = part.rank * (kN / args.splits);
  const int end = min(first + kN / args.splits, args.num_rows - part.first_row);
  const int step = 32 * kConsumers / groups;
  for (int base = first + static_cast<int>(threadIdx.x) / groups; base < end;
       base += kAtOnce * step) {
    float factor[kAtOnce];
    float4 before[kAtOnce] = {};
    float4 sums[kAtOnce];
    float4 ups[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = min(base + i * step, end - 1);
      factor[i] = args.rows.factors[part.first_row + row];
      if (target.accumulate && in_fours) {
        before[i] = *reinterpret_cast<const float4*>(out + row * stride);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = min(base + i * step, end - 1);
      sums[i] = sums_of(slot, row);
      if (args.gated) ups[i] = sums_of(Shape::up_slot(group / 4), row);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = base + i * step;
      if (row >= end) break;
      const float values[4] = {terms[0].apply(args, factor[i], sums[i].x, ups[i].x),
                               terms[1].apply(args, factor[i], sums[i].y, ups[i].y),
                               terms[2].apply(args, factor[i], sums[i].z, ups[i].z),
                               terms[3].apply(args, factor[i], sums[i].w, ups[i].w)};
      float* const at = out + row * stride;
      if (in_fours) {
        *reinterpret_cast<float4*>(at) =
            make_float4(before[i].x + values[0], before[i].y + values[1], before[i].z + values[2],
                        before[i].w + values[3]);
        continue;
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (output + k < stride) at[k] = target.accumulate ? at[k] + values[k] : values[k];
      }
    }
  }
}

template <WeightType kType, int kN>
__global__ void __launch_bounds__(kBlockThreads, 1)
    decoded_product_kernel(const __grid_constant__ DecodedArgs args) {
  // A ring of stages, later sums.
  extern __shared__ uint8_t unaligned[];
  __shared__ TeamSlots slots;
  uint8_t* const memory = unaligned + (-ptx::shared_address(unaligned) & (kAlignment - 1));
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  ptx::launch_dependents();
  if (warp == kConsumers && lane < args.slots) {
    ptx::mbarrier_init(ptx::shared_address(&slots.full[lane]), kProducers + 1);
    ptx::mbarrier_init(ptx::shared_address(&slots.empty[lane]), kConsumers);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const TeamRing ring(slots, args.slots);
  const bool joins = args.splits > 1;
  if (warp >= kConsumers) {
    ptx::decrease_registers<kProducerRegisters>();
    DecodedProducer<kType, kN>(args, ring, ptx::shared_address(memory),
                               static_cast<int>(threadIdx.x) - 32 * kConsumers)
        .run();
    __syncwarp();
    if (joins) {
      cluster_barrier();
      cluster_barrier();
    }
    return;
  }
  ptx::increase_registers<kConsumerRegisters>();
  ptx::wait_prerequisites();
  multiply<kType, kN>(args, ring, memory, [&](const Part<kN>& part, Accumulators<kN>& sums) {
    if (!joins) {
      auto* const exchanged =
          reinterpret_cast<uint32_t*>(memory + args.slots * DecodedStage<kType, kN>::kBytes);
      write_sums<kType, kN>(args, part, exchanged, sums);
      return;
    }
    ptx::named_barrier(kConsumersBarrier, 32 * kConsumers);  // nobody reads the ring any more
    auto* const parts = reinterpret_cast<float*>(memory);
    leave_sums<kN>(parts, sums);
    __syncwarp();
    cluster_barrier();
    write_joined<kType, kN>(args, part, ptx::shared_address(parts));
    __syncwarp();
    cluster_barrier();  // others have read this block's sums
  });
}

// ---- how an item is divided ----

struct Division {
  int rows = 16;  // of x, of a block
  int splits = 1;
};

int64_t num_items(const Division& division, const DecodedWork& work) {
  const int64_t strips = division.rows == 256 ? ItemShape<256>::kSlots : ItemShape<128>::kSlots;
  const int64_t of_item = work.gated ? strips / 2 : strips;
  return (work.num_strips + of_item - 1) / of_item;
}

// How long such a product takes, roughly, with its rows made ready: fits to products of
// Llama-3.1-8B in Q4_K on an H100 (docs/kernels/cuda-linear.md).
int64_t nanoseconds(const Division& division, const DecodedWork& work) {
  constexpr int64_t kLaunches = 3700;
  constexpr int64_t kBytesOfNs = 2800;  // of memory
  const int rows = division.rows;
  const int64_t of_tile = rows <= 16 ? 394 : rows <= 32 ? 410 : rows <= 64 ? 483 : 730;
  const int64_t sums = std::min(rows, 128);
  const int64_t writing = division.splits == 1 ? 60 * sums : 2000 + 30 * sums;
  // Clusters lie in a part of the device, whose multiprocessors they need not fill.
  const int64_t at_once = division.splits == 8   ? work.num_sms * 7 / 8 / 8 * 8
                          : division.splits == 4 ? work.num_sms * 10 / 11 / 4 * 4
                                                 : work.num_sms / division.splits * division.splits;
  const int64_t items = num_items(division, work);
  const int64_t row_tiles = (work.num_rows + rows - 1) / rows;
  const int64_t waves = (items * row_tiles * division.splits + at_once - 1) / at_once;
  const int64_t tiles = (work.num_tiles + division.splits - 1) / division.splits;
  const int64_t reading = work.num_strips * work.strip_bytes * (work.gated ? 2 : 1) / kBytesOfNs;
  return kLaunches + std::max(waves * (tiles * of_tile + writing), reading);
}

struct Choice {
  Division division;
  int64_t nanoseconds = std::numeric_limits<int64_t>::max();
};

Choice best_division(const DecodedWork& work) {
  Choice best;
  for (const int rows : {16, 32, 64, 128, 256}) {
    for (int splits = 1; splits <= kMostSplits && 2 * splits <= work.num_tiles; splits *= 2) {
      const Division division = {rows, splits};
      const int64_t time = nanoseconds(division, work);
      if (time < best.nanoseconds) best = {division, time};
    }
  }
  return best;
}

template <WeightType kType, int kN>
Status launch(DecodedArgs args, int64_t items, int num_sms, cudaStream_t stream) {
  using Stage = DecodedStage<kType, kN>;
  constexpr int kParts = kN * ItemShape<kN>::kPartStride * 4;
  const int room =
      device_traits().shared_per_block - static_cast<int>(sizeof(TeamSlots)) - kAlignment;
  args.slots = std::min((room - kExchangeBytes<kN>) / Stage::kBytes, kMostSlots);
  args.num_row_tiles = (args.num_rows + kN - 1) / kN;
  args.num_parts = static_cast<int>(items) * args.num_row_tiles * args.splits;
  const auto kernel = decoded_product_kernel<kType, kN>;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room + kAlignment);
  KVANT_TRY(cuda_status(allowed, "asking for shared memory"));
  return launch_overlapped(
      "product of decoded weights", kernel,
      {.grid = static_cast<unsigned>(args.splits > 1 ? args.num_parts
                                                     : std::min(args.num_parts, num_sms)),
       .threads = kBlockThreads,
       .shared_bytes = static_cast<size_t>(
           kAlignment + std::max(args.slots * Stage::kBytes + kExchangeBytes<kN>, kParts)),
       .stream = stream,
       .cluster = static_cast<unsigned>(args.splits)},
      args);
}

template <WeightType kType>
inline constexpr bool kHasKernel = kTiled<kType>;

}  // namespace

bool has_decoded_product(formats::WeightType type) {
  return device_traits().level == DeviceLevel::kHopper && is_tiled(type);
}

int64_t decoded_product_nanoseconds(const DecodedWork& work) {
  return best_division(work).nanoseconds;
}

int64_t half_rows_bytes(int64_t rows, int64_t padded_cols) {
  const int64_t padded_rows = (rows + 7) / 8 * 8;
  return padded_rows * (padded_cols * 2 + 4);
}

Status prepare_half_rows(const RowProduct& product, int64_t cols, cudaStream_t stream) {
  if (product.num_rows == 0) return {};
  WeightTiles tiles;
  tiles.cols = cols;
  const HalfRows rows(product.workspace, product.num_rows, tiles.padded_cols());
  const auto kernel = product.norm.weight != nullptr ? prepare_kernel<true> : prepare_kernel<false>;
  return launch_overlapped("preparation of rows", kernel,
                           {static_cast<unsigned>(product.num_rows), kNormThreads, 0, stream},
                           product.x, product.norm, cols, static_cast<int>(tiles.padded_cols()),
                           rows);
}

Status multiply_decoded(const RowProduct& product, std::span<const ProductTarget> targets,
                        cudaStream_t stream) {
  if (product.num_rows == 0 || targets.empty()) return {};
  KVANT_CHECK(targets.size() <= kMaxProductTargets, "a launch has at most four targets");
  const WeightTiles& weights = targets[0].weights;
  DecodedArgs args = {};
  args.num_targets = static_cast<int>(targets.size());
  args.num_tiles = static_cast<int>(weights.num_tiles());
  args.strip_bytes = weights.strip_bytes();
  args.rows = HalfRows(product.workspace, product.num_rows, weights.padded_cols());
  args.num_rows = static_cast<int>(product.num_rows);
  args.gated = product.gated;
  args.gate = product.gate;
  for (size_t t = 0; t < targets.size(); ++t) {
    args.targets[t] = targets[t];
    args.first_strip[t] = args.num_strips;
    args.num_strips += static_cast<int>(targets[t].weights.num_strips());
  }
  if (product.gated) args.num_strips = args.first_strip[1];
  const DecodedWork work = {.num_rows = product.num_rows,
                            .num_strips = args.num_strips,
                            .num_tiles = args.num_tiles,
                            .strip_bytes = args.strip_bytes,
                            .gated = product.gated,
                            .num_sms = product.num_sms};
  const Division division = best_division(work).division;
  const int64_t items = num_items(division, work);
  args.splits = division.splits;
  return for_weight_type<WeightTag>(weights.type, [&](auto tag) -> Status {
    constexpr WeightType kType = decltype(tag)::kValue;
    if constexpr (kHasKernel<kType>) {
      switch (division.rows) {
        case 16: return launch<kType, 16>(args, items, product.num_sms, stream);
        case 32: return launch<kType, 32>(args, items, product.num_sms, stream);
        case 64: return launch<kType, 64>(args, items, product.num_sms, stream);
        case 128: return launch<kType, 128>(args, items, product.num_sms, stream);
        default: return launch<kType, 256>(args, items, product.num_sms, stream);
      }
    }
    return Error(ErrorCode::kInternal, "has_decoded_product() says which types there are");
  });
}

}  // namespace kvant::backend::cuda
