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

template <typename Codec, bool kValues>
__device__ bool close_rows_with_mean(const CloseUnit& unit, float* mean) {
  if constexpr (!kValues) {
    if (unit.side.format.mean) {
      page_mean(unit, mean);
      __syncthreads();
      return close_rows<Codec, kValues, true>(unit, mean);
    }
  }
  return close_rows<Codec, kValues, false>(unit, nullptr);
}

__device__ __forceinline__ bool is_power_of_two(float g) {
  return (as_bits(g) & 0x7fffffu) == 0;
}

template <bool kValues>
__device__ bool close_nvfp4(const CloseUnit& unit, float* mean) {
  const bool search = unit.side.format.four_over_six;
  if (is_power_of_two(unit.params.global_scale)) {
    return search ? close_rows_with_mean<Nvfp4Codec<true, true>, kValues>(unit, mean)
                  : close_rows_with_mean<Nvfp4Codec<false, true>, kValues>(unit, mean);
  }
  return search ? close_rows_with_mean<Nvfp4Codec<true, false>, kValues>(unit, mean)
                : close_rows_with_mean<Nvfp4Codec<false, false>, kValues>(unit, mean);
}

// False if the side has no specialised kernel or met a block that this is not for.
template <bool kValues>
__device__ bool close_specialised(const CloseUnit& unit, std::byte* shared) {
  const formats::SideFormat& format = unit.side.format;
  if (format.rotate || (format.smooth && unit.params.smooth != nullptr) ||
      (format.bias && unit.params.bias != nullptr)) {
    return false;
  }
  auto* mean = reinterpret_cast<float*>(shared);
  bool bad = true;
  using formats::FormatId;
  switch (format.base) {
    case FormatId::kFp8:
    case FormatId::kFp8Head:
      bad = close_rows_with_mean<Float8Codec<formats::Fp8>, kValues>(unit, mean);
      break;
    case FormatId::kFp8E5m2:
      bad = close_rows_with_mean<Float8Codec<formats::Fp8E5m2>, kValues>(unit, mean);
      break;
    case FormatId::kMxfp8:
      bad = close_rows_with_mean<MicroscalingCodec<formats::Mxfp8>, kValues>(unit, mean);
      break;
    case FormatId::kMxfp4:
      bad = close_rows_with_mean<MicroscalingCodec<formats::Mxfp4>, kValues>(unit, mean);
      break;
    case FormatId::kInt8: bad = close_rows_with_mean<Int8Codec, kValues>(unit, mean); break;
    case FormatId::kInt4: bad = close_rows_with_mean<Int4Codec, kValues>(unit, mean); break;
    case FormatId::kNvfp4: bad = close_nvfp4<kValues>(unit, mean); break;
    case FormatId::kInt4Channel:
      if constexpr (!kValues) {
        if (!format.mean) bad = close_int4_channel(unit, reinterpret_cast<uint32_t*>(shared));
      }
      break;
    default: break;
  }
  return !__syncthreads_or(bad);
}

// Appends the rows of a page that are all in this step, to the page and to shared memory.
template <bool kValues>
__device__ __forceinline__ void append_page(const CloseArgs& args, const ClosedPage& page, int head,
                                            uint4* source) {
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  for (int tile = static_cast<int>(threadIdx.x / kLanes); tile < args.rows.page_tokens / kTile;
       tile += kCloseThreads / kLanes) {
    AppendItem item;
    item.row = page.row + tile * kTile;
    item.slot = page.source_slot;
    item.kind = static_cast<uint8_t>(page.source_kind);
    item.token = static_cast<uint8_t>(tile * kTile);
    item.count = kTile;
    append_run<kValues>(args.rows, find_run(args.rows, item, head, kValues), lane, source);
  }
}

// Copies a side of a BF16 unit to shared memory.
__device__ __forceinline__ void load_source(const SideMap& map, const std::byte* from,
                                            uint4* source) {
  const unsigned num_chunks = static_cast<unsigned>(map.page_tokens * map.head_dim / 8);
  for (unsigned i = threadIdx.x; i < num_chunks; i += kCloseThreads) {
    const int at = source_chunk(static_cast<int>(i / kLanes), static_cast<int>(i % kLanes));
    __pipeline_memcpy_async(source + at, reinterpret_cast<const uint4*>(from) + i, sizeof(uint4));
  }
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

template <bool kValues>
__device__ __forceinline__ void close_side(const CloseArgs& args, int item, int head,
                                           std::byte* shared) {
  const ClosedPage page = args.pages[item];
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
  if (page.row >= 0) {
    append_page<kValues>(args, page, head, source);
  } else {
    load_source(side.map,
                args.rows.kinds[page.source_kind].unit(page.source_slot, head) + side.source_at,
                source);
  }
  zero_padding(target, side.codes_at + side.map.code_bytes, side.scales_at);
  zero_padding(target, side.scales_at + side.map.scale_bytes, side.mean_at);
  zero_padding(target, side.mean_at + (side.format.mean ? side.map.head_dim * 2 : 0), side.end_at);
  __syncthreads();
  if (close_specialised<kValues>(unit, shared)) return;
  if (side.format.four_over_six) {  // its kernel writes to the source
    load_source(side.map,
                args.rows.kinds[page.source_kind].unit(page.source_slot, head) + side.source_at,
                source);
    __syncthreads();
  }
  close_general(unit, shared, args.rows.counters);
}

inline int close_scratch_bytes(int page_tokens, int head_dim) {
  const int general = general_scratch_bytes(head_dim);
  const int columns = column_scratch_bytes(page_tokens, head_dim);
  return page_tokens * head_dim * 2 + (general > columns ? general : columns);
}

__global__ void __launch_bounds__(kCloseThreads, 5)
    close_kernel(const __grid_constant__ CloseArgs args) {
  ptx::launch_dependents();
  ptx::wait_prerequisites();
  // The page's BF16 side, then what closing needs.
  extern __shared__ __align__(16) std::byte close_scratch[];
  const int unit = static_cast<int>(blockIdx.x / 2);
  const int item = unit / args.rows.num_kv_heads;
  const int head = unit % args.rows.num_kv_heads;
  if (blockIdx.x % 2 == 0) {
    close_side<false>(args, item, head, close_scratch);
  } else {
    close_side<true>(args, item, head, close_scratch);
  }
}

}  // namespace kvant::backend::cuda::quant
