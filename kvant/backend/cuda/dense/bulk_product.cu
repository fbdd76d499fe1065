#include "kvant/backend/cuda/dense/bulk_product.h"

#include <algorithm>

#include "kvant/backend/cuda/dense/file_blocks.cuh"
#include "kvant/backend/cuda/dense/product_items.cuh"
#include "kvant/backend/cuda/dense/stage_products.cuh"
#include "kvant/backend/cuda/dense/team_stages.cuh"
#include "kvant/backend/cuda/device.h"
#include "kvant/backend/cuda/launch.h"
#include "kvant/backend/cuda/status.h"

namespace kvant::backend::cuda {
namespace {

constexpr int kAllThreads = kThreads + 32 * kTeams;  // a producer warp a team
constexpr int kLeastSlots = 2;
constexpr int kRingBytes = 152 << 10;  // of both teams' rings, at most
// Stages of a team on their way. While the ring is filled the first time, what the launch before
// writes and the rows to multiply would wait behind them (docs/kernels/cuda-linear.md).
constexpr int kMostInFirstTurn = 1;
template <WeightType kType>
inline constexpr int kMostOnTheWay = kTiled<kType> ? 2 : 3;
// Barriers of a part of the block; 0 is that of all consumers.
constexpr int kTeamBarrier = 1;  // and 2
constexpr int kReadyBarrier = 3;

struct BulkArgs {
  ProductArgs product;
  int slots;  // of a team's ring
};

// Copies a team's weights, item by item, as far as the ring goes. Weights do not change, so nothing
// is waited for but which experts are wanted.
template <WeightType kType>
class Producer {
 public:
  using Stage = TeamStage<kType>;

  __device__ Producer(const BulkArgs& args, TeamSlots& slots, uint32_t stages, int team, int lane)
      : args_(args),
        product_(args.product),
        slots_(slots),
        stages_(stages),
        team_(team),
        lane_(lane),
        ring_(slots, args.slots),
        landing_(ring_) {}

  __device__ void run() {
    if (product_.choice.experts != nullptr) ptx::wait_prerequisites();
    for (int index = Item::first(product_, team_); index < product_.num_items;
         index = Item::next(product_, index)) {
      copy(index);
    }
    end();
  }

 private:
  __device__ void copy(int index) {
    const Item item(product_, index);
    const WeightTiles& weights = product_.targets[item.target].weights;
    StageSource source = {.data = item.data(product_, team_),
                          .strip = item.strip,
                          .stride = product_.stride,
                          .rows = weights.rows,
                          .num_tiles = static_cast<int>(weights.num_tiles()),
                          .first = 0,
                          .there = 0};
    for (; source.first < source.num_tiles; source.first += Stage::kTiles, ring_.advance()) {
      source.there = min(Stage::kTiles, source.num_tiles - source.first);
      ring_.wait_empty();
      const int most = ring_.turns == 0 ? kMostInFirstTurn : min(kMostOnTheWay<kType>, ring_.slots);
      for (; on_the_way_ >= most; --on_the_way_, landing_.advance()) landing_.wait_full();
      ++on_the_way_;
      if (lane_ == 0) slots_.item[ring_.slot] = index;
      Stage::copy(source, stages_ + ring_.slot * Stage::kBytes, ring_.full_slot(), lane_, policy_);
    }
  }
  __device__ void end() {
    ring_.wait_empty();
    if (lane_ != 0) return;
    slots_.item[ring_.slot] = kNoItem;
    ptx::mbarrier_arrive(ring_.full_slot());
  }

  const BulkArgs& args_;
  const ProductArgs& product_;
  TeamSlots& slots_;
  const uint32_t stages_;
  const int team_;
  const int lane_;
  TeamRing ring_;
  TeamRing landing_;  // of the stages on their way, the one that was asked for first
  int on_the_way_ = 0;
  const uint64_t policy_ = ptx::policy_evict_first();
};

// What a warp adds up of an item: a tile of rows, or a single one (kOne).
template <WeightType kType, bool kOne>
struct WarpSums {
  using Stage = TeamStage<kType>;
  static constexpr bool kTilesAside = kOne && kAsBytes<kType>;
  using Rows = std::conditional_t<kTilesAside, OneRow<kType>, LaneRows<kType, 1>>;
  Rows rows;
  std::conditional_t<kAsBytes<kType>, Sums<1>, FloatSums<1>> total = {};

  __device__ WarpSums(const PreparedRows& prepared, const Item& item, int lane)
      : rows(prepared, item.x_row, item.rows, lane) {}

  // Tiles of a stage from `in_stage` on, which is tile `tile` of the strip.
  __device__ void add(const uint8_t* stage, int in_stage, int tile, int num_tiles, int lane) {
    const auto load = [&](auto& raw, int i) { Stage::load(raw, stage, in_stage + i, lane); };
    if constexpr (kTilesAside) {
      add_stage_of_one(load, rows, tile, num_tiles, total.v[0]);
    } else {
      add_stage<Stage::kUnit>(load, rows, tile, num_tiles, total);
    }
  }
  __device__ Sums<1> finish() {
    if constexpr (kTilesAside) join_tiles(total.v[0]);
    return finished<kType>(total);
  }
};

// A team's part of all items.
template <WeightType kType, bool kOne>
__device__ void multiply_items(const ProductArgs& args, const PreparedRows& prepared,
                               const TeamSlots& slots, TeamRing ring, const uint8_t* stages,
                               Parts<1> (&parts)[kTeams], int team, int lane) {
  using Stage = TeamStage<kType>;
  const int warp = static_cast<int>(threadIdx.x) / 32 % kWarps;
  const auto num_tiles = static_cast<int>(args.targets[0].weights.num_tiles());
  for (int turn = 0;; turn ^= 1) {
    ring.wait_full();
    const int index = slots.item[ring.slot];
    if (index == kNoItem) return;
    const Item item(args, index);
    const Output<kType> output(args, item);
    WarpSums<kType, kOne> sums(prepared, item, lane);
    for (int first = 0; first < num_tiles; first += Stage::kTiles, ring.advance()) {
      ring.wait_full();
      const int in_stage = warp * Stage::kUnit;
      if (first + in_stage < num_tiles) {
        sums.add(stages + ring.slot * Stage::kBytes, in_stage, first + in_stage, num_tiles, lane);
      }
      __syncwarp();
      if (lane == 0) ring.release();
    }
    parts[team].put(sums.finish(), turn);
    ptx::named_barrier(kTeamBarrier + (args.gated ? 0 : team),
                       args.gated ? kThreads : kTeamThreads);
    output.write(args, parts, team, turn);
  }
}

// A block a multiprocessor, with two teams of 8 warps that take items, and a producer each.
template <WeightType kType, bool kOne>
__global__ void __launch_bounds__(kAllThreads, 1)
    bulk_product_kernel(const __grid_constant__ BulkArgs args) {
  using Stage = TeamStage<kType>;
  extern __shared__ __align__(128) uint8_t memory[];  // rings of the teams, prepared rows
  __shared__ Parts<1> parts[kTeams];
  __shared__ TeamSlots slots[kTeams];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const ProductArgs& product = args.product;
  const int ring_bytes = args.slots * Stage::kBytes;
  ptx::launch_dependents();
  if (warp >= kTeams * kWarps) {
    const int team = warp - kTeams * kWarps;
    init_slots(slots[team], args.slots, lane);
    ptx::named_arrive(kReadyBarrier, kAllThreads);
    Producer<kType>(args, slots[team], ptx::shared_address(memory) + team * ring_bytes, team, lane)
        .run();
    return;
  }

  const bool staged = product.prepared == nullptr;
  float norm_weights[8] = {};
  if (staged && product.norm.weight != nullptr) {
    load_eight(product.norm.weight, 8 * static_cast<int>(threadIdx.x),
               product.targets[0].weights.cols, norm_weights);
  }
  ptx::wait_prerequisites();
  const PreparedRows prepared(staged ? memory + kTeams * ring_bytes : product.prepared,
                              kAsBytes<kType>, product.prepared_rows,
                              static_cast<int>(product.targets[0].weights.padded_cols()));
  if (staged) prepare_all<kType, true>(product, prepared, norm_weights);
  ptx::named_barrier(kReadyBarrier, kAllThreads);  // rows, and the barriers of slots
  const int team = warp / kWarps;
  multiply_items<kType, kOne>(product, prepared, slots[team], TeamRing(slots[team], args.slots),
                              memory + team * ring_bytes, parts, team, lane);
}

// Of a block's shared memory, for rings and prepared rows.
int dynamic_bytes() {
  constexpr int kFixed = kTeams * int{sizeof(Parts<1>) + sizeof(TeamSlots)} + 256;
  return device_traits().shared_per_block - kFixed;
}

template <WeightType kType>
int slots_beside(int64_t staged) {
  const int64_t room = std::min<int64_t>(kRingBytes, dynamic_bytes() - staged);
  return static_cast<int>(
      std::min<int64_t>(kMostSlots, room / (kTeams * TeamStage<kType>::kBytes)));
}

template <WeightType kType>
inline constexpr bool kHasKernel = kType != WeightType::kF32;

template <WeightType kType, bool kOne>
Status launch(const ProductArgs& args, const RowProduct& product, cudaStream_t stream) {
  const auto kernel = bulk_product_kernel<kType, kOne>;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic_bytes());
  KVANT_TRY(cuda_status(allowed, "asking for shared memory"));
  const int64_t staged = args.prepared == nullptr ? prepared_bytes<kType>(args) : 0;
  const int slots = slots_beside<kType>(staged);
  const int64_t rings = int64_t{kTeams} * slots * TeamStage<kType>::kBytes;
  return launch_overlapped(
      "product of few rows", kernel,
      {.grid = static_cast<unsigned>(std::min(args.num_items, product.num_sms)),
       .threads = kAllThreads,
       .shared_bytes = static_cast<size_t>(rings + staged),
       .stream = stream},
      {.product = args, .slots = slots});
}

}  // namespace

bool takes_bulk_product(const ProductArgs& args, const RowProduct& product) {
  if (device_traits().level != DeviceLevel::kHopper || product.deterministic ||
      rows_of_items(args) > kRowTile) {
    return false;
  }
  return for_weight_type<WeightTag>(args.targets[0].weights.type, [&](auto tag) {
    constexpr WeightType kType = decltype(tag)::kValue;
    if constexpr (kHasKernel<kType>) {
      const int64_t staged = prepares_in_blocks(args) ? prepared_bytes<kType>(args) : 0;
      return slots_beside<kType>(staged) >= kLeastSlots;
    }
    return false;
  });
}

Status multiply_bulk(const ProductArgs& args, const RowProduct& product, cudaStream_t stream) {
  return for_weight_type<WeightTag>(args.targets[0].weights.type, [&](auto tag) -> Status {
    constexpr WeightType kType = decltype(tag)::kValue;
    if constexpr (kHasKernel<kType>) {
      return rows_of_items(args) == 1 ? launch<kType, true>(args, product, stream)
                                      : launch<kType, false>(args, product, stream);
    }
    return Error(ErrorCode::kInternal, "takes_bulk_product() asks for a kernel");
  });
}

}  // namespace kvant::backend::cuda
