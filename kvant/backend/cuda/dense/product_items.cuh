// What teams of warps multiply in turn in products of few rows, what blocks make ready for it, and
// where its sums go.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kvant/backend/cuda/dense/gate.cuh"
#include "kvant/backend/cuda/dense/prepared_rows.cuh"
#include "kvant/backend/cuda/dense/product_args.h"
#include "kvant/backend/cuda/dense/stage_products.cuh"

namespace kvant::backend::cuda {

inline constexpr int kWarps = 8;  // of a team, which shares the inputs of a strip
inline constexpr int kTeamThreads = 32 * kWarps;
inline constexpr int kTeams = kTeamsOfBlock;
inline constexpr int kThreads = kTeams * kTeamThreads;

// What a block multiplies at a time: a strip and up to kGroupRows rows, or one row and its expert.
// With a gate, that strip of both matrices: the teams of a block have one each.
struct Item {
  int target = 0;
  int64_t strip = 0;
  int64_t first_row = 0;  // of the output
  int rows = 0;
  int x_row = 0;

  __device__ Item(const ProductArgs& args, int index) {
    int all_strip = index;
    int group = 0;
    if (args.num_groups > 1) {
      all_strip = index / args.num_groups;
      group = index % args.num_groups;
    }
    while (target + 1 < args.num_targets && all_strip >= args.first_strip[target + 1]) ++target;
    strip = all_strip - args.first_strip[target];
    if (args.choice.experts != nullptr) {
      first_row = group;
      rows = 1;
      x_row = group / args.choice.rows_per_x;
    } else {
      first_row = group * int64_t{kGroupRows};
      rows = static_cast<int>(min(args.num_rows - first_row, int64_t{kGroupRows}));
      x_row = static_cast<int>(first_row);
    }
  }
  // Of the first a team takes, and of those that follow.
  __device__ static int first(const ProductArgs& args, int team) {
    return static_cast<int>(blockIdx.x + (args.gated ? 0 : team) * gridDim.x);
  }
  __device__ static int next(const ProductArgs& args, int index) {
    return index + (args.gated ? 1 : kTeams) * static_cast<int>(gridDim.x);
  }
  // Of the matrix; with a gate, of the team's.
  __device__ const uint8_t* data(const ProductArgs& args, int team) const {
    return args.choice.experts != nullptr
               ? args.choice.matrices[args.choice.experts[first_row]]
               : args.targets[target + (args.gated ? team : 0)].weights.data;
  }
};

// The sums of a team's warps for an item; two take turns, so that one barrier an item is enough,
// where there is memory for them.
template <int kTiles, int kTurns = 2>
struct Parts {
  float v[kTurns][kWarps][kTiles * kRowTile][kStripRows + 1];

  __device__ void put(const Sums<kTiles>& sums, int turn) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 % kWarps;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        v[turn][warp][n * kRowTile + lane % 4][lane / 4 + 8 * r] = sums.v[n][r];
      }
    }
  }
  // In the order of the warps.
  __device__ float sum(int turn, int row, int output) const {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += v[turn][w][row][output];
    return sum;
  }
};

// The output of an item that a thread writes, if it has one.
template <WeightType kType>
struct Output {
  float* out = nullptr;
  float before = 0.0f;  // what is added to the sum, with the bias
  float bias = 0.0f;
  int row = 0;
  int in_strip = 0;
  float scale[2] = {1.0f, 1.0f};  // of the sum; with a gate, of both

  // Reads early what is added, which nobody else writes, and scales of rows; adds nothing yet, as
  // its warp would wait for memory before it multiplies.
  __device__ Output(const ProductArgs& args, const Item& item)
      : row(static_cast<int>(threadIdx.x) % kTeamThreads / kStripRows),
        in_strip(static_cast<int>(threadIdx.x) % kStripRows) {
    const ProductTarget& target = args.targets[item.target];
    const int64_t output = item.strip * kStripRows + in_strip;
    if (row >= item.rows || output >= target.weights.rows) return;
    if (args.gated && threadIdx.x >= kTeamThreads) return;  // the first team writes for both
    out = target.out + (item.first_row + row) * target.weights.rows + output;
    if (target.accumulate) before = *out;
    if (target.bias != nullptr) bias = target.bias[output];
    if constexpr (kRowScaled<kType>) {
      const auto of = [&](int half) {
        return *row_scale<kType>(target.weights, item.data(args, half), item.strip, in_strip);
      };
      scale[0] = of(0);
      if (args.gated) scale[1] = of(1);
    }
  }

  // Once all warps have put their sums; `parts` of the teams, `own` the thread's.
  template <typename Parts>
  __device__ void write(const ProductArgs& args, const Parts (&parts)[kTeams], int own,
                        int turn) const {
    if (out == nullptr) return;
    const float sum = scaled(parts[own].sum(turn, row, in_strip), 0);
    *out = args.gated ? activate(args.gate, sum) * scaled(parts[1].sum(turn, row, in_strip), 1)
                      : before + bias + sum;
  }

 private:
  __device__ float scaled(float sum, int half) const {
    return kRowScaled<kType> ? sum * kOfE4m3Sums * scale[half] : sum;
  }
};

// Bytes of the rows of x as blocks keep them.
template <WeightType kType>
int64_t prepared_bytes(const ProductArgs& args) {
  const int padded = static_cast<int>(args.targets[0].weights.padded_cols());
  return PreparedRows(nullptr, kAsBytes<kType>, args.prepared_rows, padded)
      .bytes(args.prepared_rows);
}

// All rows of x, by kThreads threads. `norm_weights`: the thread's first, if they are normed, which
// only up to kRowTile are (kNorms).
template <WeightType kType, bool kNorms>
__device__ void prepare_all(const ProductArgs& args, const PreparedRows& prepared,
                            const float (&norm_weights)[8]) {
  const RowWriter<kRowForm<kType>> writer{prepared};
  const auto cols = args.targets[0].weights.cols;
  const int padded = static_cast<int>(args.targets[0].weights.padded_cols());
  const auto normed = [&](auto count, int row) {
    prepare_normed<decltype(count)::value>(writer, row, args.x, cols, padded, args.norm.weight,
                                           args.norm.epsilon, norm_weights);
  };
  if (kNorms && args.norm.weight != nullptr) {
    int row = 0;
    for (; row + 2 <= args.prepared_rows; row += 2) normed(std::integral_constant<int, 2>(), row);
    if (row < args.prepared_rows) normed(std::integral_constant<int, 1>(), row);
  } else if (args.prepared_rows == 1) {
    prepare_inputs(writer, 0, args.x, cols, 0, padded, kThreads);
  } else {
    prepare_rows_whole(writer, args.prepared_rows, args.x, cols, padded, kThreads);
  }
}

}  // namespace kvant::backend::cuda
