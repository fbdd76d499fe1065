// The warpgroups that decode weights and multiply them.
#pragma once

#include <cstdint>

#include "kvant/backend/cuda/dense/decoded_items.cuh"
#include "kvant/backend/cuda/dense/half_operands.cuh"
#include "kvant/backend/cuda/dense/team_stages.cuh"
#include "kvant/backend/cuda/hopper.cuh"

namespace kvant::backend::cuda {

template <int kN>
using DecodedSums = float[kStrips][kN / 2];  // of a warp's strips

// A warp's strips. Products of a group of steps (of 16 inputs) are under way while the next group
// is decoded; ptxas serialises products where an instruction between the first one's issue and the
// wait for them makes one of their operands (C7513), so all operands are made before that. Groups
// are as long as registers allow, since both warpgroups wait for products about the same time.
template <WeightType kType, int kN>
class StripProducts {
 public:
  using Stage = DecodedStage<kType, kN>;
  static constexpr int kSteps = kN == 128 ? 2 : 4;
  static constexpr int kGroups = kStageTiles * 4 / kSteps;  // of a stage

  __device__ StripProducts(DecodedSums<kN>& sums, int warp, int lane)
      : sums_(sums), strips_(Stage::kWeights + kStrips * warp * Stage::kStrip), lane_(lane) {}

  // Groups of a stage in order.
  __device__ __forceinline__ void decode(const uint8_t* stage, int group) {
    const int first = group * kSteps;  // step of the stage
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
      const int step = group * kSteps + i;
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
  DecodedSums<kN>& sums_;
  const int strips_;
  const int lane_;
  typename TileOf<kType>::Type raw_[kStrips];
  uint32_t operands_[2][kStrips][kSteps][4];  // of a group and of the next one
};

// Multiplies all parts of a block, one after the other; done(part, sums) after each.
template <WeightType kType, int kN, typename Done>
__device__ __forceinline__ void multiply_parts(const DecodedArgs& args, TeamRing ring,
                                               const uint8_t* memory, const Done& done) {
  using Products = StripProducts<kType, kN>;
  constexpr int kStageBytes = DecodedStage<kType, kN>::kBytes;
  const int lane = threadIdx.x % 32;
  DecodedSums<kN> sums;
  Products products(sums, threadIdx.x / 32, lane);
  ring.wait_full();
  const uint8_t* stage = memory;
  products.decode(stage, 0);
  for (auto index = static_cast<int>(blockIdx.x); index < args.num_parts; index += gridDim.x) {
    const bool last = index + static_cast<int>(gridDim.x) >= args.num_parts;
    const DecodedPart<kN> part(args, index);
#pragma unroll
    for (auto& strip : sums) {
#pragma unroll
      for (float& sum : strip) sum = 0.0f;
    }
    for (int tile = part.first_tile; tile < part.end_tile; tile += kStageTiles) {
#pragma unroll
      for (int group = 0; group < Products::kGroups; ++group) {
        const bool ends_stage = group + 1 == Products::kGroups;
        const TeamRing read = ring;
        products.issue(stage, group);
        if (!ends_stage || tile + kStageTiles < part.end_tile || !last) {
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

}  // namespace kvant::backend::cuda
