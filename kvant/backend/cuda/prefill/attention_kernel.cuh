// Prefill attention on Hopper: persistent blocks of one producer warp and two consumer warpgroups.
//
// The producer copies key and value images of a key tile to shared memory, two stages ahead. Each
// consumer warpgroup owns 64 rows of the query tile: scores S = Q K^T from shared memory, softmax
// in registers, O += P V with P in registers. Scores of tile i and the product of tile i - 1 are
// issued together, and the two warpgroups take turns (ping-pong), so that one's softmax runs while
// the other keeps the tensor cores busy (FlashAttention-3, arXiv 2407.08608, section 3). Between
// two items the tensor cores would idle: what the next one needs is there before, and what the last
// one leaves is stored later.
//
// Keys are stored less a reference key b (dequantise.h): softmax does not see a term that all
// scores of a row share. Where the score itself matters (softcap, sink logits, LSE) q . b is added
// back. Scores are in log2 units throughout.
#pragma once

#include <string>
#include <type_traits>

#include "kvant/backend/cuda/hopper.cuh"
#include "kvant/backend/cuda/prefill/attention_producer.cuh"
#include "kvant/backend/cuda/prefill/attention_rows.cuh"
#include "kvant/backend/cuda/status.h"

namespace kvant::backend::cuda {

template <int kHeadDim>
__device__ __forceinline__ void issue_scores(float (&s)[PrefillShape<kHeadDim>::kKeys / 2],
                                             uint64_t queries, uint64_t keys) {
  using Shape = PrefillShape<kHeadDim>;
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    WgmmaShared<Shape::kKeys>::run(
        s, queries + (step / 4) * (Shape::kQueryPart >> 4) + (step % 4) * 2,
        keys + (step / 4) * (Shape::kKeyPart >> 4) + (step % 4) * 2, step > 0);
  }
  wgmma_commit();
}

template <int kHeadDim>
__device__ __forceinline__ void issue_outputs(
    float (&out)[kHeadDim / 2], const uint32_t (&p)[PrefillShape<kHeadDim>::kKeys / 4],
    uint64_t values) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < PrefillShape<kHeadDim>::kKeys / 16; ++step) {
    WgmmaRegisters<kHeadDim>::run(out, p + 4 * step, values + step * (16 * 128 >> 4));
  }
  wgmma_commit();
}

template <int kHeadDim, bool kSoftcap>
__device__ __forceinline__ void consume(const PrefillKernelArgs& args, uint32_t base,
                                        int warpgroup) {
  using Shape = PrefillShape<kHeadDim>;
  constexpr int kKeys = Shape::kKeys;
  const uint32_t bars = base + Shape::kBarriers;
  const int lane = threadIdx.x % 32;
  const int slices = kKeys >> args.slice_shift;
  const uint64_t queries =
      matrix_descriptor(base + Shape::kQueries + warpgroup * 64 * 128, 16, 1024);
  const uint64_t keys = matrix_descriptor(base + Shape::kKeyTiles, 16, 1024);
  const uint64_t values = matrix_descriptor(base + Shape::kValueTiles, Shape::kKeyPart, 1024);
  const bool shifted = kSoftcap || args.sink_logits != nullptr || args.lse != nullptr;
  // If there are registers, items overlap: the next one's queries are on their way during the last
  // product, and outputs are stored during the next one's first scores.
  constexpr bool kOverlaps = kHeadDim <= 128;
  float4 ahead[kOverlaps ? QueryChunks<kHeadDim>::kPerThread : 1];
  uint32_t phases = 0;  // bit s: how often stage s was used before this item, modulo 2
  uint32_t items = base + Shape::kItems;
  asm volatile("" : "+r"(items));  // not in uniform registers: descriptors of products need them
  if (warpgroup == 1) ptx::named_arrive(kTurn, 256);
  RowState<kHeadDim> state;
  RowPlace place;
  place.activation[0] = place.activation[1] = -1;  // nothing to store yet
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) state.out[i] = 0.0f;
  for (int n = 0;; ++n) {
    const TakenItem& item = wait_for_item(bars, items, n);
    if (item.kv_head < 0) {
      if constexpr (kOverlaps) write_rows<kHeadDim>(args, place, state);
      break;
    }
    const QueryTile& tile = item.tile;
    if constexpr (kOverlaps) {
      if (n == 0) request_queries<kHeadDim>(args, tile, item.kv_head, warpgroup, 0, ahead);
      put_queries<kHeadDim>(args.q_scale, warpgroup, base + Shape::kQueries, 0, ahead);
    } else {
      load_queries<kHeadDim>(args, tile, item.kv_head, warpgroup, base + Shape::kQueries);
    }
    if (shifted) load_shifts<kHeadDim>(args, tile, item.kv_head, warpgroup, base + Shape::kShifts);
    fence_async_shared();
    ptx::named_barrier(kOwn + warpgroup, 128);

    float s[kKeys / 2];
    uint32_t p[kKeys / 4];
    float factor[2];
    float shift[2] = {0.0f, 0.0f};
    const int key_tiles = tile.num_key_tiles;
    const auto weigh = [&](int i, auto masked) {
      if constexpr (kSoftcap) {
#pragma unroll
        for (int j = 0; j < kKeys / 2; ++j) s[j] = capped(s[j], shift[(j / 2) % 2], args.cap);
      }
      if constexpr (decltype(masked)::value) {
        mask_scores<kKeys>(s, args, tile, tile.num_slices - (i + 1) * slices, 0, place.position);
      }
      softmax_tile<kKeys, decltype(masked)::value>(s, state.max, state.sum, factor);
    };
    const auto pack = [&] {
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) p[i] = ptx::f16x2_of_f32(s[2 * i], s[2 * i + 1]);
    };
    const auto rescale = [&] {
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        state.out[4 * j] *= factor[0];
        state.out[4 * j + 1] *= factor[0];
        state.out[4 * j + 2] *= factor[1];
        state.out[4 * j + 3] *= factor[1];
      }
    };
    using Masked = std::true_type;
    using Whole = std::false_type;

    const auto start = [&] {
      place = place_rows(args, tile, item.kv_head, warpgroup);
      state.max[0] = state.max[1] = -INFINITY;
      state.sum[0] = state.sum[1] = 0.0f;
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) state.out[i] = 0.0f;
      if (kSoftcap) {
        shift[0] = shift_of(base + Shape::kShifts, place.row[0]);
        shift[1] = shift_of(base + Shape::kShifts, place.row[1]);
      }
    };

    // The first tile has no product to go with. The item before is stored meanwhile.
    if constexpr (!kOverlaps) start();
    ptx::mbarrier_wait(bars + 8 * kKeysFull, phases & 1);
    issue_scores<kHeadDim>(s, queries, keys);
    if constexpr (kOverlaps) {
      write_rows<kHeadDim>(args, place, state);
      start();
    }
    wgmma_wait<0>();
    hold(s);
    if (tile.resumes != 0) resume_rows<kHeadDim>(args, place, item.value_scale[0], 0.0f, state);
    if (lane == 0) ptx::mbarrier_arrive(bars + 8 * kKeysEmpty);
    weigh(0, Masked{});
    pack();
    if (tile.resumes != 0) rescale();
    // Tile i uses stage i % 2 for the (i / 2)-th time in this item.
    const auto step = [&](int i, int stage, auto masked) {
      const int before = stage ^ 1;
      ptx::mbarrier_wait(bars + 8 * (kKeysFull + stage), ((i >> 1) ^ (phases >> stage)) & 1);
      ptx::named_barrier(kTurn + warpgroup, 256);
      issue_scores<kHeadDim>(s, queries, keys + stage * (Shape::kTileBytes >> 4));
      ptx::mbarrier_wait(bars + 8 * (kValuesFull + before),
                         (((i - 1) >> 1) ^ (phases >> before)) & 1);
      issue_outputs<kHeadDim>(state.out, p, values + before * (Shape::kTileBytes >> 4));
      ptx::named_arrive(kTurn + (warpgroup ^ 1), 256);
      wgmma_wait<1>();
      hold(s);
      if (lane == 0) ptx::mbarrier_arrive(bars + 8 * (kKeysEmpty + stage));
      weigh(i, masked);
      wgmma_wait<0>();
      hold(state.out);
      if (lane == 0) ptx::mbarrier_arrive(bars + 8 * (kValuesEmpty + before));
      pack();
      rescale();
    };
    // Masked tiles, whole tiles, masked tiles. The main loop goes by two, from an odd tile on: its
    // stages are constants.
    int i = 1;
    int masked_end = min(max(1, tile.whole_begin) | 1, key_tiles);
    const int whole_end = tile.whole_end;
#pragma unroll 1
    while (true) {
#pragma unroll 1
      for (; i < masked_end; ++i) step(i, i & 1, Masked{});
      if (i == key_tiles) break;
#pragma unroll 1
      while (i < whole_end) {
        step(i++, 1, Whole{});
        if (i >= whole_end) break;  // also keeps ptxas from mixing the two steps
        step(i++, 0, Whole{});
      }
      masked_end = key_tiles;
    }
    {
      const int stage = (key_tiles - 1) & 1;
      ptx::mbarrier_wait(bars + 8 * (kValuesFull + stage),
                         (((key_tiles - 1) >> 1) ^ (phases >> stage)) & 1);
      issue_outputs<kHeadDim>(state.out, p, values + stage * (Shape::kTileBytes >> 4));
      if constexpr (kOverlaps) {
        const TakenItem& next = wait_for_item(bars, items, n + 1);
        request_queries<kHeadDim>(args, next.tile, next.kv_head, warpgroup, 0, ahead);
      }
      if (!kSoftcap && shifted) {
        shift[0] = shift_of(base + Shape::kShifts, place.row[0]);
        shift[1] = shift_of(base + Shape::kShifts, place.row[1]);
      }
      if constexpr (kSoftcap) shift[0] = shift[1] = 0.0f;  // already in the scores
      place = place_rows(args, tile, item.kv_head, warpgroup);
      float scale[2];
      finish_rows<kHeadDim>(args, tile, place, shift, item.value_scale[1], state, scale);
      wgmma_wait<0>();
      hold(state.out);
      if (lane == 0) ptx::mbarrier_arrive(bars + 8 * (kValuesEmpty + stage));
      scale_rows<kHeadDim>(scale, state);
      if constexpr (!kOverlaps) write_rows<kHeadDim>(args, place, state);
      release_item(bars, n);
    }
    phases ^= (((key_tiles + 1) >> 1) & 1) | (key_tiles & 2);
    // Queries and shifts are read before the next item's are written.
    ptx::named_barrier(kOwn + warpgroup, 128);
  }
}

template <int kHeadDim, bool kSoftcap, typename Images>
__global__ __launch_bounds__(kPrefillThreads, 1) void prefill_attention(
    const __grid_constant__ PrefillKernelArgs args,
    const __grid_constant__ typename Images::Args images) {
  using Shape = PrefillShape<kHeadDim>;
  extern __shared__ uint8_t shared[];
  const uint32_t base = (ptx::shared_address(shared) + 1023u) & ~1023u;
  if (threadIdx.x == 0) init_barriers(base + Shape::kBarriers);
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128), 0);
  if (warpgroup == 0) {
    ptx::decrease_registers<Images::producer_registers(kHeadDim)>();
    const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
    if (warp == 0) {
      produce<Shape, Images>(args, images, base);
      finish<Images>(args.counters);
    }
    if constexpr (Images::kWrites) {
      if (warp > 0) {
        write_images<Images>(images, args.counters,
                             shared + (base - ptx::shared_address(shared)) + Shape::kImages +
                                 (warp - 1) * fast_shared_bytes(kHeadDim));
        finish<Images>(args.counters);
      }
    }
  } else {
    ptx::increase_registers<Images::consumer_registers(kHeadDim)>();
    consume<kHeadDim, kSoftcap>(args, base, warpgroup - 1);
  }
}

template <int kHeadDim, bool kSoftcap, typename Images>
Status launch_prefill_kernel(const PrefillKernelArgs& args, const typename Images::Args& images,
                             int num_processors, cudaStream_t stream) {
  constexpr int kBytes = PrefillShape<kHeadDim>::kBytes +
                         (Images::kWrites ? kImageWarps * fast_shared_bytes(kHeadDim) : 0);
  static_assert(kBytes <= 227 * 1024, "a block has 227 KiB of shared memory");
  static_assert(2 * Images::consumer_registers(kHeadDim) + Images::producer_registers(kHeadDim) <=
                    3 * kStartRegisters,
                "with more, setmaxnreg waits forever");
  const auto kernel = prefill_attention<kHeadDim, kSoftcap, Images>;
  KVANT_TRY(
      cuda_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
                  "asking for shared memory of prefill attention"));
  // With images every block helps to write them, also one without work of its own.
  const int blocks =
      Images::kWrites || args.num_items > num_processors ? num_processors : args.num_items;
  kernel<<<blocks, kPrefillThreads, kBytes, stream>>>(args, images);
  return launch_status("prefill attention, head_dim " + std::to_string(kHeadDim));
}

template <int kHeadDim>
Status launch_prefill_attention_of(const PrefillKernelArgs& args, int num_processors,
                                   cudaStream_t stream) {
  return args.cap > 0.0f
             ? launch_prefill_kernel<kHeadDim, true, NoImages>(args, {}, num_processors, stream)
             : launch_prefill_kernel<kHeadDim, false, NoImages>(args, {}, num_processors, stream);
}

}  // namespace kvant::backend::cuda
