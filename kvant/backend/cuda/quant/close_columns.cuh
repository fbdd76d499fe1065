// Closing of int4:channel: blocks along the page's tokens, in registers and a little shared memory.
//
// A thread has four channels of 16 tokens: the words of eight lanes that are four apart. Ranges of
// a channel meet in shared memory, one thread per channel makes its scale, then every thread
// encodes what it has.
#pragma once

#include "kvant/backend/cuda/quant/close_rows.cuh"

namespace kvant::backend::cuda::quant {

// Bytes of shared memory that close_int4_channel needs.
inline int column_scratch_bytes(int page_tokens, int head_dim) {
  return (2 * page_tokens / kTile * head_dim / 2 + head_dim) * 4;
}

__device__ inline bool close_int4_channel(const CloseUnit& unit, uint32_t* scratch) {
  const SideMap& map = unit.side.map;
  const int num_steps = map.head_dim / kTile;
  const int num_tiles = map.page_tokens / kTile;
  const int num_pairs = map.head_dim / 2;
  uint32_t* lows = scratch;  // [tile][pair of channels], BF16
  uint32_t* highs = lows + num_tiles * num_pairs;
  uint32_t* scales = highs + num_tiles * num_pairs;  // [channel]: scale and zero
  const int num_tasks = num_tiles * num_steps * 4;
  bool bad = false;
  for (int task = threadIdx.x; task < num_tasks; task += kCloseThreads) {
    const int t = task % 4;
    const int tile =
        static_cast<int>(static_cast<unsigned>(task) / 4 / static_cast<unsigned>(num_steps));
    const int step = task / 4 - tile * num_steps;
    const int fragment = tile * num_steps + step;
    uint32_t low[2] = {kInfinities, kInfinities};
    uint32_t high[2] = {kInfinities | kSigns, kInfinities | kSigns};
#pragma unroll 2
    for (int i = 0; i < 8; ++i) {
      const uint4 word = unit.source[source_chunk(fragment, 4 * i + t)];
      low[0] = min_bf16x2(low[0], min_bf16x2(word.x, word.y));
      high[0] = max_bf16x2(high[0], max_bf16x2(word.x, word.y));
      low[1] = min_bf16x2(low[1], min_bf16x2(word.z, word.w));
      high[1] = max_bf16x2(high[1], max_bf16x2(word.z, word.w));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pair = tile * num_pairs + step * 8 + half * 4 + t;
      lows[pair] = low[half];
      highs[pair] = high[half];
    }
  }
  __syncthreads();
  for (int pair = threadIdx.x; pair < num_pairs; pair += kCloseThreads) {
    uint32_t low = lows[pair];
    uint32_t high = highs[pair];
    for (int tile = 1; tile < num_tiles; ++tile) {
      low = min_bf16x2(low, lows[tile * num_pairs + pair]);
      high = max_bf16x2(high, highs[tile * num_pairs + pair]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float least = i == 0 ? low_float(low) : high_float(low);
      const float most = i == 0 ? low_float(high) : high_float(high);
      const float limit = formats::Int4::max_magnitude(1.0f);
      bad |= !is_plain(fabsf(least), limit) || !is_plain(fabsf(most), limit);
      BlockRange range;
      range.min_key = order_key(least);
      range.max_key = order_key(most);
      scales[2 * pair + i] = Int4Codec<true>(1.0f).make_scale(range).stored;
    }
  }
  __syncthreads();
  for (int task = threadIdx.x; task < num_tasks; task += kCloseThreads) {
    const int t = task % 4;
    const int tile =
        static_cast<int>(static_cast<unsigned>(task) / 4 / static_cast<unsigned>(num_steps));
    const int step = task / 4 - tile * num_steps;
    const int fragment = tile * num_steps + step;
    const uint2 first = *reinterpret_cast<const uint2*>(scales + step * kTile + 2 * t);
    const uint2 second = *reinterpret_cast<const uint2*>(scales + step * kTile + 2 * t + 8);
    if (tile == 0) {
      reinterpret_cast<uint4*>(unit.scales)[step * 4 + t] = make_uint4(
          __byte_perm(first.x, first.y, 0x7632), __byte_perm(first.x, first.y, 0x5410),
          __byte_perm(second.x, second.y, 0x7632), __byte_perm(second.x, second.y, 0x5410));
    }
    const Int4Codec<true>::Scale scale[4] = {
        Int4Codec<true>::scale_of(first.x), Int4Codec<true>::scale_of(first.y),
        Int4Codec<true>::scale_of(second.x), Int4Codec<true>::scale_of(second.y)};
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      const uint4 in = unit.source[source_chunk(fragment, 4 * i + t)];
      uint32_t codes = 0;
#pragma unroll
      for (int reg = 0; reg < 4; ++reg) {
        const uint32_t word = component(in, reg);
        codes |= Int4Codec<true>::codes(low_float(word), high_float(word), scale[reg / 2 * 2],
                                        scale[reg / 2 * 2 + 1])
                 << (4 * reg);
      }
      store_codes<1>(unit.codes, num_steps, tile, step, 4 * i + t, &codes);
    }
  }
  return bad;
}

}  // namespace kvant::backend::cuda::quant
