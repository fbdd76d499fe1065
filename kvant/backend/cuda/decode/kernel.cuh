// Decode attention on stored pages: the kernel (docs/kernels/cuda-decode.md).
//
// A block is a number of teams of warps and a warpgroup of producers. Each team is a worker of the
// plan (plan.h): it walks its segments page by page; the warps of a team share a page, tile by
// tile, and keep maximum, sum of weights and output of their own tokens in registers until the
// segment ends. Tokens are rows of the tensor-core products, query rows their columns: up to 8
// kNTiles of them.
#pragma once

#include "kvant/backend/cuda/decode/consumer.cuh"
#include "kvant/backend/cuda/decode/merge.cuh"
#include "kvant/backend/cuda/decode/producer.cuh"

namespace kvant::backend::cuda {

// A warp's part of what its team has to do. `own`: memory of the team beside its ring.
template <typename Shape>
__device__ __forceinline__ void run_segments(const DecodeParams& params,
                                             const Ring<Shape::kSlotsTakeSteps>& ring,
                                             std::byte* own, BlockResult<Shape> (&results)[2],
                                             int team, int warp, int lane) {
  const int worker = static_cast<int>(blockIdx.x) * params.teams + team;
  Consumer<Shape> consumer(params, ring, own, results, team, warp % Shape::kTeam, lane);
  consumer.clear_queries();
  const WorkerStart& start = params.workers[worker];
  const int num_segments = start.num_segments;
  uint32_t word = reinterpret_cast<const uint32_t*>(&start.segment)[lane % 16];
  // The last segment's sums go to the block's merge, unless each is to be merged by itself.
  const int merged_in_block = params.by_position ? -1 : num_segments - 1;
  // Queries, and buffers that the kernels before still read.
  const auto wait = [&] {
    if (!params.beside_shared) ptx::wait_prerequisites();
  };
  if (num_segments == 0) wait();
  for (int i = 0; i < num_segments; ++i) {
    if (i > 0) {
      const Segment* next = params.segments + start.first_segment + i;
      word = reinterpret_cast<const uint32_t*>(next)[lane % 16];
    }
    consumer.enter_segment(word);
    if (i == 0) wait();
    consumer.run_segment(worker, i == merged_in_block);
  }
}

// Static shared memory of the kernel below, with padding between its two arrays.
template <typename Shape>
inline constexpr int kFixedBytes = static_cast<int>(sizeof(RingState) * Shape::kTeams +
                                                    sizeof(BlockResult<Shape>) * 2 *
                                                        Shape::kTeams) +
                                   128;

// Keeps a team's ring full. Where slots take whole steps, each copy of the first turn, which begins
// while kernels before this one still run, waits for the one before: what those kernels read, and
// the queries, would wait behind all that is on its way.
template <typename Shape, typename Ring>
__device__ __forceinline__ void keep_full(Producer<Shape>& producer, const Ring& ring,
                                          int spare_slots) {
  for (int i = 0; producer.active(); ++i) {
    if (!Shape::kSlotsTakeSteps) {
      producer.wait_for_slot(0);
    } else if (i >= ring.num_slots) {
      producer.wait_for_slot(spare_slots);
    } else if (i > 0) {
      ring.wait({i - 1, 0});
    }
    producer.issue();
  }
}

// Up to four teams have a warp of producers each, which sleeps until a slot is empty. For more, one
// warp works, a lane for each team, which looks at their slots in turn.
template <typename Shape, typename RingOf>
__device__ __forceinline__ void run_producers(const DecodeParams& params, const RingOf& ring_of,
                                              int warp, int lane) {
  constexpr bool kWarpEach = KVANT_MOVES_REGISTERS && Shape::kProducerWarpEach;
  const int team = kWarpEach ? warp : lane;
  if (team >= params.teams || (kWarpEach ? lane : warp) != 0) return;
  Producer<Shape> producer(params, ring_of(team),
                           static_cast<int>(blockIdx.x) * params.teams + team);
  if constexpr (kWarpEach) {
    keep_full(producer, ring_of(team), params.spare_slots);
  } else {
    // A page lasts a team microseconds: looking every 200 ns is enough, and takes few issue slots
    // from the consumers.
    while (producer.active()) {
      while (producer.active() && producer.slot_is_empty()) producer.issue();
      __nanosleep(200);
    }
  }
}

// Where registers do not move, a single warp of producers is started; they are given and taken by
// warpgroups. The host reads from the compiled kernel what it was made for.
template <typename Shape>
inline constexpr int kLaunchThreads = KVANT_MOVES_REGISTERS ? Shape::kThreads
                                                            : (Shape::kConsumerWarps + 1) * 32;

template <typename Shape>
__global__ void __launch_bounds__(kLaunchThreads<Shape>, Shape::kBlocks)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(128) std::byte memory[];
  __shared__ RingState rings[Shape::kTeams];
  __shared__ BlockResult<Shape> results[Shape::kTeams][2];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  ptx::launch_dependents();
  if (threadIdx.x < Shape::kTeams) {
    results[threadIdx.x][0].unit = results[threadIdx.x][1].unit = -1;
    for (int slot = 0; slot < params.num_slots; ++slot) {
      ptx::mbarrier_init(ptx::shared_address(&rings[threadIdx.x].full[slot]), ptx::kCopyArrivals);
      ptx::mbarrier_init(ptx::shared_address(&rings[threadIdx.x].empty[slot]), Shape::kTeam);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  const int ring_bytes = params.num_slots * params.slot_bytes;
  const auto ring_of = [&](int team) {
    return Ring<Shape::kSlotsTakeSteps>{memory + team * ring_bytes, &rings[team], params.num_slots,
                                        params.slot_bytes};
  };
  if (warp >= Shape::kConsumerWarps) {
    ptx::decrease_registers<Shape::kProducerRegisters>();
    run_producers<Shape>(params, ring_of, warp - Shape::kConsumerWarps, lane);
  } else {
    ptx::increase_registers<Shape::kConsumerRegisters>();
    const int team = warp / Shape::kTeam;
    if (team < params.teams) {
      std::byte* const own = memory + params.teams * ring_bytes + team * Shape::kTeamBytes;
      run_segments<Shape>(params, ring_of(team), own, results[team], team, warp, lane);
    } else if (!params.beside_shared) {
      ptx::wait_prerequisites();
    }
    __threadfence_block();
    ptx::named_barrier(kBlockBarrier, Shape::kConsumerWarps * 32);
    const LeftParts<Shape> left = {&results[0][0],
                                   memory,
                                   ring_bytes,
                                   memory + params.teams * ring_bytes,
                                   params.worker_sums + static_cast<int64_t>(blockIdx.x) *
                                                            params.teams * params.max_rows *
                                                            Shape::kHeadDim,
                                   params.max_rows};
    merge_block<Shape>(params, left, warp, lane);
    if (params.beside_shared) ptx::wait_prerequisites();  // the merge that follows waits for both
  }
}

}  // namespace kvant::backend::cuda
