// The producer's warpgroup of prefill attention: one warp copies key tiles to shared memory, the
// others write images where that is done beside attention.
#pragma once

#include <cstddef>

#include "kvant/backend/cuda/hopper.cuh"
#include "kvant/backend/cuda/prefill/attention_shape.cuh"
#include "kvant/backend/cuda/prefill/write_image.cuh"

namespace kvant::backend::cuda {

// Waits for the images of slices from `first` on, of which those from `known` on have been seen,
// and returns the new `known`. Looks at 32 slices at a time: a look costs a trip to L2.
__device__ __forceinline__ int wait_for_images(const PrefillKernelArgs& args,
                                               const BackgroundImages& images,
                                               const QueryTile& tile, int head, int first,
                                               int known) {
  const int lane = threadIdx.x % 32;
  const int slices_shift = args.page_shift - args.slice_shift;
  const int32_t* ready = images.ready + 2 * head * images.images_per_head;
  const uint64_t written = static_cast<uint32_t>(images.epoch) * 0x100000001ull;
  while (first < known) {
    const int slice = known - 1 - lane;
    uint64_t flags = written;
    if (slice >= 0) {
      asm volatile("ld.relaxed.gpu.global.b64 %0,[%1];"
                   : "=l"(flags)
                   : "l"(ready + 2 * (slice_place(tile, slice) >> slices_shift))
                   : "memory");
    }
    const uint32_t missing = __ballot_sync(~0u, flags != written);
    const int seen = missing == 0 ? 32 : __ffs(static_cast<int>(missing)) - 1;
    known -= seen;
    if (seen == 0) __nanosleep(100);
    if (first >= known) {
      __threadfence();
      asm volatile("fence.proxy.async;" ::: "memory");
    }
  }
  return known;
}

// A lane's part of a key tile: 64 channels of one slice.
struct LaneCopy {
  const std::byte* source;  // of keys
  int offset;               // in the stage
  int image;
};

template <typename Shape>
__device__ __forceinline__ LaneCopy lane_copy(const PrefillKernelArgs& args, const std::byte* head,
                                              const QueryTile& tile, int first_slice) {
  const int lane = threadIdx.x % 32;
  const int slice = lane / Shape::kParts;
  const int part = lane % Shape::kParts;
  // Slices before the list's begin are masked: any image will do.
  const int place = slice_place(tile, max(first_slice + slice, 0));
  const int slices_shift = args.page_shift - args.slice_shift;
  const int slice_bytes = Shape::kRowBytes << args.slice_shift;
  const int part_bytes = args.page_tokens * Shape::kRowBytes;
  LaneCopy copy;
  copy.image = place >> slices_shift;
  copy.source = head + copy.image * (2 * int64_t{Shape::kParts} * part_bytes) + part * part_bytes +
                (place & ((1 << slices_shift) - 1)) * slice_bytes;
  copy.offset = part * Shape::kKeyPart + slice * slice_bytes;
  return copy;
}

template <typename Shape>
__device__ __forceinline__ void copy_side(const LaneCopy& copy, const std::byte* source, int bytes,
                                          bool active, uint32_t stage, uint32_t full) {
  if (threadIdx.x % 32 == 0) ptx::begin_copies(full, Shape::kTileBytes);
  __syncwarp();
  if (active) bulk_copy(stage + copy.offset, source, bytes, full);
}

// The next item of a block, fetched in steps: each asks for something and a later one uses it, so
// that copies of key tiles do not wait for it.
template <typename Shape>
struct NextItem {
  static constexpr int kSteps = 5;
  const PrefillKernelArgs& args;
  const uint32_t base;
  int taken = 0;  // by lane 0
  int index = 0;
  WorkItem item = {};
  int32_t word = 0;  // of the lane, of TakenItem

  // Step `step` of fetching the block's item n.
  __device__ __forceinline__ void advance(int step, int n) {
    const int lane = threadIdx.x % 32;
    const bool more = index < args.num_items;
    if (step == 0) {
      if (lane == 0) taken = static_cast<int>(gridDim.x) + atomicAdd(args.counters + kNextItem, 1);
    } else if (step == 1) {
      index = __shfl_sync(~0u, taken, 0);
      if (index < args.num_items) item = args.items[index];
    } else if (step == 2) {
      word = 0;
      if (more && lane < kTileWords) {
        word = __ldg(reinterpret_cast<const int32_t*>(args.tiles + item.tile) + lane);
      }
    } else if (step == 3) {
      request_queries();
      const int kv_head = args.first_head + item.head;
      const int64_t head =
          static_cast<int64_t>(field(offsetof(QueryTile, sequence))) * args.num_kv_heads + kv_head;
      if (lane == kTileWords) word = more ? kv_head : -1;
      if (more && lane > kTileWords && lane < kItemWords) {
        word = __float_as_int(args.references[head * reference_floats(Shape::kHeadDim) +
                                              Shape::kHeadDim + lane - kTileWords - 1]);
      }
    } else {
      leave(n);
    }
  }

 private:
  static constexpr int kItemWords = kTileWords + 3;

  __device__ __forceinline__ int field(size_t offset) const {
    return __shfl_sync(~0u, word, static_cast<int>(offset / 4));
  }

  // To L2: they come from DRAM, and consumers are still busy with the item before.
  __device__ __forceinline__ void request_queries() const {
    const int64_t row = field(offsetof(QueryTile, row));
    const int head = (args.first_head + item.head) * args.group;
    const int num_tokens = field(offsetof(QueryTile, num_tokens));
    for (int token = threadIdx.x % 32; token < num_tokens; token += 32) {
      prefetch_l2(args.q + ((row + token) * args.num_query_heads + head) * Shape::kHeadDim,
                  args.group * Shape::kHeadDim * 4);
    }
  }

  // To consumers. Every lane arrives for its own word: that one does for all, after the others have
  // met it, is as good, but racecheck takes it for a race.
  __device__ __forceinline__ void leave(int n) const {
    const uint32_t bars = base + Shape::kBarriers;
    const int lane = threadIdx.x % 32;
    const int slot = n % kItemSlots;
    ptx::mbarrier_wait(bars + 8 * (kItemEmpty + slot), (n / kItemSlots & 1) ^ 1);
    if (lane < kItemWords) {
      asm volatile("st.shared.s32 [%0],%1;" ::"r"(item_address(base + Shape::kItems, n) + 4 * lane),
                   "r"(word)
                   : "memory");
    }
    __syncwarp();  // this warp reads it, too
    ptx::mbarrier_arrive(bars + 8 * (kItemFull + slot));
  }
};

template <typename Shape, typename Images>
__device__ __forceinline__ void produce(const PrefillKernelArgs& args,
                                        const typename Images::Args& images, uint32_t base) {
  using Next = NextItem<Shape>;
  // So many key tiles before the end of an item the next one is taken.
  constexpr int kTakeBefore = 6;
  const uint32_t bars = base + Shape::kBarriers;
  const int lane = threadIdx.x % 32;
  const int slices = Shape::kKeys >> args.slice_shift;
  const int slice_bytes = Shape::kRowBytes << args.slice_shift;
  const bool active = lane < slices * Shape::kParts;
  uint32_t empty = 3;  // bit s: the phase that stage s waits for; stages start empty
  Next next{args, base};
  next.taken = static_cast<int>(blockIdx.x);
  // Item n is fetched while key tiles of the one before are copied; the first one has none before.
  for (int n = 0;; ++n) {
    QueryTile tile;
    int head_of_pass = 0;
    int first_step = -1;  // so many tiles before it; step 0 of the first item is done
    if (n > 0) {
      if (next.index >= args.num_items) return;
      const TakenItem& item = item_at(base + Shape::kItems, n - 1);
      tile = item.tile;
      head_of_pass = item.kv_head - args.first_head;
      first_step = max(tile.num_key_tiles - kTakeBefore, 0);
    }
    const std::byte* head = args.images + head_of_pass * args.head_stride;
    int known = tile.num_slices;
    for (int i = 0; i < max(tile.num_key_tiles, first_step + Next::kSteps); ++i) {
      if (i < tile.num_key_tiles) {
        const int stage = i & 1;
        const LaneCopy copy =
            lane_copy<Shape>(args, head, tile, tile.num_slices - (i + 1) * slices);
        if constexpr (Images::kWrites) {
          known = wait_for_images(args, images, tile, head_of_pass,
                                  max(tile.num_slices - (i + 1) * slices, 0), known);
        }
        ptx::mbarrier_wait(bars + 8 * (kKeysEmpty + stage), (empty >> stage) & 1);
        copy_side<Shape>(copy, copy.source, slice_bytes, active,
                         base + Shape::kKeyTiles + stage * Shape::kTileBytes,
                         bars + 8 * (kKeysFull + stage));
        ptx::mbarrier_wait(bars + 8 * (kValuesEmpty + stage), (empty >> stage) & 1);
        copy_side<Shape>(copy,
                         copy.source + int64_t{Shape::kParts} * args.page_tokens * Shape::kRowBytes,
                         slice_bytes, active, base + Shape::kValueTiles + stage * Shape::kTileBytes,
                         bars + 8 * (kValuesFull + stage));
        empty ^= 1u << stage;
      }
      const int step = i - first_step;
      if (step >= 0 && step < Next::kSteps) next.advance(step, n);
    }
  }
}

// Images in the order in which attention will want them, a side of a page of a head at a time.
template <typename Images>
__device__ __forceinline__ void write_images(const BackgroundImages& images, int32_t* counters,
                                             uint8_t* shared) {
  constexpr int kHeadDim = Images::kHeadDim;
  const int lane = threadIdx.x % 32;
  const int tiles = images.dequantise.page_tokens / kTileTokens;
  const auto claim = [&] { return lane == 0 ? atomicAdd(counters + kNextUnit, 1) : 0; };
  int at = 0;
  int claimed = claim();
  while (true) {
    const int unit = __shfl_sync(~0u, claimed, 0);
    if (unit >= images.num_units) return;
    claimed = claim();  // is there by the time this unit is done
    while (at + 1 < images.num_chunks && unit >= images.chunks[at + 1].first_unit) ++at;
    const ImageChunk chunk = images.chunks[at];
    const int in_chunk = (unit - chunk.first_unit) / 2;
    const bool keys = unit % 2 == 0;
    const DequantiseArgs& args = images.dequantise;
    const int head = chunk.first_head + in_chunk % chunk.num_heads;  // of the pass
    const ImageJob job = args.jobs[chunk.first_job + in_chunk / chunk.num_heads];
    const Side side = side_of(args, job, args.first_head + head, keys);
    const UnitKind& kind = args.kinds[job.kind];
    if (keys) {
      if (kind.k.format == FormatId::kBf16) {
        write_image<FormatId::kBf16, true, kHeadDim>(args, side, 0, tiles, shared);
      } else {
        write_image<Images::kKeys, true, kHeadDim>(args, side, 0, tiles, shared);
      }
    } else {
      if (kind.v.format == FormatId::kBf16) {
        write_image<FormatId::kBf16, false, kHeadDim>(args, side, 0, tiles, shared);
      } else {
        write_image<Images::kValues, false, kHeadDim>(args, side, 0, tiles, shared);
      }
    }
    __syncwarp();
    if (lane == 0) {
      __threadfence();
      asm volatile(
          "st.release.gpu.global.s32 [%0],%1;" ::"l"(
              images.ready + 2 * (head * images.images_per_head + job.image) + (keys ? 0 : 1)),
          "r"(images.epoch)
          : "memory");
    }
  }
}

// The last warp that has taken all it could leaves the counters as they were.
template <typename Images>
__device__ __forceinline__ void finish(int32_t* counters) {
  constexpr int kTakers = Images::kWrites ? 1 + kImageWarps : 1;
  if (threadIdx.x % 32 != 0) return;
  if (atomicAdd(counters + kFinished, 1) + 1 < static_cast<int>(gridDim.x) * kTakers) return;
  for (int i = 0; i < kCounters; ++i) counters[i] = 0;
}

}  // namespace kvant::backend::cuda
