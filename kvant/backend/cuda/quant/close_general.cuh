// Closing of any format with any option: the scalar codecs of formats/*.h over tiles in shared
// memory.
//
// Slower than the specialised kernels, and right for every input: they leave their pages to it when
// they meet a block that is not finite, saturates or has an extreme scale.
#pragma once

#include "kvant/backend/cuda/quant/close_args.cuh"
#include "kvant/formats/all_formats.h"
#include "kvant/formats/format_concept.h"

namespace kvant::backend::cuda::quant {

// Shared memory of a block, in this order.
struct GeneralScratch {
  float* x;          // [16][head_dim]: a tile of tokens
  float* mean;       // [head_dim]
  uint32_t* scales;  // [head_dim], ":channel" formats
  uint32_t* out;     // codes of the tile, `sm90` order

  __device__ GeneralScratch(std::byte* shared, int head_dim)
      : x(reinterpret_cast<float*>(shared)),
        mean(x + kTile * head_dim),
        scales(reinterpret_cast<uint32_t*>(mean + head_dim)),
        out(scales + head_dim) {}
};
inline int general_scratch_bytes(int head_dim, int code_bits) {
  return kTile * head_dim * 4 + head_dim * 8 + kTile * head_dim * code_bits / 8;
}

// In place on rows [num_rows][head_dim] in shared memory; all threads of the block.
__device__ inline void rotate_rows(float* x, int num_rows, int head_dim, float scale) {
  const int block = head_dim & -head_dim;
  const int num_values = num_rows * head_dim;
  for (int stride = 1; stride < block; stride *= 2) {
    __syncthreads();
    for (int i = threadIdx.x; i < num_values / 2; i += blockDim.x) {
      const int first = i / stride * 2 * stride + i % stride;
      const float a = x[first];
      const float b = x[first + stride];
      x[first] = __fadd_rn(a, b);
      x[first + stride] = __fadd_rn(a, -b);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_values; i += blockDim.x) x[i] = __fmul_rn(x[i], scale);
}

// One tile of tokens as fp32, / smooth, rotated, - bias.
__device__ inline void load_tile(const CloseUnit& unit, int tile, const GeneralScratch& s) {
  const SideMap& map = unit.side.map;
  const formats::SideFormat& format = unit.side.format;
  const int num_words = kTile * map.head_dim / 2;
  const auto* source = reinterpret_cast<const uint32_t*>(unit.source);
  __syncthreads();
  for (int i = threadIdx.x; i < num_words; i += blockDim.x) {
    const int step = i / (4 * kLanes);
    const int lane = i / 4 % kLanes;
    const int reg = i % 4;
    const int row = lane / 4 + reg % 2 * 8;
    const int column = lane % 4 * 2 + reg / 2 * 8;
    const int fragment = tile * (map.head_dim / kTile) + step;
    const uint32_t word = source[source_chunk(fragment, lane) * 4 + reg];
    for (int parity = 0; parity < 2; ++parity) {
      const int token = map.values ? column + parity : row;
      const int channel = step * kTile + (map.values ? row : column + parity);
      float value = from_bf16(static_cast<uint16_t>(word >> (16 * parity)));
      if (format.smooth && unit.params.smooth != nullptr)
        value = value / unit.params.smooth[channel];
      s.x[token * map.head_dim + channel] = value;
    }
  }
  if (format.rotate) rotate_rows(s.x, kTile, map.head_dim, unit.side.rotation_scale);
  __syncthreads();
  if (format.bias && unit.params.bias != nullptr) {
    for (int i = threadIdx.x; i < kTile * map.head_dim; i += blockDim.x)
      s.x[i] = __fadd_rn(s.x[i], -unit.params.bias[i % map.head_dim]);
    __syncthreads();
  }
}

__device__ inline void load_tile_less_mean(const CloseUnit& unit, int tile,
                                           const GeneralScratch& s) {
  load_tile(unit, tile, s);
  if (!unit.side.format.mean) return;
  const int head_dim = unit.side.map.head_dim;
  for (int i = threadIdx.x; i < kTile * head_dim; i += blockDim.x)
    s.x[i] = __fadd_rn(s.x[i], -s.mean[i % head_dim]);
  __syncthreads();
}

__device__ inline void general_mean(const CloseUnit& unit, const GeneralScratch& s) {
  const SideMap& map = unit.side.map;
  for (int tile = 0; tile < map.page_tokens / kTile; ++tile) {
    load_tile(unit, tile, s);
    for (int c = threadIdx.x; c < map.head_dim; c += blockDim.x) {
      float sum = tile == 0 ? 0.0f : s.mean[c];
      for (int row = 0; row < kTile; ++row) sum = __fadd_rn(sum, s.x[row * map.head_dim + c]);
      s.mean[c] = sum;
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < map.head_dim; c += blockDim.x) {
    const float value = s.mean[c] / static_cast<float>(map.page_tokens);
    unit.mean[c] = formats::is_nan(value) ? uint16_t{0} : to_bf16_saturated(value);
    s.mean[c] = from_bf16(unit.mean[c]);
  }
  __syncthreads();
}

// ORs a code into zeroed words; other threads may write other bits of the same word.
__device__ inline void put_code(uint32_t* words, const CodeFields& fields, int bit_offset,
                                uint32_t code) {
  for (int i = 0; i < fields.num; ++i) {
    const CodeField& field = fields.field[i];
    const int bit = field.bit - bit_offset;
    const uint32_t bits = code >> field.shift & ((1u << field.width) - 1u);
    if (bits != 0) atomicOr(words + bit / 32, bits << (bit % 32));
  }
}

template <typename F>
__device__ uint32_t scale_of_block(const float* x, int n, float g, bool four_over_six) {
  if constexpr (formats::FormatHasFourOverSix<F>) {
    if (four_over_six) return F::block_scale_four_over_six(x, n, g);
  }
  return F::block_scale(x, n, g);
}

// Encodes n numbers `stride` apart, which are elements (token, channel + i), or (token + i,
// channel) of ":channel" formats. Returns how many finite ones saturate.
template <typename F>
__device__ int encode_numbers(const SideMap& map, const float* x, int stride, int n, int token,
                              int channel, uint32_t scale, float g, int tile, uint32_t* out) {
  const float limit = F::max_magnitude(g);
  const int tile_bit = tile * kTile * map.head_dim * map.code_bits;
  int saturated = 0;
  for (int i = 0; i < n; ++i) {
    const float value = x[i * stride];
    const bool columns = F::kInfo.axis == formats::BlockAxis::kToken;
    const CodeFields fields =
        sm90_code_fields(map, token + (columns ? i : 0), channel + (columns ? 0 : i));
    put_code(out, fields, tile_bit, F::encode(value, scale, g));
    if (formats::is_finite(value) && formats::magnitude(value) > limit) ++saturated;
  }
  return saturated;
}

template <typename F>
__device__ void store_block_scale(const SideMap& map, uint8_t* scales, int row, int block,
                                  uint32_t scale) {
  constexpr int kBytes = formats::scale_bytes(F::kInfo.scale);
  if constexpr (kBytes > 0) {
    const int part_bytes = map.part_bytes;
    for (int i = 0; i < kBytes; ++i) {
      scales[sm90_scale_byte(map, row, block, i / part_bytes) + i % part_bytes] =
          static_cast<uint8_t>(scale >> (8 * i));
    }
  }
}

// Scales of a ":channel" format, from a first reading of the page.
template <typename F>
__device__ void general_channel_scales(const CloseUnit& unit, const GeneralScratch& s) {
  const SideMap& map = unit.side.map;
  // At most head_dim / threads channels a thread.
  constexpr int kMost = 4;
  formats::FiniteRange ranges[kMost] = {};
  bool any[kMost] = {};
  for (int tile = 0; tile < map.page_tokens / kTile; ++tile) {
    load_tile_less_mean(unit, tile, s);
    for (int i = 0, c = threadIdx.x; c < map.head_dim; ++i, c += blockDim.x) {
      for (int row = 0; row < kTile; ++row) {
        const float x = s.x[row * map.head_dim + c];
        if (!formats::is_finite(x)) continue;
        if (!any[i] || formats::order_key(x) < formats::order_key(ranges[i].min)) ranges[i].min = x;
        if (!any[i] || formats::order_key(x) > formats::order_key(ranges[i].max)) ranges[i].max = x;
        any[i] = true;
      }
    }
  }
  for (int i = 0, c = threadIdx.x; c < map.head_dim; ++i, c += blockDim.x) {
    const float ends[2] = {ranges[i].min, ranges[i].max};
    s.scales[c] = F::block_scale(ends, 2, unit.params.global_scale);
    store_block_scale<F>(map, unit.scales, c, 0, s.scales[c]);
  }
  __syncthreads();
}

template <typename F>
__device__ __noinline__ void close_general_as(const CloseUnit& unit, const GeneralScratch& s,
                                              EncodeCounters* counters) {
  constexpr bool kColumns = F::kInfo.axis == formats::BlockAxis::kToken;
  const SideMap& map = unit.side.map;
  const float g = unit.params.global_scale;
  if (unit.side.format.mean) general_mean(unit, s);
  if constexpr (kColumns) general_channel_scales<F>(unit, s);
  const int num_words = kTile * map.head_dim * map.code_bits / 32;
  int saturated = 0;
  for (int tile = 0; tile < map.page_tokens / kTile; ++tile) {
    load_tile_less_mean(unit, tile, s);
    for (int i = threadIdx.x; i < num_words; i += blockDim.x) s.out[i] = 0;
    __syncthreads();
    if constexpr (kColumns) {
      for (int c = threadIdx.x; c < map.head_dim; c += blockDim.x) {
        saturated += encode_numbers<F>(map, s.x + c, map.head_dim, kTile, tile * kTile, c,
                                       s.scales[c], g, tile, s.out);
      }
    } else {
      // Without scales any cut into runs will do.
      const int length = map.num_blocks == 0 ? kTile : map.block_size;
      const int num_blocks = (map.head_dim + length - 1) / length;
      for (int i = threadIdx.x; i < kTile * num_blocks; i += blockDim.x) {
        const int row = i / num_blocks;
        const int block = i % num_blocks;
        const int n = min(length, map.head_dim - block * length);
        const float* x = s.x + row * map.head_dim + block * length;
        const int token = tile * kTile + row;
        const uint32_t scale = scale_of_block<F>(x, n, g, unit.side.format.four_over_six);
        store_block_scale<F>(map, unit.scales, token, block, scale);
        saturated += encode_numbers<F>(map, x, 1, n, token, block * length, scale, g, tile, s.out);
      }
    }
    __syncthreads();
    auto* to = reinterpret_cast<uint32_t*>(unit.codes) + tile * num_words;
    for (int i = threadIdx.x; i < num_words; i += blockDim.x) to[i] = s.out[i];
  }
  if (saturated > 0) atomicAdd(&counters->saturated, static_cast<unsigned long long>(saturated));
}

__device__ inline void close_general(const CloseUnit& unit, std::byte* shared,
                                     EncodeCounters* counters) {
  const GeneralScratch scratch(shared, unit.side.map.head_dim);
  switch (unit.side.map.base) {
#define KVANT_FORMAT(number, Type, header)                    \
  case formats::FormatId::k##Type:                            \
    close_general_as<formats::Type>(unit, scratch, counters); \
    break;
#include "kvant/formats/formats.def"
#undef KVANT_FORMAT
  }
}

}  // namespace kvant::backend::cuda::quant
