// What a decode kernel is at compile time, and what its parts share.
#pragma once

#include "kvant/backend/cuda/decode/kernel_params.h"
#include "kvant/backend/cuda/decode/keys.cuh"

namespace kvant::backend::cuda {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
// Below every score, and finite: differences of two references are never NaN.
inline constexpr float kNoReference = -1e30f;
// Barriers 1 to 8 are the teams'.
inline constexpr int kBlockBarrier = 15;

// What a team knows of its segment: in shared memory, for registers are short.
struct TeamSegment {
  Segment segment;
  HeadFactors factors;
  float biases[16];  // q . bias of each query row (+bias)
};

// Everything that fixes a kernel at compile time. `kKeysBeforeRope`: keys are stored before RoPE;
// with formats fixed, without other options and with all channels rotating.
template <KeyKernel kKeyKernel, ValueKernel kValueKernel, int kDim, int kNumNTiles, int kTeamWarps,
          int kNumTeams, int kBlocksOfSm = 1, bool kKeysBeforeRope = false>
struct DecodeShape {
  static constexpr bool kPreRope = kKeysBeforeRope;
  static constexpr KeyKernel kKey = kKeyKernel;
  static constexpr ValueKernel kValue = kValueKernel;
  static constexpr int kHeadDim = kDim;
  static constexpr int kNTiles = kNumNTiles;
  static constexpr int kTeam = kTeamWarps;
  static constexpr int kTeams = kNumTeams;
  static constexpr int kBlocks = kBlocksOfSm;  // on a multiprocessor
  static constexpr int kSteps = kDim / 16;
  // Tiles of a warp at a time: a page of 64 tokens is one round of a team.
  static constexpr int kTiles = 4 / kTeamWarps;
  static constexpr int kConsumerWarps = kTeamWarps * kNumTeams;
  static_assert(kConsumerWarps % 4 == 0);  // registers are given and taken by warpgroups
  static constexpr int kThreads = (kConsumerWarps + 4) * 32;
  // Producers need few registers: consumers take theirs. A block starts with equal shares of 64 K
  // registers, in eights, and has no more to give: 20 warps of 96, 16 of 128, 24 of 80, 12 of 168.
  static constexpr int kStartRegisters = 65536 / (kBlocks * kThreads) / 8 * 8;
  static constexpr int kProducerRegisters = 32;
  static constexpr int kConsumerRegisters =
      (kStartRegisters * (kConsumerWarps + 4) - kProducerRegisters * 4) / kConsumerWarps / 8 * 8;
  static constexpr bool kAny = kKeyKernel == KeyKernel::kAny;
  static constexpr bool kStoredByTile = is_16_bit(kKeyKernel) && is_16_bit(kValueKernel);
  static constexpr bool kProducerWarpEach = kNumTeams <= 4;
  // The ring's slots take keys and values (ring.cuh). Of 16-bit tiles each is for one warp, and
  // kernels for any format must take large pages.
  static constexpr bool kSlotsTakeSteps = !kAny && !kStoredByTile && kProducerWarpEach;
  static constexpr bool kMayBeF16 = kAny || kKeyKernel == KeyKernel::kF16;
  static constexpr bool kNeedsZeros = kAny || kValueKernel == ValueKernel::kInt4;

  // Shared memory of a team besides its ring. Keys before RoPE: queries in fp32 instead of two BF16
  // numbers, and none in fp16, for each page makes its own.
  static constexpr int kBf16QueryBytes = kNumNTiles * kSteps * 32 * 16;
  static constexpr int kF16QueryBytes =
      kPreRope || (kTeamWarps > 1 && !kAny && !is_channel(kKeyKernel))
          ? 0
          : kNumNTiles * kSteps * 32 * 8;
  static constexpr int kExchangeBytes = (kTeamWarps - 1) * kNumNTiles * 8 * (kDim + 4) * 4;
  static constexpr int kExchangeStart = kBf16QueryBytes + kF16QueryBytes;
  static constexpr int kStateBytes = kTeamWarps * kNumNTiles * 8 * 8;
  static constexpr int kTeamBytes =
      kBf16QueryBytes + kF16QueryBytes + kExchangeBytes + kStateBytes + sizeof(TeamSegment);
  static_assert(kPreRope || kF16QueryBytes > 0 || kExchangeBytes >= kNumNTiles * kSteps * 32 * 8);
  // Of a row that waits for the block's merge: padded against bank conflicts.
  static constexpr int kRowStride = kDim + 4;
  static constexpr int kRows = kNumNTiles * 8;
};

// A segment's result in the block, until all its teams are done: of a team's last segment, one part
// per warp; of its first, if other teams add to that, one part in all.
template <typename Shape>
struct BlockResult {
  int32_t unit;  // -1: none
  int32_t partial;
  int32_t first_row;
  int32_t num_rows;
  int32_t kv_head;
  float factor;  // of the sums
  float2 states[Shape::kTeam][Shape::kRows];
};

// Where a warp leaves the sums of its team's last segment, [row][kRowStride]: the ring is empty
// then, and the exchange is not needed any more. `ring`, `own`: the team's ring and memory.
template <typename Shape>
__device__ __forceinline__ float* left_sums(std::byte* ring, std::byte* own, int warp) {
  constexpr int kPart = Shape::kRows * Shape::kRowStride;
  return warp == 0 ? reinterpret_cast<float*>(ring)
                   : reinterpret_cast<float*>(own + Shape::kExchangeStart) + (warp - 1) * kPart;
}

// Row of the step's activations and query head of a tile's query row.
struct QueryRow {
  int64_t row;
  int head;
};
__device__ __forceinline__ QueryRow query_row(const DecodeParams& params, int first_row,
                                              int kv_head, int r) {
  return {first_row + r / params.group, kv_head * params.group + r % params.group};
}

// One over the sum of weights of a finished row, sink logit included; writes its log-sum-exp.
__device__ __forceinline__ float finish_row(const DecodeParams& params, const QueryRow& at,
                                            float2 state, bool writes_lse) {
  float total = state.y;
  if (params.sink_logits != nullptr) total += exp2f(params.sink_logits[at.head] * kLog2E - state.x);
  if (params.lse != nullptr && writes_lse)
    params.lse[at.row * params.num_query_heads + at.head] = (state.x + log2f(total)) * kLn2;
  return 1.0f / total;
}

}  // namespace kvant::backend::cuda
