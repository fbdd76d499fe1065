// Decode attention on stored pages: the kernel (docs/kernels/cuda-decode.md).
//
// A block is a number of teams of warps and a warpgroup of producers. Each team is a worker of the
// plan (plan.h): it walks its segments page by page; the warps of a team share a page, tile by
// tile, and keep maximum, sum of weights and output of their own tokens in registers until the
// segment ends. Tokens are rows of the tensor-core products, query rows their columns: up to 8
// kNTiles of them.
#pragma once

#include "kvant/backend/cuda/decode/consumer.cuh"
#include "kvant/backend/cuda/decode/producer.cuh"

namespace kvant::backend::cuda {

// Merges the results of the block's teams, unit by unit, a warp per query row.
template <typename Shape>
__device__ __forceinline__ void merge_block(const DecodeParams& params,
                                            const BlockResult<Shape::kNTiles * 8>* results,
                                            int warp, int lane) {
  constexpr int kResults = 2 * Shape::kTeams;
  for (int begin = 0, end; begin < kResults; begin = end) {
    end = begin + 1;
    const auto& first = results[begin];
    if (first.unit < 0) continue;
    while (end < kResults && (results[end].unit < 0 || results[end].unit == first.unit)) ++end;
    for (int r = warp; r < first.num_rows; r += Shape::kConsumerWarps) {
      float2 state = {kNoReference, 0.0f};
      for (int i = begin; i < end; ++i)
        if (results[i].unit >= 0) state.x = fmaxf(state.x, results[i].states[r].x);
      for (int i = begin; i < end; ++i)
        if (results[i].unit >= 0)
          state.y = fmaf(results[i].states[r].y, ptx::exp2_approx(results[i].states[r].x - state.x),
                         state.y);
      float* out;
      float scale = 1.0f;
      if (first.partial >= 0) {
        const int64_t at = static_cast<int64_t>(first.partial) * params.max_rows + r;
        out = params.partial_sums + at * Shape::kHeadDim;
        if (lane == 0) params.partial_states[at] = state;
      } else {
        const QueryRow at = query_row(params, first.first_row, first.kv_head, r);
        out = params.out + (at.row * params.num_query_heads + at.head) * Shape::kHeadDim;
        scale = finish_row(params, at, state, lane == 0);
      }
      for (int channel = lane * 4; channel < Shape::kHeadDim; channel += 128) {
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int i = begin; i < end; ++i) {
          if (results[i].unit < 0) continue;
          const float factor = ptx::exp2_approx(results[i].states[r].x - state.x) * scale;
          const float4 x = *reinterpret_cast<const float4*>(results[i].sums +
                                                            r * results[i].row_stride + channel);
          sum.x = fmaf(x.x, factor, sum.x), sum.y = fmaf(x.y, factor, sum.y);
          sum.z = fmaf(x.z, factor, sum.z), sum.w = fmaf(x.w, factor, sum.w);
        }
        *reinterpret_cast<float4*>(out + channel) = sum;
      }
    }
  }
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(128) std::byte memory[];
  __shared__ RingState rings[Shape::kTeams];
  __shared__ BlockResult<Shape::kNTiles * 8> results[Shape::kTeams][2];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  ptx::launch_dependents();
  if (threadIdx.x < Shape::kTeams) {
    for (int slot = 0; slot < params.num_slots; ++slot) {
      ptx::mbarrier_init(ptx::shared_address(&rings[threadIdx.x].full[slot]), 1);
      ptx::mbarrier_init(ptx::shared_address(&rings[threadIdx.x].empty[slot]), Shape::kTeam);
    }
    results[threadIdx.x][0].unit = results[threadIdx.x][1].unit = -1;
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  const int ring_bytes = params.num_slots * params.slot_bytes;
  const auto ring_of = [&](int team) {
    return Ring{memory + team * ring_bytes, &rings[team], params.num_slots, params.slot_bytes};
  };
  if (warp >= Shape::kConsumerWarps) {
    ptx::decrease_registers<Shape::kProducerRegisters>();
    // One lane per team. A page lasts a team microseconds: looking every 200 ns is enough, and
    // takes few issue slots from the consumers.
    if (warp == Shape::kConsumerWarps && lane < Shape::kTeams) {
      Producer producer(params, ring_of(lane), static_cast<int>(blockIdx.x) * Shape::kTeams + lane,
                        Shape::kHeadDim);
      while (producer.active()) {
        while (producer.active() && producer.slot_is_empty()) producer.issue();
        __nanosleep(200);
      }
    }
  } else {
    ptx::increase_registers<Shape::kConsumerRegisters>();
    const int team = warp / Shape::kTeam;
    const int worker = static_cast<int>(blockIdx.x) * Shape::kTeams + team;
    Consumer<Shape> consumer(params, ring_of(team),
                             memory + Shape::kTeams * ring_bytes + team * Shape::kTeamBytes,
                             results[team], team, warp % Shape::kTeam, lane);
    const WorkerStart& start = params.workers[worker];
    const int num_segments = start.num_segments;
    uint32_t word = reinterpret_cast<const uint32_t*>(&start.segment)[lane % 16];
    ptx::wait_prerequisites();  // queries, and buffers that the kernels before still read
    for (int i = 0; i < num_segments; ++i) {
      if (i > 0) {
        const Segment* next = params.segments + start.first_segment + i;
        word = reinterpret_cast<const uint32_t*>(next)[lane % 16];
      }
      consumer.run_segment(word, worker, i + 1 == num_segments);
    }
    __threadfence_block();
    ptx::named_barrier(kBlockBarrier, Shape::kConsumerWarps * 32);
    merge_block<Shape>(params, &results[0][0], warp, lane);
  }
}

}  // namespace kvant::backend::cuda
