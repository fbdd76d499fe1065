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
  uint32_t* low_keys = scratch;  // [tile][pair of channels]: order keys of BF16
  uint32_t* high_keys = low_keys + num_tiles * num_pairs;
  uint32_t* scales = high_keys + num_tiles * num_pairs;  // [channel]: scale and zero
  const int num_tasks = num_tiles * num_steps * 4;
  bool bad = false;
  for (int task = threadIdx.x; task < num_tasks; task += kCloseThreads) {
    const int t = task % 4;
    const int tile =
        static_cast<int>(static_cast<unsigned>(task) / 4 / static_cast<unsigned>(num_steps));
    const int step = task / 4 - tile * num_steps;
    const int fragment = tile * num_steps + step;
    uint32_t low[2] = {0x7fff7fffu, 0x7fff7fffu};
    uint32_t high[2] = {0x80008000u, 0x80008000u};
#pragma unroll 2
    for (int i = 0; i < 8; ++i) {
      const uint4 word = unit.source[source_chunk(fragment, 4 * i + t)];
      const uint32_t a = order_keys(word.x), b = order_keys(word.y);
      const uint32_t c = order_keys(word.z), d = order_keys(word.w);
      low[0] = __vmins2(low[0], __vmins2(a, b));
      high[0] = __vmaxs2(high[0], __vmaxs2(a, b));
      low[1] = __vmins2(low[1], __vmins2(c, d));
      high[1] = __vmaxs2(high[1], __vmaxs2(c, d));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pair = tile * num_pairs + step * 8 + half * 4 + t;
      low_keys[pair] = low[half];
      high_keys[pair] = high[half];
    }
  }
  __syncthreads();
  for (int pair = threadIdx.x; pair < num_pairs; pair += kCloseThreads) {
    uint32_t low = low_keys[pair];
    uint32_t high = high_keys[pair];
    for (int tile = 1; tile < num_tiles; ++tile) {
      low = __vmins2(low, low_keys[tile * num_pairs + pair]);
      high = __vmaxs2(high, high_keys[tile * num_pairs + pair]);
    }
    const uint32_t min_words = order_keys(low);
    const uint32_t max_words = order_keys(high);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float least = i == 0 ? low_float(min_words) : high_float(min_words);
      const float most = i == 0 ? low_float(max_words) : high_float(max_words);
      const float limit = formats::Int4::max_magnitude(1.0f);
      bad |= !is_plain(fabsf(least), limit) || !is_plain(fabsf(most), limit);
      BlockRange range;
      range.min_key = order_key(least);
      range.max_key = order_key(most);
      scales[2 * pair + i] = Int4Codec(1.0f).make_scale(range).stored;
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
    const Int4Codec::Scale scale[4] = {Int4Codec::scale_of(first.x), Int4Codec::scale_of(first.y),
                                       Int4Codec::scale_of(second.x),
                                       Int4Codec::scale_of(second.y)};
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      const uint4 in = unit.source[source_chunk(fragment, 4 * i + t)];
      uint32_t codes = 0;
#pragma unroll
      for (int reg = 0; reg < 4; ++reg) {
        const uint32_t word = component(in, reg);
        const uint32_t code = Int4Codec::code(low_float(word), scale[reg / 2 * 2]) +
                              (Int4Codec::code(high_float(word), scale[reg / 2 * 2 + 1]) << 16);
        codes += code << (4 * reg);
      }
      store_codes<1>(unit.codes, num_steps, tile, step, 4 * i + t, &codes);
    }
  }
  return bad;
}

}  // namespace kvant::backend::cuda::quant
