// Reads tiles of weights (weight_tiles.h) as operands of mma.m16n8k16 with BF16 inputs: codes are
// integers below 256 in magnitude and so exact in BF16; scales are applied to fp32 sums.
//
// Lane 4 g + c holds of step s: register i, half h = row g + 8 (i % 2), input 16 s + 4 c +
// 2 (i / 2) + h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kvant/backend/cuda/dense/weight_tiles.h"
#include "kvant/backend/cuda/ptx.cuh"
#include "kvant/formats/weight_types.h"

namespace kvant::backend::cuda {

using formats::WeightType;

// What is added to a code to make it unsigned.
template <WeightType kType>
inline constexpr int kCodeBias = kType == WeightType::kQ4_0   ? 8
                                 : kType == WeightType::kQ5_0 ? 16
                                 : kType == WeightType::kQ6_K ? 32
                                 : kType == WeightType::kQ8_0 ? 128
                                                              : 0;
template <WeightType kType>
inline constexpr bool kHasOffset = kType == WeightType::kQ4_1 || kType == WeightType::kQ5_1 ||
                                   kType == WeightType::kQ4_K || kType == WeightType::kQ5_K;
template <WeightType kType>
inline constexpr int kScaleSteps = kType == WeightType::kQ6_K ? 1 : 2;  // steps that share a scale

template <WeightType kType>
inline constexpr bool kTiled = is_tiled(kType);

__device__ inline float low_bf16(uint32_t word) {
  return __uint_as_float(word << 16);
}
__device__ inline float high_bf16(uint32_t word) {
  return __uint_as_float(word & 0xffff0000u);
}

// c += a b, or c = a b; a 16 x 16, b 16 x 8, c 16 x 8.
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    bool fresh = false) {
  const float zero = 0.0f;
  if (fresh) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %10, %10, %10};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(zero));
    return;
  }
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// (x & mask) | bits, in one instruction.
__device__ inline uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(x), "r"(mask), "r"(bits));
  return out;
}

// Weights are read once: past L1, which holds the activations.
template <typename T>
__device__ inline T load_once(const uint8_t* p) {
  return __ldcs(reinterpret_cast<const T*>(p));
}

// The scale and offset of a sub-block for rows g and g + 8.
struct RowScales {
  float scale[2];
  float offset[2];
};

__device__ inline float2 half_pair(uint32_t word) {
  __half2 pair;
  memcpy(&pair, &word, 4);
  return __half22float2(pair);
}
// Bytes as floats: 2^23 + byte in the low byte of a float, minus 2^23. `kOffset` is subtracted too.
template <int kOffset = 0>
__device__ inline float byte_of(uint32_t word, int i) {
  return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + i)) -
         static_cast<float>(8388608 + kOffset);
}

// Where a lane reads what of a strip; at a pair of tiles.
template <WeightType kType>
struct TileSource {
  static constexpr TileBytes kBytes = tile_bytes(kType);
  const uint8_t* low;
  const uint8_t* high;
  const uint8_t* scales;
  const uint8_t* super;

  __device__ TileSource(const WeightTiles& w, int64_t strip, int tile, int lane) {
    const StripPlanes planes(kBytes, static_cast<int>(w.num_tiles()));
    const uint8_t* first = w.data + strip * planes.bytes;
    const int g = lane / 4;
    low = first + tile * kBytes.low + lane * 16;
    high = first + planes.high + tile * kBytes.high + lane * (kBytes.high / 32);
    scales = first + planes.scales + tile * kBytes.scales + g * (kBytes.scales / 8);
    super = first + planes.super + tile / kGroupTiles * kBytes.super + g * (kBytes.super / 8);
  }
  // By whole groups of tiles.
  __device__ void advance(int tiles) {
    low += tiles * kBytes.low;
    high += tiles * kBytes.high;
    scales += tiles * kBytes.scales;
    super += tiles / kGroupTiles * kBytes.super;
  }
};

// Everything of one tile that a lane needs, as loaded.
template <WeightType kType>
struct RawTile {
  static constexpr TileBytes kBytes = tile_bytes(kType);
  uint4 low[kBytes.low / 512];
  uint32_t high[kBytes.high > 0 ? kBytes.high / 128 : 1];
  uint32_t scales[kBytes.scales / 32];
  uint32_t super[kBytes.super > 0 ? kBytes.super / 32 : 1];

  // Tile i of the pair.
  __device__ void load(const TileSource<kType>& source, int i) {
#pragma unroll
    for (int part = 0; part < kBytes.low / 512; ++part) {
      low[part] = load_once<uint4>(source.low + i * kBytes.low + part * 512);
    }
    if constexpr (kBytes.high == 128) high[0] = load_once<uint32_t>(source.high + i * kBytes.high);
    if constexpr (kBytes.high == 256) {
      const auto words = load_once<uint2>(source.high + i * kBytes.high);
      high[0] = words.x;
      high[1] = words.y;
    }
    if constexpr (kBytes.scales == 64) {
      const auto words = load_once<uint2>(source.scales + i * kBytes.scales);
      scales[0] = words.x;
      scales[1] = words.y;
    } else {
      const auto words = load_once<uint4>(source.scales + i * kBytes.scales);
      scales[0] = words.x;
      scales[1] = words.y;
      scales[2] = words.z;
      scales[3] = words.w;
    }
    if constexpr (kBytes.super == 32) super[0] = load_once<uint32_t>(source.super);
    if constexpr (kBytes.super == 64) {
      const auto words = load_once<uint2>(source.super);
      super[0] = words.x;
      super[1] = words.y;
    }
  }

  // Codes of step s as BF16 integers.
  __device__ void codes(int s, uint32_t (&a)[4]) const {
    if constexpr (kType == WeightType::kQ8_0) {
      const uint4& words = low[s / 2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t word =
            s % 2 == 0 ? (i < 2 ? words.x : words.y) : (i < 2 ? words.z : words.w);
        a[i] = ptx::bf16x2_of_f32(byte_of<128>(word, 2 * (i % 2)),
                                  byte_of<128>(word, 2 * (i % 2) + 1));
      }
    } else {
      const uint32_t word = s == 0 ? low[0].x : s == 1 ? low[0].y : s == 2 ? low[0].z : low[0].w;
      __nv_bfloat162 bias;
      const uint32_t bias_bits = 0x43004300u + 0x00010001u * kCodeBias<kType>;  // 128 + bias
      memcpy(&bias, &bias_bits, 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // 128 + code in BF16: the code is the low mantissa bits.
        uint32_t bits = and_or(word >> (4 * i), 0x000f000fu, 0x43004300u);
        if constexpr (kBytes.high == 128) {
          const int shift = 4 * s + i - 4;
          bits = and_or(shift >= 0 ? high[0] >> shift : high[0] << -shift, 0x00100010u, bits);
        }
        if constexpr (kBytes.high == 256) {
          const int shift = 2 * (4 * (s % 2) + i) - 4;
          const uint32_t pairs = high[s / 2];
          bits = and_or(shift >= 0 ? pairs >> shift : pairs << -shift, 0x00300030u, bits);
        }
        __nv_bfloat162 pair;
        memcpy(&pair, &bits, 4);
        pair = __hsub2(pair, bias);
        memcpy(&a[i], &pair, 4);
      }
    }
  }

  // Of the sub-block that step s is in.
  __device__ RowScales row_scales(int s) const {
    RowScales out = {};
    const int block = s / 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if constexpr (kType == WeightType::kQ4_0 || kType == WeightType::kQ5_0 ||
                    kType == WeightType::kQ8_0) {
        const float2 d = half_pair(scales[r]);
        out.scale[r] = block == 0 ? d.x : d.y;
      } else if constexpr (kType == WeightType::kQ4_1 || kType == WeightType::kQ5_1) {
        const float2 d = half_pair(scales[2 * r + block]);
        out.scale[r] = d.x;
        out.offset[r] = d.y;
      } else if constexpr (kType == WeightType::kQ6_K) {
        const float2 d = half_pair(super[0]);
        out.scale[r] = (r == 0 ? d.x : d.y) * byte_of<128>(scales[r] ^ 0x80808080u, s);
      } else {
        const float2 d = half_pair(super[r]);
        out.scale[r] = d.x * byte_of(scales[r], 2 * block);
        out.offset[r] = -(d.y * byte_of(scales[r], 2 * block + 1));
      }
    }
    return out;
  }
};

// Where the inputs of step s of lane c lie in a tile: rows of 2-byte floats are read 16 bytes at a
// time.
template <WeightType kType>
__device__ int input_of(int s, int c) {
  if (kType == WeightType::kBF16 || kType == WeightType::kF16) {
    return s / 2 * 32 + c * 8 + s % 2 * 4;
  }
  return s * 16 + c * 4;
}

// Rows g and g + 8 of a strip of floats; the last row stands for those that are not there.
template <WeightType kType>
struct FloatSource {
  static constexpr int kElementBytes = kType == WeightType::kF32 ? 4 : 2;
  const uint8_t* rows[2];

  __device__ FloatSource(const WeightTiles& w, int64_t strip, int tile, int lane) {
    for (int r = 0; r < 2; ++r) {
      const int64_t row = min(strip * kStripRows + lane / 4 + 8 * r, w.rows - 1);
      rows[r] = w.data + (row * w.padded_cols() + tile * kTileCols) * kElementBytes + lane % 4 * 16;
    }
  }
  __device__ void advance(int tiles) {
    for (auto& row : rows) row += tiles * kTileCols * kElementBytes;
  }
};

// Float weights of a lane for one tile: two matrix operands whose sum is the value (the second is
// zero for BF16, exact for F16, and leaves 2^-17 of F32).
template <WeightType kType>
struct FloatTile {
  static constexpr int kWords = kType == WeightType::kF32 ? 4 : 2;  // of 16 bytes, a row
  static constexpr int kElementBytes = kType == WeightType::kF32 ? 4 : 2;
  uint4 raw[2][kWords];

  // Tile i of the pair.
  __device__ void load(const FloatSource<kType>& source, int i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int part = 0; part < kWords; ++part) {
        raw[r][part] = load_once<uint4>(source.rows[r] + i * kTileCols * kElementBytes + part * 64);
      }
    }
  }
  // Values 2 * p and 2 * p + 1 of step s in row r.
  __device__ float2 values(int r, int s, int p) const {
    if constexpr (kType == WeightType::kF32) {
      const uint4& v = raw[r][s];
      return p == 0 ? make_float2(__uint_as_float(v.x), __uint_as_float(v.y))
                    : make_float2(__uint_as_float(v.z), __uint_as_float(v.w));
    } else {
      return half_pair(word(r, s, p));
    }
  }
  __device__ uint32_t word(int r, int s, int p) const {
    const uint4& v = raw[r][s / 2];
    return s % 2 == 0 ? (p == 0 ? v.x : v.y) : (p == 0 ? v.z : v.w);
  }
  __device__ void operands(int s, uint32_t (&high)[4], uint32_t (&low)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kType == WeightType::kBF16) {
        high[i] = word(i % 2, s, i / 2);
        low[i] = 0;
      } else {
        const float2 v = values(i % 2, s, i / 2);
        high[i] = ptx::bf16x2_of_f32(v.x, v.y);
        low[i] = ptx::bf16x2_of_f32(v.x - low_bf16(high[i]), v.y - high_bf16(high[i]));
      }
    }
  }
};

template <WeightType kType>
struct TileOf {
  using Type = RawTile<kType>;
  using Source = TileSource<kType>;
};
template <>
struct TileOf<WeightType::kF32> {
  using Type = FloatTile<WeightType::kF32>;
  using Source = FloatSource<WeightType::kF32>;
};
template <>
struct TileOf<WeightType::kF16> {
  using Type = FloatTile<WeightType::kF16>;
  using Source = FloatSource<WeightType::kF16>;
};
template <>
struct TileOf<WeightType::kBF16> {
  using Type = FloatTile<WeightType::kBF16>;
  using Source = FloatSource<WeightType::kBF16>;
};

}  // namespace kvant::backend::cuda
