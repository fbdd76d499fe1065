// The end of a decode block: the results of its teams' segments are merged, unit by unit.
//
// Nothing else of a call goes on meanwhile, so what counts is latency: all of a row's loads are on
// their way at once, and there are few branches.
#pragma once

#include "kvant/backend/cuda/decode/shape.cuh"

namespace kvant::backend::cuda {

// Parts of what a team leaves to the block: one of its first segment, if other teams add to that,
// and one of each warp of its last.
template <typename Shape>
inline constexpr int kPartsOfTeam = 1 + Shape::kTeam;

// What a block's warps merge.
template <typename Shape>
struct LeftParts {
  const BlockResult<Shape>* results;  // [team][first, last segment]
  std::byte* rings;                   // of the teams, `ring_bytes` each
  int ring_bytes;
  std::byte* own;               // memory of the teams beside their rings, kTeamBytes each
  const float* first_segments;  // sums of first segments, [team][max_rows][head_dim]
  int max_rows;

  // Sums of a team's first segment, and of a warp's part of its last.
  __device__ __forceinline__ const float* first(int team, int r) const {
    return first_segments + (team * max_rows + r) * Shape::kHeadDim;
  }
  __device__ __forceinline__ const float* last(int team, int warp, int r) const {
    return left_sums<Shape>(rings + team * ring_bytes, own + team * Shape::kTeamBytes, warp) +
           r * Shape::kRowStride;
  }
  // 32 numbers of a warp: where the first team's queries were. Not every team may be at work.
  __device__ __forceinline__ float* scratch(int warp) const {
    static_assert(Shape::kBf16QueryBytes >= Shape::kConsumerWarps * 128);
    return reinterpret_cast<float*>(own) + warp * 32;
  }
};

// Merges query row r of a unit, in the order of its pages: `kMergeChannels` channels.
// `unit_results`: bits of the results that belong to it, of which `first` is one.
inline constexpr int kMergeChannels = 128;
template <typename Shape>
__device__ __forceinline__ void merge_row(const DecodeParams& params, const LeftParts<Shape>& left,
                                          uint32_t unit_results, const BlockResult<Shape>& first,
                                          int r, int piece, int warp, int lane) {
  constexpr int kOfTeam = kPartsOfTeam<Shape>;
  constexpr int kParts = Shape::kTeams * kOfTeam;
  static_assert(kParts <= 32);  // a lane for each
  const int of_lane = lane / kOfTeam * 2 + (lane % kOfTeam > 0 ? 1 : 0);
  const bool counts = lane < kParts && (unit_results >> of_lane & 1) != 0;
  const BlockResult<Shape>& result = left.results[counts ? of_lane : 0];
  const float2 mine =
      counts ? result.states[max(lane % kOfTeam - 1, 0)][r] : float2{kNoReference, 0.0f};
  const float unit_factor = counts ? result.factor : 0.0f;

  const int channel = piece * kMergeChannels + lane * 4;
  const bool valid = channel < Shape::kHeadDim;
  const int at = valid ? channel : 0;
  float4 x[kParts];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int team = part / kOfTeam;
    const bool is_first = part % kOfTeam == 0;
    x[part] = {0.0f, 0.0f, 0.0f, 0.0f};
    if ((unit_results >> (team * 2 + (is_first ? 0 : 1)) & 1) == 0) continue;
    const float* from = is_first ? left.first(team, r) : left.last(team, part % kOfTeam - 1, r);
    x[part] = *reinterpret_cast<const float4*>(from + at);
  }

  float2 state = {ptx::warp_max(mine.x), mine.y};
  const float weight = counts ? ptx::exp2_approx(mine.x - state.x) : 0.0f;
  float* const factors = left.scratch(warp);
  __syncwarp();
  factors[lane] = weight * unit_factor;
  __syncwarp();
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const float factor = factors[part];
    sum.x = fmaf(x[part].x, factor, sum.x);
    sum.y = fmaf(x[part].y, factor, sum.y);
    sum.z = fmaf(x[part].z, factor, sum.z);
    sum.w = fmaf(x[part].w, factor, sum.w);
  }
  state.y *= weight;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    state.y += __shfl_xor_sync(~0u, state.y, distance);

  float* out;
  float scale = 1.0f;
  if (first.partial >= 0) {
    const int64_t row = static_cast<int64_t>(first.partial) * params.max_rows + r;
    out = params.partial_sums + row * Shape::kHeadDim;
    if (piece == 0 && lane == 0) params.partial_states[row] = state;
  } else {
    const QueryRow row = query_row(params, first.first_row, first.kv_head, r);
    out = params.out + (row.row * params.num_query_heads + row.head) * Shape::kHeadDim;
    scale = finish_row(params, row, state, piece == 0 && lane == 0);
  }
  if (valid) {
    *reinterpret_cast<float4*>(out + channel) = {sum.x * scale, sum.y * scale, sum.z * scale,
                                                 sum.w * scale};
  }
}

// Warps take turns with the rows.
template <typename Shape>
__device__ __forceinline__ void merge_block(const DecodeParams& params,
                                            const LeftParts<Shape>& left, int warp, int lane) {
  constexpr int kPieces = (Shape::kHeadDim + kMergeChannels - 1) / kMergeChannels;
  const int unit = lane < 2 * Shape::kTeams ? left.results[lane].unit : -1;
  uint32_t not_merged = __ballot_sync(~0u, unit >= 0);
  int turn = 0;  // of the warps
  while (not_merged != 0) {
    const int at = __ffs(static_cast<int>(not_merged)) - 1;
    const uint32_t of_unit = __ballot_sync(~0u, unit == __shfl_sync(~0u, unit, at));
    not_merged &= ~of_unit;
    const BlockResult<Shape>& first = left.results[at];
    const int items = first.num_rows * kPieces;
    int item = warp - turn;
    if (item < 0) item += Shape::kConsumerWarps;
    for (; item < items; item += Shape::kConsumerWarps) {
      merge_row<Shape>(params, left, of_unit, first, item / kPieces, item % kPieces, warp, lane);
    }
    turn = (turn + items) % Shape::kConsumerWarps;
  }
}

}  // namespace kvant::backend::cuda
