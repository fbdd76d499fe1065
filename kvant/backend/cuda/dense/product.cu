#include "kvant/backend/cuda/dense/product.h"

#include <algorithm>
#include <type_traits>

#include "kvant/backend/cuda/dense/bulk_product.h"
#include "kvant/backend/cuda/dense/file_blocks.cuh"
#include "kvant/backend/cuda/dense/operators.h"
#include "kvant/backend/cuda/dense/product_items.cuh"
#include "kvant/backend/cuda/dense/stage_products.cuh"
#include "kvant/backend/cuda/device.h"
#include "kvant/backend/cuda/launch.h"
#include "kvant/backend/cuda/status.h"
#include "kvant/base/check.h"

namespace kvant::backend::cuda {
namespace {

// A multiprocessor has one block, so that all have equal work; its shared memory is filled with
// weights while it waits for its inputs.
constexpr int kSharedMemory = 226 << 10;
// Of a block on every GPU.
constexpr int kLeastSharedMemory = 98 << 10;
// Bytes of a warp's ring, about. `kSmall`: for GPUs whose shared memory does not take the others.
template <int kTiles, bool kSmall>
inline constexpr int kRingBytes = kTiles == 4 || kSmall ? 4736
                                  : kTiles == 1         ? 9728
                                                        : 7168;

// A warp's stages in the order in which it multiplies them: of every item, every kWarps-th unit.
template <WeightType kType>
class StageStream {
 public:
  // `warp` of a team.
  __device__ StageStream(const ProductArgs& args, int num_tiles, int team, int warp, int lane)
      : args_(args),
        num_tiles_(num_tiles),
        team_(team),
        first_(warp * kUnitTiles<kType>),
        lane_(lane),
        item_(first_ < num_tiles ? Item::first(args, team) : args.num_items) {
    start_item();
  }

  // Copies the next one, if there is one; a group of copies in any case.
  __device__ void copy_next(uint32_t target) {
    if (item_ < args_.num_items) {
      source_.copy(target, num_tiles_, tile_, lane_);
      advance();
    }
    ptx::copies_commit();
  }

 private:
  __device__ void start_item() {
    tile_ = first_;
    if (item_ >= args_.num_items) return;
    const Item item(args_, item_);
    source_.locate(args_.targets[item.target].weights, item.data(args_, team_), args_.stride,
                   item.strip, num_tiles_, tile_, lane_);
  }
  __device__ void advance() {
    constexpr int kTiles = Stage<kType>::kTiles;
    constexpr bool kWhole = kTiles == kUnitTiles<kType>;
    const bool ends = kWhole || (tile_ + kTiles) % kUnitTiles<kType> == 0;  // a unit
    const int step = ends ? kTiles + (kWarps - 1) * kUnitTiles<kType> : kTiles;
    tile_ += step;
    if (tile_ < num_tiles_ || !ends) {
      source_.advance(step);
      return;
    }
    item_ = Item::next(args_, item_);
    start_item();
  }

  const ProductArgs& args_;
  const int num_tiles_;
  const int team_;
  const int first_;
  const int lane_;
  int item_;
  int tile_ = 0;
  typename Stage<kType>::Source source_;
};

template <WeightType kType, int kTiles, bool kSmall>
struct Ring {
  static constexpr int kSlots = std::max(2, kRingBytes<kTiles, kSmall> / Stage<kType>::kBytes);
  static constexpr int kBytes = kSlots * Stage<kType>::kBytes;
  static constexpr int kAll = kTeams * kWarps * kBytes;
  static constexpr int kTurns = kSmall ? 1 : 2;
  static constexpr int kFixed = kAll + kTeams * int{sizeof(Parts<kTiles, kTurns>)};
  static_assert(!kSmall || kFixed <= kLeastSharedMemory);

  static int shared_memory() {
    return std::min(kSharedMemory, device_traits().shared_per_block - 1024);
  }
  static bool fits() { return kFixed <= shared_memory(); }
  // Bytes of prepared rows that a block keeps for itself.
  static int most_staged() { return shared_memory() - kFixed; }
};
// Whether blocks ever prepare rows for themselves; registers are short where more are multiplied.
template <int kTiles>
inline constexpr bool kStages = kTiles <= 2;

// Blocks stay; each team takes every so many-th item.
template <WeightType kType, int kTiles, bool kSmall>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ ProductArgs args) {
  using Rings = Ring<kType, kTiles, kSmall>;
  using Total = std::conditional_t<kAsBytes<kType>, Sums<kTiles>, FloatSums<kTiles>>;
  constexpr int kSlots = Rings::kSlots;
  constexpr int kRingSize = Rings::kBytes;
  constexpr int kStageBytes = Stage<kType>::kBytes;
  extern __shared__ __align__(128) uint8_t memory[];  // rings of the warps, prepared rows
  __shared__ Parts<kTiles, Rings::kTurns> parts[kTeams];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32 % kWarps;
  const int team = threadIdx.x / kTeamThreads;
  ptx::launch_dependents();
  // Weights do not change: the first are on their way before the inputs are there. Which experts
  // are wanted is an input.
  if (args.choice.experts != nullptr) ptx::wait_prerequisites();
  uint8_t* const ring = memory + threadIdx.x / 32 * kRingSize;
  const uint32_t ring_address = ptx::shared_address(ring);
  const auto cols = args.targets[0].weights.cols;
  const int padded = static_cast<int>(args.targets[0].weights.padded_cols());
  const int num_tiles = padded / kTileCols;
  StageStream<kType> stream(args, num_tiles, team, warp, lane);
#pragma unroll
  for (int slot = 0; slot < kSlots - 1; ++slot) stream.copy_next(ring_address + slot * kStageBytes);
  float norm_weights[8] = {};
  if (kTiles == 1 && args.prepared == nullptr && args.norm.weight != nullptr) {
    load_eight(args.norm.weight, 8 * static_cast<int>(threadIdx.x), cols, norm_weights);
  }
  ptx::wait_prerequisites();

  const bool staged = kStages<kTiles> && args.prepared == nullptr;
  const PreparedRows prepared(staged ? memory + Rings::kAll : args.prepared, kAsBytes<kType>,
                              args.prepared_rows, padded);
  if (staged) {
    prepare_all<kType, kTiles == 1>(args, prepared, norm_weights);
    __syncthreads();
  }

  const uint8_t* stage = ring;
  uint32_t free_stage = ring_address + (kSlots - 1) * kStageBytes;
  int turn = 0;
  for (int index = Item::first(args, team); index < args.num_items;
       index = Item::next(args, index), turn = (turn + 1) % Rings::kTurns) {
    const Item item(args, index);
    const LaneRows<kType, kTiles> rows(prepared, item.x_row, item.rows, lane);
    const Output<kType> output(args, item);
    Total total = {};
    for (int unit = warp * kUnitTiles<kType>; unit < num_tiles;
         unit += kWarps * kUnitTiles<kType>) {
#pragma unroll
      for (int part = 0; part < kUnitTiles<kType>; part += Stage<kType>::kTiles) {
        ptx::copies_wait<kSlots - 2>();
        __syncwarp();  // all lanes' copies are there, and all have read the slot before
        stream.copy_next(free_stage);
        free_stage = free_stage == ring_address + (kSlots - 1) * kStageBytes
                         ? ring_address
                         : free_stage + kStageBytes;
        add_stage<Stage<kType>::kTiles>([&](auto& raw, int i) { raw.load_stage(stage, i, lane); },
                                        rows, unit + part, num_tiles, total);
        stage = stage == ring + (kSlots - 1) * kStageBytes ? ring : stage + kStageBytes;
      }
    }
    const auto meet = [&] {
      ptx::named_barrier(args.gated ? 1 : 1 + team, args.gated ? kThreads : kTeamThreads);
    };
    parts[team].put(finished<kType>(total), turn);
    meet();
    output.write(args, parts, team, turn);
    if constexpr (Rings::kTurns == 1) meet();
  }
}

// F32 weights on GPUs whose memory does not take rings of them: a warp an output of a row.
__global__ void __launch_bounds__(kThreads)
    plain_product_kernel(const __grid_constant__ ProductArgs args) {
  ptx::launch_dependents();
  ptx::wait_prerequisites();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t warps = int64_t{gridDim.x} * (kThreads / 32);
  for (int t = 0; t < args.num_targets; ++t) {
    const ProductTarget& target = args.targets[t];
    const WeightTiles& weights = target.weights;
    for (int64_t i = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
         i < args.num_rows * weights.rows; i += warps) {
      const int64_t row = i / weights.rows, output = i % weights.rows;
      const bool chosen = args.choice.experts != nullptr;
      const uint8_t* data = chosen ? args.choice.matrices[args.choice.experts[row]] : weights.data;
      const auto* w = reinterpret_cast<const float*>(data) + output * weights.padded_cols();
      const float* x = args.x + (chosen ? row / args.choice.rows_per_x : row) * weights.cols;
      float sum = 0.0f;
      for (int64_t c = lane; c < weights.cols; c += 32) sum = fmaf(w[c], x[c], sum);
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(~0u, sum, distance);
      if (lane != 0) continue;
      if (target.bias != nullptr) sum += target.bias[output];
      target.out[i] = target.accumulate ? target.out[i] + sum : sum;
    }
  }
}

constexpr int kPreparedChunk = 8 * kThreads;  // inputs of a block

template <RowForm kForm>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const float* x, int64_t cols, int padded, int num_rows, uint8_t* out) {
  ptx::launch_dependents();
  ptx::wait_prerequisites();
  const RowWriter<kForm> writer{PreparedRows(out, kForm == RowForm::kCodes, num_rows, padded)};
  const int row = static_cast<int>(blockIdx.x);
  const int first = static_cast<int>(blockIdx.y) * kPreparedChunk;
  prepare_inputs(writer, row, x + row * cols, cols, first, min(kPreparedChunk, padded - first),
                 kThreads);
}

// A block a row, which is normed first.
template <RowForm kForm>
__global__ void __launch_bounds__(kNormThreads)
    prepare_normed_kernel(const float* x, RowNorm norm, int64_t cols, int padded, int num_rows,
                          uint8_t* out) {
  ptx::launch_dependents();
  float weights[8];
  load_eight(norm.weight, 8 * static_cast<int>(threadIdx.x), cols, weights);
  ptx::wait_prerequisites();
  const RowWriter<kForm> writer{PreparedRows(out, kForm == RowForm::kCodes, num_rows, padded)};
  prepare_normed<1>(writer, static_cast<int>(blockIdx.x), x, cols, padded, norm.weight,
                    norm.epsilon, weights);
}

// In the workspace.
template <WeightType kType>
Status prepare_rows(ProductArgs& args, const RowProduct& product, cudaStream_t stream) {
  KVANT_CHECK(prepared_bytes<kType>(args) <= product.workspace_bytes,
              "reserve_workspace covers the prepared rows");
  args.prepared = reinterpret_cast<uint8_t*>(product.workspace);
  const WeightTiles& weights = args.targets[0].weights;
  const int padded = static_cast<int>(weights.padded_cols());
  const auto rows = static_cast<unsigned>(args.prepared_rows);
  if (args.norm.weight != nullptr) {
    return launch_overlapped("norm and preparation of rows", prepare_normed_kernel<kRowForm<kType>>,
                             {rows, kNormThreads, 0, stream}, args.x, args.norm, weights.cols,
                             padded, args.prepared_rows, args.prepared);
  }
  const dim3 grid(rows, static_cast<unsigned>((padded + kPreparedChunk - 1) / kPreparedChunk));
  return launch_overlapped("preparation of rows", prepare_kernel<kRowForm<kType>>,
                           {grid, kThreads, 0, stream}, args.x, weights.cols, padded,
                           args.prepared_rows, args.prepared);
}

template <WeightType kType, int kTiles, bool kSmall = false>
Status launch_product(ProductArgs args, const RowProduct& product, cudaStream_t stream) {
  using Rings = Ring<kType, kTiles, kSmall>;
  if constexpr (!kSmall) {
    if (!Rings::fits()) {
      if constexpr (kType == WeightType::kF32) {
        return launch_overlapped("product of few rows in F32", plain_product_kernel,
                                 {static_cast<unsigned>(product.num_sms), kThreads, 0, stream},
                                 args);
      } else {
        return launch_product<kType, kTiles, true>(args, product, stream);
      }
    }
  }
  const int64_t bytes = prepared_bytes<kType>(args);
  const bool staged = kStages<kTiles> && bytes <= Rings::most_staged() && prepares_in_blocks(args);
  if (!staged) {
    KVANT_TRY(prepare_rows<kType>(args, product, stream));
  }
  const auto kernel = product_kernel<kType, kTiles, kSmall>;
  static const cudaError_t allowed = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Rings::kAll + Rings::most_staged());
  KVANT_TRY(cuda_status(allowed, "asking for shared memory"));
  const auto shared_bytes = static_cast<size_t>(Rings::kAll + (staged ? bytes : 0));
  const auto blocks = static_cast<unsigned>(std::min(args.num_items, product.num_sms));
  return launch_overlapped("product of few rows", kernel, {blocks, kThreads, shared_bytes, stream},
                           args);
}

// f(tag of the tiles of rows) for items of so many rows.
template <typename F>
auto for_row_tiles(int64_t rows, F&& f) {
  if (rows <= kRowTile) return f(std::integral_constant<int, 1>());
  if (rows <= 2 * kRowTile) return f(std::integral_constant<int, 2>());
  return f(std::integral_constant<int, 4>());
}

// `x_rows` rows of x are prepared for `num_rows` rows of output.
Status multiply_chunk(const RowProduct& product, std::span<const ProductTarget> targets,
                      int64_t x_rows, cudaStream_t stream) {
  const bool chosen = product.choice.experts != nullptr;
  ProductArgs args = {};
  args.num_targets = static_cast<int>(targets.size());
  args.x = product.x;
  args.num_rows = product.num_rows;
  args.choice = product.choice;
  args.norm = product.norm;
  args.gated = product.gated;
  args.gate = product.gate;
  args.prepared_rows = static_cast<int>(x_rows);
  args.num_groups = static_cast<int>(chosen ? product.num_rows : num_row_groups(product.num_rows));
  const WeightTiles& weights = targets[0].weights;
  args.stride = is_tiled(weights.type) ? weights.strip_bytes()
                                       : weights.padded_cols() * weights.element_bytes();
  int strips = 0;
  for (size_t t = 0; t < targets.size(); ++t) {
    args.targets[t] = targets[t];
    args.first_strip[t] = strips;
    strips += static_cast<int>(targets[t].weights.num_strips());
  }
  if (product.gated) {  // the second target is found beside the first
    args.num_targets = 1;
    strips = args.first_strip[1];
  }
  args.num_items = strips * args.num_groups;
  return for_weight_type<WeightTag>(weights.type, [&](auto tag) -> Status {
    constexpr WeightType kType = decltype(tag)::kValue;
    if (takes_bulk_product(args, product)) {
      if (!prepares_in_blocks(args)) KVANT_TRY(prepare_rows<kType>(args, product, stream));
      return multiply_bulk(args, product, stream);
    }
    return for_row_tiles(rows_of_items(args), [&](auto tiles) {
      return launch_product<kType, decltype(tiles)::value>(args, product, stream);
    });
  });
}

}  // namespace

bool can_norm(const WeightTiles& weights) {
  // Shorter rows are summed in another order.
  return weights.cols > kMostWarpNorm &&
         (weights.type != WeightType::kF32 || Ring<WeightType::kF32, 4, false>::fits());
}

Status multiply_rows(const RowProduct& product, std::span<const ProductTarget> targets,
                     cudaStream_t stream) {
  if (product.num_rows == 0 || targets.empty()) return {};
  KVANT_CHECK(targets.size() <= kMaxProductTargets, "a launch has at most four targets");
  const bool chosen = product.choice.experts != nullptr;
  const int64_t per_x = chosen ? product.choice.rows_per_x : 1;
  const int64_t cols = targets[0].weights.cols;
  const int64_t step = kPreparedRows * per_x;
  for (int64_t first = 0; first < product.num_rows; first += step) {
    RowProduct chunk = product;
    chunk.num_rows = std::min(step, product.num_rows - first);
    chunk.x += first / per_x * cols;
    if (chosen) chunk.choice.experts += first;
    std::array<ProductTarget, kMaxProductTargets> moved;
    for (size_t t = 0; t < targets.size(); ++t) {
      moved[t] = targets[t];
      moved[t].out += first * targets[t].weights.rows;
    }
    KVANT_TRY(multiply_chunk(chunk, std::span(moved).first(targets.size()),
                             (chunk.num_rows + per_x - 1) / per_x, stream));
  }
  return {};
}

}  // namespace kvant::backend::cuda
