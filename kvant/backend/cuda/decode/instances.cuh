// Makes rows of the table of variants.
#pragma once

#include "kvant/backend/cuda/decode/kernel.cuh"
#include "kvant/backend/cuda/decode/variants.h"

namespace kvant::backend::cuda {

// A row: formats, head_dim, n-tiles of 8 query rows, warps of a team, teams of a block, blocks of a
// multiprocessor, and whether keys are stored before RoPE.
template <KeyKernel kKey, ValueKernel kValue, int kHeadDim, int kNTiles, int kTeam, int kTeams,
          int kBlocks, bool kPreRope = false>
DecodeVariant row() {
  using Shape = DecodeShape<kKey, kValue, kHeadDim, kNTiles, kTeam, kTeams, kBlocks, kPreRope>;
  DecodeVariant variant;
  variant.key = Shape::kKey;
  variant.value = Shape::kValue;
  variant.pre_rope = Shape::kPreRope;
  variant.head_dim = Shape::kHeadDim;
  variant.max_rows = Shape::kNTiles * 8;
  variant.page_tokens = Shape::kAny ? 0 : 64;
  variant.teams = Shape::kTeams;
  variant.blocks = Shape::kBlocks;
  variant.slots_take_steps = Shape::kSlotsTakeSteps;
  variant.team_bytes = Shape::kTeamBytes;
  variant.fixed_bytes = kFixedBytes<Shape>;
  variant.kernel = reinterpret_cast<const void*>(&decode_kernel<Shape>);
  return variant;
}

// A row for GPUs with fast memory and steps of at least so many pages for each multiprocessor: in
// front of the row for all.
constexpr DecodeVariant on_fast_memory(DecodeVariant variant, int least_pages) {
  variant.least_fast_pages = least_pages;
  return variant;
}

}  // namespace kvant::backend::cuda
