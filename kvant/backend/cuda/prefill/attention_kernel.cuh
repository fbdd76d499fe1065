// Prefill attention on Hopper: persistent blocks of one producer warp and two consumer warpgroups.
//
// The producer copies key and value images of a key tile to shared memory, two stages ahead. Each
// consumer warpgroup owns 64 rows of the query tile: scores S = Q K^T from shared memory, softmax
// in registers, O += P V with P in registers. Scores of tile i and the product of tile i - 1 are
// issued together, and the two warpgroups take turns (ping-pong), so that one's softmax runs while
// the other keeps the tensor cores busy (FlashAttention-3, arXiv 2407.08608, section 3).
//
// Keys are stored less a reference key b (dequantise.h): softmax does not see a term that all
// scores of a row share. Where the score itself matters (softcap, sink logits, LSE) q . b is added
// back. Scores are in log2 units throughout.
#pragma once

#include <type_traits>

#include "kvant/backend/cuda/prefill/attention_kernel.h"
#include "kvant/backend/cuda/prefill/dequantise.h"
#include "kvant/backend/cuda/prefill/hopper.cuh"
#include "kvant/backend/cuda/prefill/write_image.cuh"
#include "kvant/backend/cuda/status.h"

namespace kvant::backend::cuda {

constexpr int kPrefillThreads = 384;

// What the producer's warpgroup does besides copying. Registers of the two roles: 512 = 2 consumers
// + 1 producer.
struct NoImages {
  static constexpr bool kWrites = false;
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kProducerRegisters = 40;
  struct Args {};
};
template <FormatId kK, FormatId kV>
struct WrittenImages {
  static constexpr bool kWrites = true;
  static constexpr int kConsumerRegisters = 208;
  static constexpr int kProducerRegisters = 88;
  static constexpr FormatId kKeys = kK;
  static constexpr FormatId kValues = kV;
  using Args = BackgroundImages;
};
constexpr int kStartRegisters = 168;  // 65536 / 384, rounded down to a multiple of 8
constexpr int kImageWarps = 3;

template <int kHeadDim>
struct PrefillShape {
  static constexpr int kKeys = key_tile_tokens(kHeadDim);
  static constexpr int kParts = (kHeadDim + kImageChannels - 1) / kImageChannels;
  static constexpr int kQueryPart = kTileRows * 128;  // bytes of 64 channels of the query tile
  static constexpr int kKeyPart = kKeys * 128;
  static constexpr int kTileBytes = kParts * kKeyPart;
  static constexpr int kStages = 2;
  // Shared memory from a 1024-byte boundary on.
  static constexpr int kQueries = 0;
  static constexpr int kKeyTiles = kParts * kQueryPart;
  static constexpr int kValueTiles = kKeyTiles + kStages * kTileBytes;
  static constexpr int kShifts = kValueTiles + kStages * kTileBytes;  // [2][128] floats
  static constexpr int kBarriers = kShifts + 2 * kTileRows * 4;
  static constexpr int kItems = kBarriers + 16 * 8;
  static constexpr int kImages = kItems + 16;
  static constexpr int kBytes = kImages + 1024;  // images: kImageWarps * fast_shared_bytes more
};

// mbarriers, in units of 8 bytes from kBarriers; two of each.
enum PrefillBarrier {
  kKeysFull = 0,
  kKeysEmpty = 2,
  kValuesFull = 4,
  kValuesEmpty = 6,
  kItemFull = 8,
  kItemEmpty = 10
};
// Named barriers: 1 and 2 give a warpgroup its turn, 3 and 4 are a warpgroup's own.
constexpr int kTurn = 1;
constexpr int kOwn = 3;

__device__ __forceinline__ int slice_place(const QueryTile& tile, int slice) {
  if (slice < tile.num_sink) return tile.sink_place + slice;
  const int stored = slice - tile.num_sink;
  return stored < tile.num_stored ? tile.stored_place + stored
                                  : tile.bf16_place + stored - tile.num_stored;
}

// ---- producer ----

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
  const int slice_bytes = 128 << args.slice_shift;
  LaneCopy copy;
  copy.image = place >> slices_shift;
  copy.source = head + copy.image * (2 * int64_t{Shape::kParts} * args.page_tokens * 128) +
                part * args.page_tokens * 128 + (place & ((1 << slices_shift) - 1)) * slice_bytes;
  copy.offset = part * Shape::kKeyPart + slice * slice_bytes;
  return copy;
}

template <typename Shape>
__device__ __forceinline__ void copy_side(const LaneCopy& copy, const std::byte* source, int bytes,
                                          bool active, uint32_t stage, uint32_t full) {
  if (threadIdx.x % 32 == 0) barrier_expect(full, Shape::kTileBytes);
  __syncwarp();
  if (active) bulk_copy(stage + copy.offset, source, bytes, full);
}

template <typename Shape, typename Images>
__device__ __forceinline__ void produce(const PrefillKernelArgs& args,
                                        const typename Images::Args& images, uint32_t base) {
  const uint32_t bars = base + Shape::kBarriers;
  const int lane = threadIdx.x % 32;
  const int slices = Shape::kKeys >> args.slice_shift;
  const int slice_bytes = 128 << args.slice_shift;
  const bool active = lane < slices * Shape::kParts;
  uint32_t empty = 3;  // bit s: the phase that stage s waits for; stages start empty
  for (int n = 0;; ++n) {
    int index = 0;
    if (lane == 0) index = atomicAdd(args.counters + kNextItem, 1);
    index = __shfl_sync(~0u, index, 0);
    const bool more = index < args.num_items;
    const int slot = n & 1;
    barrier_wait(bars + 8 * (kItemEmpty + slot), ((n >> 1) & 1) ^ 1);
    if (lane == 0) {
      asm volatile("st.shared.s32 [%0],%1;" ::"r"(base + Shape::kItems + 4 * slot),
                   "r"(more ? index : -1)
                   : "memory");
      barrier_arrive(bars + 8 * (kItemFull + slot));
    }
    if (!more) return;
    const WorkItem item = args.items[index];
    const QueryTile tile = args.tiles[item.tile];
    const std::byte* head = args.images + item.head * args.head_stride;
    int known = tile.num_slices;
    for (int i = 0; i < tile.num_key_tiles; ++i) {
      const int stage = i & 1;
      const LaneCopy copy = lane_copy<Shape>(args, head, tile, tile.num_slices - (i + 1) * slices);
      if constexpr (Images::kWrites) {
        known = wait_for_images(args, images, tile, item.head,
                                max(tile.num_slices - (i + 1) * slices, 0), known);
      }
      barrier_wait(bars + 8 * (kKeysEmpty + stage), (empty >> stage) & 1);
      copy_side<Shape>(copy, copy.source, slice_bytes, active,
                       base + Shape::kKeyTiles + stage * Shape::kTileBytes,
                       bars + 8 * (kKeysFull + stage));
      barrier_wait(bars + 8 * (kValuesEmpty + stage), (empty >> stage) & 1);
      copy_side<Shape>(copy, copy.source + int64_t{Shape::kParts} * args.page_tokens * 128,
                       slice_bytes, active, base + Shape::kValueTiles + stage * Shape::kTileBytes,
                       bars + 8 * (kValuesFull + stage));
      empty ^= 1u << stage;
    }
  }
}

// Images in the order in which attention will want them, a side of a page of a head at a time.
template <typename Images>
__device__ __forceinline__ void write_images(const BackgroundImages& images, int32_t* counters,
                                             uint8_t* shared) {
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
        write_image<FormatId::kBf16, true>(args, side, 0, tiles, shared);
      } else {
        write_image<Images::kKeys, true>(args, side, 0, tiles, shared);
      }
    } else {
      if (kind.v.format == FormatId::kBf16) {
        write_image<FormatId::kBf16, false>(args, side, 0, tiles, shared);
      } else {
        write_image<Images::kValues, false>(args, side, 0, tiles, shared);
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

// ---- consumers ----

// 64 rows of queries, scaled, as FP16 in shared memory. Rows without a token are zero. Loads go out
// several at a time: nothing else of the warpgroup runs meanwhile.
template <int kHeadDim>
__device__ __forceinline__ void load_queries(const PrefillKernelArgs& args, const QueryTile& tile,
                                             int kv_head, int warpgroup, uint32_t queries) {
  constexpr int kChunks = kHeadDim / 8;
  constexpr int kPerThread = 64 * kChunks / 128;
  constexpr int kAtOnce = kPerThread % 4 == 0 ? 4 : kPerThread % 5 == 0 ? 5 : 3;
  static_assert(kPerThread % kAtOnce == 0, "every thread loads equally much");
  const int thread = threadIdx.x % 128;
  const int num_tokens = tile.num_tokens;
  const float* first =
      args.q +
      (static_cast<int64_t>(tile.row) * args.num_query_heads + kv_head * args.group) * kHeadDim;
#pragma unroll 1
  for (int batch = 0; batch < kPerThread; batch += kAtOnce) {
    float4 x[kAtOnce], y[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int index = (batch + i) * 128 + thread;
      const int row = warpgroup * 64 + index / kChunks;
      const int token = row / args.group;
      x[i] = y[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (token < num_tokens) {
        const float4* q = reinterpret_cast<const float4*>(
            first +
            (static_cast<int64_t>(token) * args.num_query_heads + row - token * args.group) *
                kHeadDim +
            index % kChunks * 8);
        x[i] = __ldg(q);
        y[i] = __ldg(q + 1);
      }
    }
    const float c = args.q_scale;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int index = (batch + i) * 128 + thread;
      const int row = warpgroup * 64 + index / kChunks;
      const int chunk = index % kChunks;
      store_shared(
          queries + (chunk / 8) * (kTileRows * 128) + row * 128 + (((chunk % 8) ^ (row % 8)) << 4),
          make_uint4(pack_half2(x[i].x * c, x[i].y * c), pack_half2(x[i].z * c, x[i].w * c),
                     pack_half2(y[i].x * c, y[i].y * c), pack_half2(y[i].z * c, y[i].w * c)));
    }
  }
}

// q . b of 64 rows, in the scores' units: two threads a row, who leave half a sum each.
template <int kHeadDim>
__device__ __forceinline__ void load_shifts(const PrefillKernelArgs& args, const QueryTile& tile,
                                            int kv_head, int warpgroup, uint32_t shifts) {
  const int thread = threadIdx.x % 128;
  const int row = warpgroup * 64 + thread % 64;
  const int token = row / args.group;
  float sum = 0.0f;
  if (token < tile.num_tokens) {
    const int head = kv_head * args.group + row - token * args.group;
    const int begin = (thread / 64) * (kHeadDim / 2);
    const float* q =
        args.q + (static_cast<int64_t>(tile.row + token) * args.num_query_heads + head) * kHeadDim +
        begin;
    const float* b = args.references +
                     (static_cast<int64_t>(tile.sequence) * args.num_kv_heads + kv_head) *
                         reference_floats(kHeadDim) +
                     begin;
    for (int c = 0; c < kHeadDim / 2; c += 4) {
      const float4 x = __ldg(reinterpret_cast<const float4*>(q + c));
      const float4 y = __ldg(reinterpret_cast<const float4*>(b + c));
      sum = fmaf(x.x, y.x, sum);
      sum = fmaf(x.y, y.y, sum);
      sum = fmaf(x.z, y.z, sum);
      sum = fmaf(x.w, y.w, sum);
    }
  }
  asm volatile("st.shared.f32 [%0],%1;" ::"r"(shifts + ((thread / 64) * kTileRows + row) * 4),
               "f"(sum * args.q_scale)
               : "memory");
}

__device__ __forceinline__ float shift_of(uint32_t shifts, int row) {
  float a, b;
  asm volatile("ld.shared.f32 %0,[%1];" : "=f"(a) : "r"(shifts + row * 4));
  asm volatile("ld.shared.f32 %0,[%1];" : "=f"(b) : "r"(shifts + (kTileRows + row) * 4));
  return a + b;
}

// Scores of keys that a row may not read become -inf. A row's own and recent pages count in the
// BF16 segment, earlier ones in the others.
template <int kKeys>
__device__ __forceinline__ void mask_scores(float (&s)[kKeys / 2], const PrefillKernelArgs& args,
                                            const QueryTile& tile, int first_slice,
                                            const int (&position)[2]) {
  const int column = 2 * (threadIdx.x % 4);
  int near[2], window[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    near[h] = ((position[h] >> args.page_shift) - tile.recent_pages) << args.page_shift;
    window[h] = args.window > 0 ? position[h] - args.window + 1 : 0;
  }
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
    const int slice = first_slice + ((8 * j) >> args.slice_shift);
    const int stored = slice - tile.num_sink;
    const bool bf16 = stored >= tile.num_stored;
    const int first = stored < 0 ? slice
                      : bf16     ? tile.bf16_first + stored - tile.num_stored
                                 : tile.stored_first + stored;
    const int key =
        (first << args.slice_shift) + ((8 * j) & ((1 << args.slice_shift) - 1)) + column;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int low = bf16 ? near[h] : 0;
      const int high = slice < 0 ? -1 : bf16 ? position[h] : near[h] - 1;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int k = key + c;
        const bool seen = k >= low && k <= high && (k >= window[h] || k < args.sink_tokens);
        if (!seen) s[4 * j + 2 * h + c] = -INFINITY;
      }
    }
  }
}

// cap * tanh(x + shift): 1 - 2 / (1 + e^2x) keeps an absolute error of 2^-22 times the cap.
__device__ __forceinline__ float capped(float x, float shift, float cap) {
  constexpr float kTwoLog2e = 2.885390081777927f;
  const float e = exp2_fast((x + shift) * kTwoLog2e);
  return fmaf(-2.0f * cap, reciprocal_fast(1.0f + e), cap);
}

// Softmax of one tile over a thread's two rows: s becomes the weights; `factor` is what earlier
// sums shrink by.
template <int kKeys, bool kGuard>
__device__ __forceinline__ void softmax_tile(float (&s)[kKeys / 2], float (&row_max)[2],
                                             float (&row_sum)[2], float (&factor)[2]) {
  float x[8];  // independent chains
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    x[u] = fmaxf(s[4 * u], s[4 * u + 1]);
    x[4 + u] = fmaxf(s[4 * u + 2], s[4 * u + 3]);
  }
#pragma unroll
  for (int j = 4; j < kKeys / 8; j += 4) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        x[u] = fmaxf(x[u], s[4 * (j + u) + h]);
        x[4 + u] = fmaxf(x[4 + u], s[4 * (j + u) + 2 + h]);
      }
    }
  }
  float base[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float m = fmaxf(fmaxf(x[4 * r], x[4 * r + 1]), fmaxf(x[4 * r + 2], x[4 * r + 3]));
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
    m = fmaxf(m, row_max[r]);
    base[r] = kGuard && m == -INFINITY ? 0.0f : m;  // a row that has seen no key yet
    factor[r] = exp2_fast(row_max[r] - base[r]);
    row_max[r] = m;
  }
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
    s[4 * j] = exp2_fast(s[4 * j] - base[0]);
    s[4 * j + 1] = exp2_fast(s[4 * j + 1] - base[0]);
    s[4 * j + 2] = exp2_fast(s[4 * j + 2] - base[1]);
    s[4 * j + 3] = exp2_fast(s[4 * j + 3] - base[1]);
  }
  float a[8] = {};
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
    a[j % 2] += s[4 * j];
    a[2 + j % 2] += s[4 * j + 1];
    a[4 + j % 2] += s[4 * j + 2];
    a[6 + j % 2] += s[4 * j + 3];
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    row_sum[r] =
        fmaf(row_sum[r], factor[r], (a[4 * r] + a[4 * r + 1]) + (a[4 * r + 2] + a[4 * r + 3]));
  }
}

// Everything of a warpgroup that outlives a key tile.
template <int kHeadDim>
struct RowState {
  float out[kHeadDim / 2];
  float max[2];
  float sum[2];  // of this thread's columns
};

// A thread's two rows of the query tile.
struct RowPlace {
  int row[2];
  int position[2];
  int64_t activation[2];  // row * num_query_heads + head of q and out; -1: no such token
};

__device__ __forceinline__ RowPlace place_rows(const PrefillKernelArgs& args, const QueryTile& tile,
                                               int kv_head, int warpgroup) {
  RowPlace place;
  const int warp = (threadIdx.x % 128) / 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    place.row[h] = warpgroup * 64 + warp * 16 + (threadIdx.x % 32) / 4 + 8 * h;
    const int token = place.row[h] / args.group;
    place.position[h] = tile.position + min(token, tile.num_tokens - 1);
    place.activation[h] = token < tile.num_tokens
                              ? static_cast<int64_t>(tile.row + token) * args.num_query_heads +
                                    kv_head * args.group + place.row[h] - token * args.group
                              : -1;
  }
  return place;
}

// What an earlier batch left: normalised outputs and log2 of the sum of weights.
template <int kHeadDim>
__device__ __forceinline__ void resume_rows(const PrefillKernelArgs& args, const RowPlace& place,
                                            float scale, RowState<kHeadDim>& state) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (place.activation[h] < 0) continue;
    state.max[h] = args.state[place.activation[h]];
    state.sum[h] = t == 0 ? 1.0f : 0.0f;
    const float* out = args.out + place.activation[h] * kHeadDim + 2 * t;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      const float2 x = *reinterpret_cast<const float2*>(out + 8 * j);
      state.out[4 * j + 2 * h] = x.x * scale;
      state.out[4 * j + 2 * h + 1] = x.y * scale;
    }
  }
}

template <int kHeadDim>
__device__ __forceinline__ void store_rows(const PrefillKernelArgs& args, const QueryTile& tile,
                                           const RowPlace& place, const float (&shift)[2],
                                           float value_scale, RowState<kHeadDim>& state) {
  constexpr float kLog2e = 1.4426950408889634f;
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum = state.sum[h];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (place.activation[h] < 0) continue;
    float scale = value_scale / sum;
    const float total = state.max[h] + log2f(sum);
    if (tile.continues != 0) {
      if (t == 0) args.state[place.activation[h]] = total;
    } else {
      if (args.lse != nullptr && t == 0) {
        args.lse[place.activation[h]] = (total + shift[h]) / kLog2e;
      }
      if (args.sink_logits != nullptr) {
        const int head = static_cast<int>(place.activation[h] % args.num_query_heads);
        const float sink = args.sink_logits[head] * kLog2e - shift[h];
        scale *= 1.0f / (1.0f + exp2_fast(sink - total));
      }
    }
    float* out = args.out + place.activation[h] * kHeadDim + 2 * t;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      *reinterpret_cast<float2*>(out + 8 * j) =
          make_float2(state.out[4 * j + 2 * h] * scale, state.out[4 * j + 2 * h + 1] * scale);
    }
  }
}

template <int kHeadDim>
__device__ __forceinline__ void issue_scores(float (&s)[key_tile_tokens(kHeadDim) / 2],
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
__device__ __forceinline__ void issue_outputs(float (&out)[kHeadDim / 2],
                                              const uint32_t (&p)[key_tile_tokens(kHeadDim) / 4],
                                              uint64_t values) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < key_tile_tokens(kHeadDim) / 16; ++step) {
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
  uint32_t phases = 0;  // bit s: how often stage s was used before this item, modulo 2
  if (warpgroup == 1) named_arrive(kTurn, 256);
  for (int n = 0;; ++n) {
    const int slot = n & 1;
    barrier_wait(bars + 8 * (kItemFull + slot), (n >> 1) & 1);
    int item;
    asm volatile("ld.shared.s32 %0,[%1];" : "=r"(item) : "r"(base + Shape::kItems + 4 * slot));
    __syncwarp();
    if (lane == 0) barrier_arrive(bars + 8 * (kItemEmpty + slot));
    if (item < 0) break;
    const WorkItem work = args.items[item];
    const QueryTile& tile = args.tiles[work.tile];
    const int kv_head = args.first_head + work.head;
    const float* value_scales =
        args.references +
        (static_cast<int64_t>(tile.sequence) * args.num_kv_heads + kv_head) *
            reference_floats(kHeadDim) +
        kHeadDim;

    const bool shifted = kSoftcap || args.sink_logits != nullptr || args.lse != nullptr;
    load_queries<kHeadDim>(args, tile, kv_head, warpgroup, base + Shape::kQueries);
    if (shifted) load_shifts<kHeadDim>(args, tile, kv_head, warpgroup, base + Shape::kShifts);
    fence_async_shared();
    named_sync(kOwn + warpgroup, 128);

    const RowPlace place = place_rows(args, tile, kv_head, warpgroup);
    RowState<kHeadDim> state;
    state.max[0] = state.max[1] = -INFINITY;
    state.sum[0] = state.sum[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) state.out[i] = 0.0f;
    if (tile.resumes != 0) resume_rows<kHeadDim>(args, place, value_scales[0], state);
    float shift[2] = {0.0f, 0.0f};
    if (kSoftcap) {
      shift[0] = shift_of(base + Shape::kShifts, place.row[0]);
      shift[1] = shift_of(base + Shape::kShifts, place.row[1]);
    }

    float s[kKeys / 2];
    uint32_t p[kKeys / 4];
    float factor[2];
    const int key_tiles = tile.num_key_tiles;
    const auto weigh = [&](int i, auto masked) {
      if constexpr (kSoftcap) {
#pragma unroll
        for (int j = 0; j < kKeys / 2; ++j) s[j] = capped(s[j], shift[(j / 2) % 2], args.cap);
      }
      if constexpr (decltype(masked)::value) {
        mask_scores<kKeys>(s, args, tile, tile.num_slices - (i + 1) * slices, place.position);
      }
      softmax_tile<kKeys, decltype(masked)::value>(s, state.max, state.sum, factor);
    };
    const auto pack = [&] {
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) p[i] = pack_half2(s[2 * i], s[2 * i + 1]);
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

    // The first tile has no product to go with.
    barrier_wait(bars + 8 * kKeysFull, phases & 1);
    issue_scores<kHeadDim>(s, queries, keys);
    wgmma_wait<0>();
    hold(s);
    if (lane == 0) barrier_arrive(bars + 8 * kKeysEmpty);
    weigh(0, Masked{});
    pack();
    rescale();
    // Tile i uses stage i % 2 for the (i / 2)-th time in this item.
    const auto step = [&](int i, int stage, auto masked) {
      const int before = stage ^ 1;
      barrier_wait(bars + 8 * (kKeysFull + stage), ((i >> 1) ^ (phases >> stage)) & 1);
      named_sync(kTurn + warpgroup, 256);
      issue_scores<kHeadDim>(s, queries, keys + stage * (Shape::kTileBytes >> 4));
      barrier_wait(bars + 8 * (kValuesFull + before), (((i - 1) >> 1) ^ (phases >> before)) & 1);
      issue_outputs<kHeadDim>(state.out, p, values + before * (Shape::kTileBytes >> 4));
      named_arrive(kTurn + (warpgroup ^ 1), 256);
      wgmma_wait<1>();
      hold(s);
      if (lane == 0) barrier_arrive(bars + 8 * (kKeysEmpty + stage));
      weigh(i, masked);
      wgmma_wait<0>();
      hold(state.out);
      if (lane == 0) barrier_arrive(bars + 8 * (kValuesEmpty + before));
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
      barrier_wait(bars + 8 * (kValuesFull + stage),
                   (((key_tiles - 1) >> 1) ^ (phases >> stage)) & 1);
      issue_outputs<kHeadDim>(state.out, p, values + stage * (Shape::kTileBytes >> 4));
      wgmma_wait<0>();
      hold(state.out);
      if (lane == 0) barrier_arrive(bars + 8 * (kValuesEmpty + stage));
    }
    phases ^= (((key_tiles + 1) >> 1) & 1) | (key_tiles & 2);
    if (!kSoftcap && shifted) {
      shift[0] = shift_of(base + Shape::kShifts, place.row[0]);
      shift[1] = shift_of(base + Shape::kShifts, place.row[1]);
    }
    if constexpr (kSoftcap) shift[0] = shift[1] = 0.0f;  // already in the scores
    store_rows<kHeadDim>(args, tile, place, shift, value_scales[1], state);
    named_sync(kOwn + warpgroup, 128);  // shifts are read before the next item's are written
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

template <int kHeadDim, bool kSoftcap, typename Images>
__global__ __launch_bounds__(kPrefillThreads, 1) void prefill_attention(
    const __grid_constant__ PrefillKernelArgs args,
    const __grid_constant__ typename Images::Args images) {
  using Shape = PrefillShape<kHeadDim>;
  extern __shared__ uint8_t shared[];
  const uint32_t base = (shared_address(shared) + 1023u) & ~1023u;
  if (threadIdx.x == 0) {
    const uint32_t bars = base + Shape::kBarriers;
    for (int i = 0; i < 2; ++i) {
      barrier_init(bars + 8 * (kKeysFull + i), 1);
      barrier_init(bars + 8 * (kKeysEmpty + i), 8);  // consumer warps
      barrier_init(bars + 8 * (kValuesFull + i), 1);
      barrier_init(bars + 8 * (kValuesEmpty + i), 8);
      barrier_init(bars + 8 * (kItemFull + i), 1);
      barrier_init(bars + 8 * (kItemEmpty + i), 8);
    }
    barrier_init_fence();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128), 0);
  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Images::kProducerRegisters));
    const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
    if (warp == 0) {
      produce<Shape, Images>(args, images, base);
      finish<Images>(args.counters);
    }
    if constexpr (Images::kWrites) {
      if (warp > 0) {
        write_images<Images>(images, args.counters,
                             shared + (base - shared_address(shared)) + Shape::kImages +
                                 (warp - 1) * fast_shared_bytes(kHeadDim));
        finish<Images>(args.counters);
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Images::kConsumerRegisters));
    consume<kHeadDim, kSoftcap>(args, base, warpgroup - 1);
  }
}

template <int kHeadDim, bool kSoftcap, typename Images>
Status launch_prefill_kernel(const PrefillKernelArgs& args, const typename Images::Args& images,
                             int num_processors, cudaStream_t stream) {
  constexpr int kBytes = PrefillShape<kHeadDim>::kBytes +
                         (Images::kWrites ? kImageWarps * fast_shared_bytes(kHeadDim) : 0);
  static_assert(kBytes <= 227 * 1024, "a block has 227 KiB of shared memory");
  static_assert(2 * Images::kConsumerRegisters + Images::kProducerRegisters <= 3 * kStartRegisters,
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
