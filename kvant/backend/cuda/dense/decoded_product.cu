#include "kvant/backend/cuda/dense/decoded_product.h"

#include <algorithm>
#include <limits>

#include "kvant/backend/cuda/dense/decoded_output.cuh"
#include "kvant/backend/cuda/dense/decoded_producer.cuh"
#include "kvant/backend/cuda/dense/file_blocks.cuh"
#include "kvant/backend/cuda/device.h"
#include "kvant/backend/cuda/launch.h"
#include "kvant/backend/cuda/status.h"
#include "kvant/base/check.h"

namespace kvant::backend::cuda {

namespace {

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
  multiply_parts<kType, kN>(
      args, ring, memory, [&](const DecodedPart<kN>& part, DecodedSums<kN>& sums) {
        if (!joins) {
          write_sums<kType, kN>(args, part, sums);
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

int64_t num_items(const DecodedWork& work) {
  const int64_t of_item = work.gated ? kSlots / 2 : kSlots;
  return (work.num_strips + of_item - 1) / of_item;
}

// How long such a product takes, roughly, with its rows made ready: fits to products of
// Llama-3.1-8B in Q4_K on an H100 (docs/kernels/cuda-linear.md).
int64_t nanoseconds(const Division& division, const DecodedWork& work) {
  constexpr int64_t kLaunches = 3700;
  constexpr int64_t kBytesOfNs = 2800;  // of memory
  const int rows = division.rows;
  const int64_t of_tile = rows <= 16 ? 394 : rows <= 32 ? 410 : rows <= 64 ? 483 : 730;
  const int64_t writing = division.splits == 1 ? 60 * rows : 2000 + 30 * rows;
  // Clusters lie in a part of the device, whose multiprocessors they need not fill.
  const int64_t at_once = division.splits == 8   ? work.num_sms * 7 / 8 / 8 * 8
                          : division.splits == 4 ? work.num_sms * 10 / 11 / 4 * 4
                                                 : work.num_sms / division.splits * division.splits;
  const int64_t items = num_items(work);
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
  for (const int rows : {16, 32, 64, 128}) {
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
  constexpr int kParts = kN * kPartStride * 4;
  const int room =
      device_traits().shared_per_block - static_cast<int>(sizeof(TeamSlots)) - kAlignment;
  args.slots = std::min(room / Stage::kBytes, kMostSlots);
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
       .shared_bytes =
           static_cast<size_t>(kAlignment + std::max(args.slots * Stage::kBytes, kParts)),
       .stream = stream,
       .cluster = static_cast<unsigned>(args.splits)},
      args);
}

}  // namespace

bool has_decoded_product(formats::WeightType type) {
  return device_traits().level == DeviceLevel::kHopper && is_tiled(type);
}

int64_t decoded_product_nanoseconds(const DecodedWork& work) {
  return best_division(work).nanoseconds;
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
  const int64_t items = num_items(work);
  args.splits = division.splits;
  return for_weight_type<WeightTag>(weights.type, [&](auto tag) -> Status {
    constexpr WeightType kType = decltype(tag)::kValue;
    if constexpr (kTiled<kType>) {
      switch (division.rows) {
        case 16: return launch<kType, 16>(args, items, product.num_sms, stream);
        case 32: return launch<kType, 32>(args, items, product.num_sms, stream);
        case 64: return launch<kType, 64>(args, items, product.num_sms, stream);
        default: return launch<kType, 128>(args, items, product.num_sms, stream);
      }
    }
    return Error(ErrorCode::kInternal, "has_decoded_product() says which types there are");
  });
}

}  // namespace kvant::backend::cuda
