// The kernel that closes pages: a block of threads per page, KV head and side.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "kvant/backend/cuda/quant/append_rows.cuh"
#include "kvant/backend/cuda/quant/close_columns.cuh"
#include "kvant/backend/cuda/quant/close_general.cuh"
#include "kvant/backend/cuda/quant/close_rows.cuh"

namespace kvant::backend::cuda::quant {

__device__ inline void zero_padding(std::byte* unit, int begin, int end) {
  for (int i = begin + static_cast<int>(threadIdx.x) * 16; i < end; i += kCloseThreads * 16)
    *reinterpret_cast<uint4*>(unit + i) = make_uint4(0, 0, 0, 0);
}

// ---- closers: what closes a side, by a warp a tile or by all threads a page ----

// How long a side takes beside the other one's.
enum class CloseWork : uint8_t { kPlain, kMean, kSearch };

// Rows whose tiles need nothing of the rest of the page.
template <typename Codec, bool kValues>
struct CloseByTile {
  static constexpr bool kByTile = true;
  static constexpr CloseWork kWork = Codec::kFourOverSix ? CloseWork::kSearch : CloseWork::kPlain;
  // Both return whether the side is to be closed again, by the general kernel.
  static __device__ __forceinline__ bool close(const CloseUnit& unit, int tile, int lane) {
    return close_tile<Codec, kValues, false>(unit, nullptr, tile, lane);
  }
};

template <typename Codec, bool kValues, bool kMean>
__device__ __forceinline__ bool close_tiles(const CloseUnit& unit, const float* mean) {
  bool bad = false;
  const int num_tiles = unit.side.map.page_tokens / kTile;
  for (int tile = static_cast<int>(threadIdx.x / kLanes); tile < num_tiles;
       tile += kCloseThreads / kLanes)
    bad |= close_tile<Codec, kValues, kMean>(unit, mean, tile, threadIdx.x % kLanes);
  return bad;
}

// Keys less the page's mean.
template <typename Codec>
struct CloseLessMean {
  static constexpr bool kByTile = false;
  static constexpr CloseWork kWork = CloseWork::kMean;
  static __device__ bool close(const CloseUnit& unit, std::byte* shared) {
    auto* mean = reinterpret_cast<float*>(shared);
    page_mean(unit, mean);
    __syncthreads();
    return close_tiles<Codec, false, true>(unit, mean);
  }
};

struct CloseChannels {
  static constexpr bool kByTile = false;
  static constexpr CloseWork kWork = CloseWork::kPlain;
  static __device__ bool close(const CloseUnit& unit, std::byte* shared) {
    return close_int4_channel(unit, reinterpret_cast<uint32_t*>(shared));
  }
};

// Any format and option, decided at run time.
template <bool kValues>
struct CloseAny {
  static constexpr bool kByTile = false;
  static constexpr CloseWork kWork = CloseWork::kPlain;  // not known

  template <template <bool> typename Codec>
  static __device__ bool close_rows(const CloseUnit& unit, std::byte* shared) {
    if constexpr (!kValues) {
      if (unit.side.format.mean) return CloseLessMean<Codec<false>>::close(unit, shared);
    }
    return close_tiles<Codec<true>, kValues, false>(unit, nullptr);
  }

  template <bool kOfBf16>
  using Fp8 = Float8Codec<formats::Fp8, kOfBf16>;
  template <bool kOfBf16>
  using Fp8E5m2 = Float8Codec<formats::Fp8E5m2, kOfBf16>;
  template <bool kOfBf16>
  using Mxfp8 = MicroscalingCodec<formats::Mxfp8, kOfBf16>;
  template <bool kOfBf16>
  using Mxfp4 = MicroscalingCodec<formats::Mxfp4, kOfBf16>;
  template <bool kOfBf16>
  using Nvfp4 = Nvfp4Codec<false, false, kOfBf16>;
  template <bool kOfBf16>
  using Nvfp4FourOverSix = Nvfp4Codec<true, false, kOfBf16>;

  static __device__ bool close(const CloseUnit& unit, std::byte* shared) {
    const formats::SideFormat& format = unit.side.format;
    if (format.rotate || (format.smooth && unit.params.smooth != nullptr) ||
        (format.bias && unit.params.bias != nullptr)) {
      return true;
    }
    using formats::FormatId;
    switch (format.base) {
      case FormatId::kFp8:
      case FormatId::kFp8Head: return close_rows<Fp8>(unit, shared);
      case FormatId::kFp8E5m2: return close_rows<Fp8E5m2>(unit, shared);
      case FormatId::kMxfp8: return close_rows<Mxfp8>(unit, shared);
      case FormatId::kMxfp4: return close_rows<Mxfp4>(unit, shared);
      case FormatId::kInt8: return close_rows<Int8Codec>(unit, shared);
      case FormatId::kInt4: return close_rows<Int4Codec>(unit, shared);
      case FormatId::kNvfp4:
        return format.four_over_six ? close_rows<Nvfp4FourOverSix>(unit, shared)
                                    : close_rows<Nvfp4>(unit, shared);
      case FormatId::kInt4Channel:
        if (kValues || format.mean) return true;
        return CloseChannels::close(unit, shared);
      default: return true;
    }
  }
};

// ---- a side of a page ----

// A tile's part of a BF16 side to shared memory, from a page or, of a page whose rows are all in
// this step, from those rows, which go to the page as well; a warp.
template <bool kValues>
__device__ __forceinline__ void load_tile_source(const CloseArgs& args, const ClosedPage& page,
                                                 int head, int tile, int lane, uint4* source) {
  if (page.row >= 0) {
    AppendItem item;
    item.row = page.row + tile * kTile;
    item.slot = page.source_slot;
    item.kind = static_cast<uint8_t>(page.source_kind);
    item.token = static_cast<uint8_t>(tile * kTile);
    item.count = kTile;
    append_run<kValues, true>(args.rows, find_run(args.rows, item, head, kValues), lane, source);
    return;
  }
  const CloseSide& side = args.rows.sides[kValues ? 1 : 0];
  const std::byte* unit = args.rows.kinds[page.source_kind].unit(page.source_slot, head);
  const int num_steps = args.rows.head_dim / kTile;
  const auto* from = reinterpret_cast<const uint4*>(unit + side.source_at);
#pragma unroll 4
  for (int step = 0; step < num_steps; ++step) {
    const int fragment = tile * num_steps + step;
    __pipeline_memcpy_async(source + source_chunk(fragment, lane), from + fragment * kLanes + lane,
                            sizeof(uint4));
  }
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

// The whole side again, as the page has it.
__device__ inline void reload_source(const SideMap& map, const std::byte* from, uint4* source) {
  const auto num_chunks = static_cast<unsigned>(map.page_tokens * map.head_dim / 8);
  for (unsigned i = threadIdx.x; i < num_chunks; i += kCloseThreads) {
    const int at = source_chunk(static_cast<int>(i / kLanes), static_cast<int>(i % kLanes));
    source[at] = __ldcg(reinterpret_cast<const uint4*>(from) + i);
  }
}

template <bool kValues, typename Closer>
__device__ __forceinline__ void close_side(const CloseArgs& args, const ClosedPage& page, int head,
                                           std::byte* shared) {
  const CloseSide& side = args.rows.sides[kValues ? 1 : 0];
  std::byte* target = args.rows.kinds[cache::kKindStored].unit(page.target_slot, head);
  auto* source = reinterpret_cast<uint4*>(shared);
  shared += side.map.page_tokens * side.map.head_dim * 2;
  const CloseUnit unit = {side,
                          side.params[head],
                          source,
                          reinterpret_cast<uint8_t*>(target) + side.codes_at,
                          reinterpret_cast<uint8_t*>(target) + side.scales_at,
                          reinterpret_cast<uint16_t*>(target + side.mean_at)};
  ptx::wait_prerequisites();  // tables were there before
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const int num_tiles = args.rows.page_tokens / kTile;
  bool bad = false;
  for (int tile = static_cast<int>(threadIdx.x / kLanes); tile < num_tiles;
       tile += kCloseThreads / kLanes) {
    load_tile_source<kValues>(args, page, head, tile, lane, source);
    if constexpr (Closer::kByTile) {
      __syncwarp();
      bad |= Closer::close(unit, tile, lane);
    }
  }
  zero_padding(target, side.codes_at + side.map.code_bytes, side.scales_at);
  zero_padding(target, side.scales_at + side.map.scale_bytes, side.mean_at);
  zero_padding(target, side.mean_at + (side.format.mean ? side.map.head_dim * 2 : 0), side.end_at);
  if constexpr (!Closer::kByTile) {
    __syncthreads();
    bad = Closer::close(unit, shared);
  }
  if (!__syncthreads_or(bad)) return;
  if (side.format.four_over_six) {  // its kernel writes to the source
    reload_source(side.map,
                  args.rows.kinds[page.source_kind].unit(page.source_slot, head) + side.source_at,
                  source);
    __syncthreads();
  }
  close_general(unit, shared, args.rows.counters);
}

// A page and a side of one KV head.
struct BlockWork {
  int unit;
  bool keys;
};

// Keys and values in turn; where one side takes longer, all of it comes first, so that the last
// blocks are short ones.
template <typename Keys, typename Values>
__device__ __forceinline__ BlockWork work_of_block() {
  const int block = static_cast<int>(blockIdx.x);
  if constexpr (Keys::kWork == Values::kWork) return {block / 2, block % 2 == 0};
  const int num_units = static_cast<int>(gridDim.x / 2);
  const bool first = block < num_units;
  return {first ? block : block - num_units, first == (Keys::kWork > Values::kWork)};
}

template <typename Keys, typename Values, int kBlocks>
__global__ void __launch_bounds__(kCloseThreads, kBlocks)
    close_kernel(const __grid_constant__ CloseArgs args) {
  ptx::launch_dependents();
  // The page's BF16 side, then what closing needs.
  extern __shared__ __align__(16) std::byte close_scratch[];
  const BlockWork work = work_of_block<Keys, Values>();
  const ClosedPage page = args.pages[work.unit / args.rows.num_kv_heads];
  const int head = work.unit % args.rows.num_kv_heads;
  if (work.keys) {
    close_side<false, Keys>(args, page, head, close_scratch);
  } else {
    close_side<true, Values>(args, page, head, close_scratch);
  }
}

}  // namespace kvant::backend::cuda::quant
