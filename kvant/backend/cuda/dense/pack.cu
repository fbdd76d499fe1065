// File blocks to tiles, and tiles to rows of BF16.
#include <algorithm>

#include "kvant/backend/cuda/dense/file_blocks.cuh"
#include "kvant/backend/cuda/dense/product.h"
#include "kvant/backend/cuda/dense/product_tiles.cuh"
#include "kvant/backend/cuda/launch.h"
#include "kvant/backend/cuda/status.h"

namespace kvant::backend::cuda {
namespace {

struct Bf16Pieces {
  Bf16Piece piece[kMaxProductTargets];
};

// A warp a tile, a row of the grid a piece; rows and steps of a tile as in the product.
template <WeightType kType>
__global__ void to_bf16_kernel(const __grid_constant__ Bf16Pieces pieces) {
  ptx::launch_dependents();
  const Bf16Piece& piece = pieces.piece[blockIdx.y];
  const WeightTiles& w = piece.weights;
  const int lane = threadIdx.x % 32;
  const int64_t at = blockIdx.x * int64_t{blockDim.x / 32} + threadIdx.x / 32;
  const int64_t strip = piece.first_row / kStripRows + at / w.num_tiles();
  const int64_t tile = at % w.num_tiles();
  if (strip * kStripRows >= piece.first_row + piece.num_rows) return;
  typename TileOf<kType>::Type raw;
  raw.load(typename TileOf<kType>::Source(w, strip, static_cast<int>(tile), lane));
  float row_scales[2] = {1.0f, 1.0f};
  if constexpr (kRowScaled<kType>) {
    for (int r = 0; r < 2; ++r) {
      row_scales[r] = *row_scale<kType>(w, w.data, strip, lane / 4 + 8 * r);
    }
  }
  ptx::wait_prerequisites();  // the product before has read what is written here
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    uint32_t word[4];
    if constexpr (kAsBytes<kType>) {
      const RowScales scales = raw.row_scales(s);
      uint32_t codes[4];
      raw.codes(s, codes);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        word[i] = ptx::bf16x2_of_f32(
            fmaf(scales.scale[i % 2], low_bf16(codes[i]), scales.offset[i % 2]),
            fmaf(scales.scale[i % 2], high_bf16(codes[i]), scales.offset[i % 2]));
      }
    } else {
      uint32_t rest[4];
      raw.operands(s, word, rest);
    }
    if constexpr (kRowScaled<kType>) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        word[i] = ptx::bf16x2_of_f32(row_scales[i % 2] * (kOfE4m3Codes * low_bf16(word[i])),
                                     row_scales[i % 2] * (kOfE4m3Codes * high_bf16(word[i])));
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = strip * kStripRows + lane / 4 + 8 * r - piece.first_row;
      if (row >= piece.num_rows) continue;
      const int64_t place = row * w.padded_cols() + tile * kTileCols + input_of<kType>(s, lane % 4);
      *reinterpret_cast<uint2*>(piece.out + place) = make_uint2(word[r], word[r + 2]);
    }
  }
}

__device__ void put_u16(uint8_t* at, uint32_t bits) {
  *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(bits);
}

// Scales of rows g and g + 8 in one tile, by the thread of row `r` of the pair.
template <WeightType kType>
__device__ void pack_scales(const WeightTiles& w, uint8_t* strip, int64_t tile, int g, int r,
                            const uint8_t* row) {
  using Block = FileBlock<kType>;
  constexpr TileBytes kBytes = tile_bytes(kType);
  const StripPlanes planes(kBytes, static_cast<int>(w.num_tiles()));
  uint8_t* at = strip + planes.scales + tile * kBytes.scales + g * (kBytes.scales / 8);
  uint8_t* super =
      strip + planes.super + tile / kGroupTiles * kBytes.super + g * (kBytes.super / 8);
  for (int b = 0; b < 2; ++b) {
    const int64_t input = tile * kTileCols + 32 * b;
    if (row == nullptr || input >= w.cols) continue;  // zeros: memory is clear
    const uint8_t* block = row + input / Block::kElements * Block::kBytes;
    if constexpr (kBytes.super == 0) {
      constexpr int kNumbers = kHasOffset<kType> ? 2 : 1;
      for (int i = 0; i < kNumbers; ++i) {
        put_u16(at + ((r * 2 + b) * kNumbers + i) * 2, byte_pair(block + 2 * i));
      }
    } else if constexpr (kType == WeightType::kQ6_K) {
      const int first = static_cast<int>(input % 256) / 16;
      for (int i = 0; i < 2; ++i) at[4 * r + 2 * b + i] = block[192 + first + i];
      put_u16(super + 2 * r, byte_pair(block + 208));
    } else {
      int scale, minimum;
      scale_and_minimum(block + 4, static_cast<int>(input % 256) / 32, &scale, &minimum);
      at[4 * r + 2 * b] = static_cast<uint8_t>(scale);
      at[4 * r + 2 * b + 1] = static_cast<uint8_t>(minimum);
      for (int i = 0; i < 2; ++i) put_u16(super + 4 * r + 2 * i, byte_pair(block + 2 * i));
    }
  }
}

// A thread a lane of a tile.
template <WeightType kType>
__global__ void pack_kernel(WeightTiles w, int64_t first_strip, int64_t num_strips,
                            int64_t row_bytes, const uint8_t* file_rows, uint8_t* out) {
  using Block = FileBlock<kType>;
  constexpr TileBytes kBytes = tile_bytes(kType);
  constexpr int64_t kHead = formats::row_head_bytes(kType);
  const int lane = threadIdx.x % 32;
  const int64_t at = blockIdx.x * int64_t{blockDim.x / 32} + threadIdx.x / 32;
  const int64_t tile = at % w.num_tiles();
  const int64_t local = at / w.num_tiles();
  if (local >= num_strips) return;
  const StripPlanes planes(kBytes, static_cast<int>(w.num_tiles()));
  uint8_t* strip = out + (first_strip + local) * planes.bytes;
  const uint8_t* rows[2];
  for (int r = 0; r < 2; ++r) {
    const int64_t row = local * kStripRows + lane / 4 + 8 * r;
    const bool exists = first_strip * kStripRows + row < w.rows;
    rows[r] = exists ? file_rows + row * row_bytes + kHead : nullptr;
  }
  uint32_t low[8] = {};
  uint32_t high[2] = {};
  for (int s = 0; s < 4; ++s) {
    for (int i = 0; i < 4; ++i) {
      for (int h = 0; h < 2; ++h) {
        const uint8_t* row = rows[i % 2];
        const int64_t input = tile * kTileCols + s * 16 + lane % 4 * 4 + i / 2 * 2 + h;
        int code = 0;
        if (row != nullptr && input < w.cols) {
          code = Block::code(row + input / Block::kElements * Block::kBytes,
                             static_cast<int>(input % Block::kElements));
        }
        const auto bits = static_cast<uint32_t>(code);
        const int byte = 8 * (i / 2) + 16 * h;
        if constexpr (kBytes.low == 1024) {
          low[2 * s + i % 2] |= (bits & 255) << byte;
        } else {
          low[s] |= (bits & 15) << (byte + 4 * (i % 2));
          if constexpr (kBytes.high == 128) high[0] |= (bits >> 4 & 1) << (byte + 2 * s + i % 2);
          if constexpr (kBytes.high == 256) {
            high[s / 2] |= (bits >> 4 & 3) << (byte + 4 * (s % 2) + 2 * (i % 2));
          }
        }
      }
    }
  }
  if constexpr (kRowScaled<kType>) {
    for (uint32_t& word : low) word = e4m3_word(word);
  }
  for (int i = 0; i < kBytes.low / 512; ++i) {
    *reinterpret_cast<uint4*>(strip + tile * kBytes.low + i * 512 + lane * 16) =
        make_uint4(low[4 * i], low[4 * i + 1], low[4 * i + 2], low[4 * i + 3]);
  }
  for (int i = 0; i < kBytes.high / 128; ++i) {
    uint8_t* place = strip + planes.high + tile * kBytes.high + lane * (kBytes.high / 32) + 4 * i;
    *reinterpret_cast<uint32_t*>(place) = high[i];
  }
  const int r = lane % 4;
  if constexpr (kRowScaled<kType>) {
    if (r < 2 && tile == 0 && rows[r] != nullptr) {  // else zero: memory is clear
      auto* const scales = reinterpret_cast<float*>(strip + planes.rows);
      scales[lane / 4 + 8 * r] = row_head_scale(rows[r] - kHead);
    }
  } else {
    if (r < 2) pack_scales<kType>(w, strip, tile, lane / 4, r, rows[r]);
  }
}

unsigned blocks_of_warps(int64_t warps) {
  return static_cast<unsigned>((warps + 7) / 8);
}

}  // namespace

Status dequantize_to_bf16(std::span<const Bf16Piece> pieces, cudaStream_t stream) {
  Bf16Pieces all = {};
  int64_t most_tiles = 0;
  for (size_t i = 0; i < pieces.size(); ++i) {
    all.piece[i] = pieces[i];
    const int64_t num_strips = (pieces[i].num_rows + kStripRows - 1) / kStripRows;
    most_tiles = std::max(most_tiles, num_strips * pieces[i].weights.num_tiles());
  }
  const dim3 grid(blocks_of_warps(most_tiles), static_cast<unsigned>(pieces.size()));
  return for_weight_type<WeightTag>(pieces[0].weights.type, [&](auto tag) {
    return launch_overlapped("dequantize_to_bf16", to_bf16_kernel<decltype(tag)::kValue>,
                             {grid, 256, 0, stream}, all);
  });
}

Status pack_tiles(const WeightTiles& weights, int64_t first_strip, int64_t num_strips,
                  const uint8_t* file_rows, cudaStream_t stream) {
  const int64_t row_bytes = formats::weight_bytes(weights.type, weights.cols);
  for_weight_type<WeightTag>(weights.type, [&](auto tag) {
    constexpr WeightType kType = decltype(tag)::kValue;
    if constexpr (is_tiled(kType)) {
      pack_kernel<kType><<<blocks_of_warps(num_strips * weights.num_tiles()), 256, 0, stream>>>(
          weights, first_strip, num_strips, row_bytes, file_rows,
          const_cast<uint8_t*>(weights.data));
    }
  });
  return launch_status("pack_tiles");
}

}  // namespace kvant::backend::cuda
