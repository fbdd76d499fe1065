#include "kvant/backend/cuda/dense/product.h"

#include <algorithm>

#include "kvant/backend/cuda/dense/file_blocks.cuh"
#include "kvant/backend/cuda/dense/product_tiles.cuh"
#include "kvant/backend/cuda/launch.h"
#include "kvant/backend/cuda/status.h"
#include "kvant/base/check.h"

namespace kvant::backend::cuda {
namespace {

constexpr int kWarps = 8;  // that share the inputs of a strip
constexpr int kThreads = 32 * kWarps;
constexpr int kRowTile = 8;  // rows of x that one instruction takes

struct ProductArgs {
  ProductTarget targets[kMaxProductTargets];
  int num_targets;
  int first_block[kMaxProductTargets];  // of each target in gridDim.x
  const float* x;
  int64_t num_rows;
  int block_rows;  // of x, blockIdx.y apart
  ExpertChoice choice;
};

// Strips of a block: two share each row of x that a warp reads, but floats need the registers.
template <WeightType kType>
inline constexpr int kMaxStrips = kTiled<kType> ? 2 : 1;

// Inputs of a lane for one step as two BF16 each: x = high + low up to 2^-17.
struct Inputs {
  uint32_t high[2];
  uint32_t low[2];
};

__device__ Inputs split(const float4& x) {
  Inputs out;
  out.high[0] = ptx::bf16x2_of_f32(x.x, x.y);
  out.high[1] = ptx::bf16x2_of_f32(x.z, x.w);
  out.low[0] = ptx::bf16x2_of_f32(x.x - low_bf16(out.high[0]), x.y - high_bf16(out.high[0]));
  out.low[1] = ptx::bf16x2_of_f32(x.z - low_bf16(out.high[1]), x.w - high_bf16(out.high[1]));
  return out;
}

// A warp's inputs for two tiles in shared memory, filled asynchronously with fp32 while the pair of
// tiles before is multiplied, then split in place.
struct InputSlice {
  static constexpr int kCols = 2 * kTileCols;
  static constexpr int kStride = kCols + 16;  // floats; spreads the rows of an operand over banks
  float* data;                                // [rows][kStride]

  // Columns [first, first + kCols) of `rows` rows of x; zeros beyond `cols`.
  __device__ void fetch(const float* x, int rows, int64_t first, int64_t cols, int lane) const {
    const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(data));
    if (cols % 4 == 0) {
      const int64_t at = first + lane * 4;
      const int bytes = at < cols ? 16 : 0;  // the rest of 16 is filled with zeros
      for (int row = 0; row < rows; ++row) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                         target + (row * kStride + lane * 4) * 4),
                     "l"(x + row * cols + (bytes > 0 ? at : 0)), "r"(bytes));
      }
      return;
    }
    for (int row = 0; row < rows; ++row) {
      for (int i = lane; i < kCols; i += 32) {
        const int bytes = first + i < cols ? 4 : 0;
        asm volatile(
            "cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target + (row * kStride + i) * 4),
            "l"(x + row * cols + (bytes > 0 ? first + i : 0)), "r"(bytes));
      }
    }
  }
  __device__ void split_all(int rows, int lane) const {
    for (int row = 0; row < rows; ++row) {
      auto* at = reinterpret_cast<float4*>(data + row * kStride) + lane;
      const Inputs inputs = split(*at);
      *reinterpret_cast<uint4*>(at) =
          make_uint4(inputs.high[0], inputs.high[1], inputs.low[0], inputs.low[1]);
    }
  }
  // Inputs at, .., at + 3 of a row.
  __device__ Inputs get(int row, int at) const {
    const uint4 words = *reinterpret_cast<const uint4*>(data + row * kStride + at);
    return {{words.x, words.y}, {words.z, words.w}};
  }
};

// Sums of a warp: kStrips strips of 16 rows of weights x kTiles tiles of 8 rows of x.
template <int kStrips, int kTiles>
struct Sums {
  float v[kStrips][kTiles][4];
};

// Multiplies one tile of every strip and adds the scaled sums to `total`.
template <WeightType kType, int kStrips, int kTiles>
__device__ void add_tile(const RawTile<kType> (&raw)[kStrips], const InputSlice& x,
                         const int (&x_rows)[kTiles], int first_input, int lane,
                         Sums<kStrips, kTiles>& total) {
  constexpr int kSteps = kScaleSteps<kType>;
  constexpr uint32_t kOnes[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
#pragma unroll
  for (int first = 0; first < 4; first += kSteps) {
    Sums<kStrips, kTiles> part;
    Sums<1, kTiles> inputs;  // sums of the inputs, for offsets
#pragma unroll
    for (int s = first; s < first + kSteps; ++s) {
      Inputs b[kTiles];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        b[n] = x.get(x_rows[n], first_input + input_of<kType>(s, lane % 4));
        if constexpr (kHasOffset<kType>) {
          multiply_add(inputs.v[0][n], kOnes, b[n].high, s == first);
          multiply_add(inputs.v[0][n], kOnes, b[n].low);
        }
      }
#pragma unroll
      for (int m = 0; m < kStrips; ++m) {
        uint32_t a[4];
        raw[m].codes(s, a);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          multiply_add(part.v[m][n], a, b[n].high, s == first);
          multiply_add(part.v[m][n], a, b[n].low);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kStrips; ++m) {
      const RowScales scales = raw[m].row_scales(first);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& sum = total.v[m][n][i];
          sum = fmaf(scales.scale[i / 2], part.v[m][n][i], sum);
          if constexpr (kHasOffset<kType>) {
            sum = fmaf(scales.offset[i / 2], inputs.v[0][n][i], sum);
          }
        }
      }
    }
  }
}

template <WeightType kType, int kStrips, int kTiles>
__device__ void add_tile(const FloatTile<kType> (&raw)[kStrips], const InputSlice& x,
                         const int (&x_rows)[kTiles], int first_input, int lane,
                         Sums<kStrips, kTiles>& total) {
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    Inputs b[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      b[n] = x.get(x_rows[n], first_input + input_of<kType>(s, lane % 4));
    }
#pragma unroll
    for (int m = 0; m < kStrips; ++m) {
      uint32_t high[4];
      uint32_t low[4];
      raw[m].operands(s, high, low);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        multiply_add(total.v[m][n], high, b[n].high);
        multiply_add(total.v[m][n], high, b[n].low);
        if constexpr (kType != WeightType::kBF16) multiply_add(total.v[m][n], low, b[n].high);
      }
    }
  }
}

// Adds the warps' sums in their order and writes the outputs of a block.
template <int kStrips, int kTiles>
__device__ void finish(const Sums<kStrips, kTiles>& total, const ProductTarget& target,
                       int64_t first_output, int64_t first_row, int64_t end_row) {
  constexpr int kOutputs = kStrips * kStripRows;
  constexpr int kRows = kTiles * kRowTile;
  __shared__ float parts[kWarps][kRows][kOutputs + 1];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int m = 0; m < kStrips; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        parts[warp][n * kRowTile + lane % 4 * 2 + i % 2][m * kStripRows + lane / 4 + i / 2 * 8] =
            total.v[m][n][i];
      }
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < kRows * kOutputs; at += kThreads) {
    const int64_t row = first_row + at / kOutputs;
    const int64_t output = first_output + at % kOutputs;
    if (row >= end_row || output >= target.weights.rows) continue;
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += parts[w][at / kOutputs][at % kOutputs];
    float* out = target.out + row * target.weights.rows + output;
    if (target.bias != nullptr) sum += target.bias[output];
    *out = target.accumulate ? *out + sum : sum;
  }
}

// blockIdx.x: kStrips strips of one target; blockIdx.y: 8 kTiles rows, or one row and its expert.
template <WeightType kType, int kStrips, int kTiles>
__global__ void __launch_bounds__(kThreads, kStrips* kTiles == 4 ? 1 : 2)
    product_kernel(const ProductArgs args) {
  ptx::launch_dependents();
  int t = 0;
  while (t + 1 < args.num_targets && static_cast<int>(blockIdx.x) >= args.first_block[t + 1]) ++t;
  ProductTarget target = args.targets[t];
  const int64_t first_strip = (blockIdx.x - args.first_block[t]) * int64_t{kStrips};
  const int lane = threadIdx.x % 32;
  const int64_t cols = target.weights.cols;
  int64_t first_row = blockIdx.y * int64_t{args.block_rows};
  int64_t end_row = args.num_rows;
  int64_t x_row = first_row;
  if (args.choice.experts != nullptr) {
    ptx::wait_prerequisites();
    first_row = blockIdx.y;
    end_row = first_row + 1;
    x_row = first_row / args.choice.rows_per_x;
    target.weights.data = args.choice.matrices[args.choice.experts[first_row]];
  }
  const int rows = static_cast<int>(min(end_row - first_row, int64_t{args.block_rows}));
  const float* x = args.x + x_row * cols;
  extern __shared__ __align__(16) float slices[];  // [warp][2][rows][InputSlice::kStride]
  const int warp = threadIdx.x / 32;
  const int slice_floats = rows * InputSlice::kStride;
  float* const my_slices = slices + warp * 2 * slice_floats;

  // Rows of x that are not there are read as the first: nobody reads what comes of them.
  int x_rows[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int row = n * kRowTile + lane / 4;
    x_rows[n] = row < rows ? row : 0;
  }

  // A warp takes every kWarps-th pair of tiles; the next pair is on its way meanwhile.
  using Tile = typename TileOf<kType>::Type;
  using Source = typename TileOf<kType>::Source;
  const auto source_of = [&](int m) {
    const int64_t strip = min(first_strip + m, target.weights.num_strips() - 1);
    return Source(target.weights, strip, 2 * warp, lane);
  };
  Source sources[2] = {source_of(0), source_of(kStrips - 1)};
  const auto fetch_weights = [&](Tile(&tiles)[2][kStrips]) {
#pragma unroll
    for (int m = 0; m < kStrips; ++m) {
      tiles[0][m].load(sources[m], 0);
      tiles[1][m].load(sources[m], 1);
      sources[m].advance(2 * kWarps);
    }
  };
  const auto fetch_inputs = [&](int pair, const InputSlice& inputs) {
    inputs.fetch(x, rows, pair * InputSlice::kCols, cols, lane);
    asm volatile("cp.async.commit_group;");
  };
  Sums<kStrips, kTiles> total = {};
  Tile raw[2][kStrips];
  const int num_pairs = static_cast<int>(target.weights.num_tiles() / 2);
  // Weights do not change: the first are on their way before the inputs are there.
  if (warp < num_pairs) fetch_weights(raw);
  ptx::wait_prerequisites();
  if (warp < num_pairs) fetch_inputs(warp, InputSlice{my_slices});
#pragma unroll 1
  for (int pair = warp, turn = 0; pair < num_pairs; pair += kWarps, turn ^= 1) {
    Tile next[2][kStrips];
    if (pair + kWarps < num_pairs) {
      fetch_weights(next);
      fetch_inputs(pair + kWarps, InputSlice{my_slices + (turn ^ 1) * slice_floats});
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
    const InputSlice inputs{my_slices + turn * slice_floats};
    __syncwarp();
    inputs.split_all(rows, lane);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      add_tile<kType, kStrips, kTiles>(raw[i], inputs, x_rows, i * kTileCols, lane, total);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int m = 0; m < kStrips; ++m) raw[i][m] = next[i][m];
    }
  }
  finish(total, target, first_strip * kStripRows, first_row, end_row);
}

template <WeightType kType, int kStrips, int kTiles>
Status launch_product(const ProductArgs& args, dim3 grid, int rows, cudaStream_t stream) {
  const auto kernel = product_kernel<kType, kStrips, kTiles>;
  constexpr int kRowBytes = kWarps * 2 * InputSlice::kStride * static_cast<int>(sizeof(float));
  static const cudaError_t allowed = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kRowBytes * kTiles * kRowTile);
  KVANT_TRY(cuda_status(allowed, "asking for shared memory"));
  return launch_overlapped("product of few rows", kernel,
                           {grid, kThreads, static_cast<size_t>(rows * kRowBytes), stream}, args);
}

template <WeightType kType>
Status launch_product(const ProductArgs& args, dim3 grid, int strips, int rows,
                      cudaStream_t stream) {
  if constexpr (kMaxStrips<kType> == 2) {
    if (strips == 2) {
      return rows <= kRowTile ? launch_product<kType, 2, 1>(args, grid, rows, stream)
                              : launch_product<kType, 2, 2>(args, grid, rows, stream);
    }
  }
  return rows <= kRowTile ? launch_product<kType, 1, 1>(args, grid, rows, stream)
                          : launch_product<kType, 1, 2>(args, grid, rows, stream);
}

}  // namespace

Status multiply_rows(const float* x, int64_t num_rows, std::span<const ProductTarget> targets,
                     const ExpertChoice& choice, int num_sms, cudaStream_t stream) {
  if (num_rows == 0 || targets.empty()) return {};
  KVANT_CHECK(targets.size() <= kMaxProductTargets, "a launch has at most four targets");
  int64_t all_strips = 0;
  for (const ProductTarget& target : targets) all_strips += target.weights.num_strips();
  const bool chosen = choice.experts != nullptr;
  const int64_t pieces = all_strips * (chosen ? num_rows : 1);
  // Two strips are cheaper, one keeps more processors busy.
  const int strips = is_tiled(targets[0].weights.type) && pieces >= 4 * int64_t{num_sms} ? 2 : 1;
  // Rows of x that a block takes.
  const int rows = chosen ? 1 : static_cast<int>(std::min<int64_t>(num_rows, 2 * kRowTile));
  ProductArgs args = {};
  args.num_targets = static_cast<int>(targets.size());
  args.x = x;
  args.num_rows = num_rows;
  args.block_rows = rows;
  args.choice = choice;
  int blocks = 0;
  for (size_t t = 0; t < targets.size(); ++t) {
    args.targets[t] = targets[t];
    args.first_block[t] = blocks;
    blocks += static_cast<int>((targets[t].weights.num_strips() + strips - 1) / strips);
  }
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>((num_rows + rows - 1) / rows));
  return for_weight_type<WeightTag>(targets[0].weights.type, [&](auto tag) {
    return launch_product<decltype(tag)::kValue>(args, grid, strips, rows, stream);
  });
}

}  // namespace kvant::backend::cuda
