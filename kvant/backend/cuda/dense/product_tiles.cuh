// Reads tiles of weights (weight_tiles.h) as operands of mma.m16n8k16 with BF16 inputs: codes are
// integers below 256 in magnitude, or E4M3, and so exact in BF16; scales are applied to fp32 sums.
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

// Codes with a sign are stored in two's complement; this is the weight of their sign bit. 0: codes
// without a sign.
template <WeightType kType>
inline constexpr int kSignBit = kType == WeightType::kQ4_0   ? 8
                                : kType == WeightType::kQ5_0 ? 16
                                : kType == WeightType::kQ6_K ? 32
                                : kType == WeightType::kQ8_0 ? 128
                                                             : 0;
template <WeightType kType>
inline constexpr bool kHasOffset = kType == WeightType::kQ4_1 || kType == WeightType::kQ5_1 ||
                                   kType == WeightType::kQ4_K || kType == WeightType::kQ5_K;
// Codes with a sign are in the upper bits of their bytes where they are multiplied.
template <WeightType kType>
inline constexpr int kCodeShift = kType == WeightType::kQ4_0   ? 4
                                  : kType == WeightType::kQ5_0 ? 3
                                  : kType == WeightType::kQ6_K ? 2
                                                               : 0;
template <WeightType kType>
inline constexpr int kScaleSteps = kType == WeightType::kQ6_K ? 1 : 2;  // steps that share a scale

template <WeightType kType>
inline constexpr bool kTiled = is_tiled(kType);
// Codes that have one scale for all of a row, which is applied to its sum.
template <WeightType kType>
inline constexpr bool kRowScaled = tile_bytes(kType).rows > 0;
// Weights that are multiplied as bytes of whole numbers; the others are as BF16 numbers.
template <WeightType kType>
inline constexpr bool kAsBytes = kTiled<kType> && !kRowScaled<kType>;
// Weights that are two BF16 numbers each.
template <WeightType kType>
inline constexpr bool kTwoParts = kType == WeightType::kF32 || kType == WeightType::kF16;

__device__ inline float low_bf16(uint32_t word) {
  return __uint_as_float(word << 16);
}
__device__ inline float high_bf16(uint32_t word) {
  return __uint_as_float(word & 0xffff0000u);
}

// (x & mask) ^ bits, in one instruction.
__device__ inline uint32_t and_xor(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(out) : "r"(x), "r"(mask), "r"(bits));
  return out;
}
// Left where n is positive, right where it is negative.
__device__ constexpr uint32_t shift_left(uint32_t x, int n) {
  return n >= 0 ? x << n : x >> -n;
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

// Of row `in_strip` of a strip, where rows have a scale; `data` of a matrix that looks like w.
template <WeightType kType>
__device__ const float* row_scale(const WeightTiles& w, const uint8_t* data, int64_t strip,
                                  int in_strip) {
  const StripPlanes planes(tile_bytes(kType), static_cast<int>(w.num_tiles()));
  return reinterpret_cast<const float*>(data + strip * planes.bytes + planes.rows) + in_strip;
}

// Where a lane reads what of a tile.
struct TilePlaces {
  const uint8_t* low;
  const uint8_t* high;
  const uint8_t* scales;
  const uint8_t* super;
};

// Of tile `tile` of planes that begin at `planes`.
template <WeightType kType>
__device__ inline TilePlaces lane_places(const TilePlaces& planes, int tile, int lane) {
  constexpr TileBytes kBytes = tile_bytes(kType);
  const int g = lane / 4;
  return {planes.low + tile * kBytes.low + lane * 16,
          planes.high + tile * kBytes.high + lane * (kBytes.high / 32),
          planes.scales + tile * kBytes.scales + g * (kBytes.scales / 8),
          planes.super + tile / kGroupTiles * kBytes.super + g * (kBytes.super / 8)};
}

// In a strip.
template <WeightType kType>
struct TileSource : TilePlaces {
  static constexpr TileBytes kBytes = tile_bytes(kType);

  __device__ TileSource(const WeightTiles& w, int64_t strip, int tile, int lane) {
    const StripPlanes planes(kBytes, static_cast<int>(w.num_tiles()));
    const uint8_t* first = w.data + strip * planes.bytes;
    const int g = lane / 4;
    low = first + tile * kBytes.low + lane * 16;
    high = first + planes.high + tile * kBytes.high + lane * (kBytes.high / 32);
    scales = first + planes.scales + tile * kBytes.scales + g * (kBytes.scales / 8);
    super = first + planes.super + tile / kGroupTiles * kBytes.super + g * (kBytes.super / 8);
  }
};

// ---- stages: what a warp copies to shared memory for itself at a time ----

// A warp takes units of so many tiles of a strip: the order of a sum.
template <WeightType kType>
inline constexpr int kUnitTiles = kTiled<kType>&& tile_bytes(kType).low == 512 &&
                                          tile_bytes(kType).high == 0
                                      ? 4
                                      : 2;

// Codes: a unit; its planes behind each other, low codes first.
template <WeightType kType, bool kIsTiled = kTiled<kType>>
struct Stage {
  static constexpr TileBytes kTile = tile_bytes(kType);
  static constexpr int kTiles = kUnitTiles<kType>;
  static constexpr int kLow = kTiles * kTile.low;
  static constexpr int kHigh = kTiles * kTile.high;
  static constexpr int kScales = kTiles * kTile.scales;
  static constexpr int kBytes = kLow + kHigh + kScales + kTile.super;
  static constexpr int kHighAt = kLow;
  static constexpr int kScalesAt = kHighAt + kHigh;
  static constexpr int kSuperAt = kScalesAt + kScales;

  // Tile i of the unit, of a lane.
  static __device__ TilePlaces places(const uint8_t* stage, int i, int lane) {
    const int g = lane / 4;
    return {stage + i * kTile.low + lane * 16,
            stage + kHighAt + i * kTile.high + lane * (kTile.high / 32),
            stage + kScalesAt + i * kTile.scales + g * (kTile.scales / 8),
            stage + kSuperAt + g * (kTile.super / 8)};
  }

  // A lane's chunks of 16 bytes of the units of one strip: of the first plane, 512 bytes apart, and
  // one of what follows, which is at most 512 bytes (512 of high codes are a chunk more).
  struct Source {
    static constexpr int kChunks = kLow / 512;
    static constexpr int kSmallHigh = kHigh == 512 ? 0 : kHigh;
    static constexpr int kRest = kSmallHigh + kScales + kTile.super;
    const uint8_t* low;
    const uint8_t* high;
    const uint8_t* rest;
    int rest_group;  // bytes of the rest's plane for four tiles

    __device__ void locate(const WeightTiles&, const uint8_t* data, int64_t stride,
                           int64_t strip_index, int num_tiles, int tile, int lane) {
      const StripPlanes planes(kTile, num_tiles);
      const uint8_t* strip = data + strip_index * stride;
      const int at = lane * 16;
      low = strip + tile * kTile.low + at;
      if constexpr (kHigh == 512) high = strip + planes.high + tile * kTile.high + at;
      if constexpr (kScales == 0) return;
      if (at < kSmallHigh) {
        rest = strip + planes.high + tile * kTile.high + at;
        rest_group = kGroupTiles * kTile.high;
      } else if (at < kSmallHigh + kScales) {
        rest = strip + planes.scales + tile * kTile.scales + (at - kSmallHigh);
        rest_group = kGroupTiles * kTile.scales;
      } else {
        rest =
            strip + planes.super + tile / kGroupTiles * kTile.super + (at - kSmallHigh - kScales);
        rest_group = kTile.super;
      }
    }
    // `tiles`: a multiple of kGroupTiles.
    __device__ void advance(int tiles) {
      low += tiles * kTile.low;
      if constexpr (kHigh == 512) high += tiles * kTile.high;
      if constexpr (kScales > 0) rest += tiles / kGroupTiles * rest_group;
    }
    // The tiles that are there of those from `tile` on, where it has come to; `target` and `lane`
    // in bytes of shared memory and lanes.
    __device__ void copy(uint32_t target, int num_tiles, int tile, int lane) const {
      const int at = lane * 16;
      const int there = num_tiles - tile;  // at least two
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        if (i * kTiles / kChunks < 2 || i * kTiles / kChunks < there)
          ptx::copy_16(target + at + i * 512, low + i * 512);
      }
      if constexpr (kHigh == 512) ptx::copy_16(target + kHighAt + at, high);
      if constexpr (kScales == 0) return;
      bool exists = at < kRest;
      if constexpr (kTiles > 2)
        exists = exists && (at >= kSmallHigh + kScales || at - kSmallHigh < there * kTile.scales);
      if (exists) ptx::copy_16(target + kBytes - kRest + at, rest);
    }
  };
};

// Floats: a tile; 16 bytes of rows g and g + 8 a lane.
template <WeightType kType>
struct Stage<kType, false> {
  static constexpr int kTiles = 1;
  static constexpr int kElementBytes = kType == WeightType::kF32 ? 4 : 2;
  static constexpr int kWords = kElementBytes;  // of 16 bytes, a row and lane
  static constexpr int kBytes = kStripRows * kTileCols * kElementBytes;

  struct Source {
    const uint8_t* rows[2];

    // `stride`: of a row.
    __device__ void locate(const WeightTiles& w, const uint8_t* data, int64_t stride,
                           int64_t strip_index, int /*num_tiles*/, int tile, int lane) {
      for (int r = 0; r < 2; ++r) {  // the last row stands for those that are not there
        const int64_t row = min(strip_index * kStripRows + lane / 4 + 8 * r, w.rows - 1);
        rows[r] = data + row * stride + tile * kTileCols * kElementBytes + lane % 4 * 16;
      }
    }
    __device__ void advance(int tiles) {
      for (const uint8_t*& row : rows) row += tiles * kTileCols * kElementBytes;
    }
    __device__ void copy(uint32_t target, int /*num_tiles*/, int /*tile*/, int lane) const {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int word = 0; word < kWords; ++word) {
          ptx::copy_16(target + (r * kWords + word) * 512 + lane * 16, rows[r] + word * 64);
        }
      }
    }
  };
};

// ---- tiles in registers ----

// Everything of one tile that a lane needs, as loaded.
template <WeightType kType>
struct RawTile {
  static constexpr TileBytes kBytes = tile_bytes(kType);
  uint4 low[kBytes.low / 512];
  uint32_t high[kBytes.high > 0 ? kBytes.high / 128 : 1];
  uint32_t scales[kBytes.scales / 32];
  uint32_t super[kBytes.super > 0 ? kBytes.super / 32 : 1];

  __device__ void load(const TileSource<kType>& source) { load_from<true>(source); }
  // From shared memory.
  __device__ void load_shared(const TilePlaces& at) { load_from<false>(at); }
  __device__ void load_stage(const uint8_t* stage, int i, int lane) {
    load_shared(Stage<kType>::places(stage, i, lane));
  }

  // Codes of steps 2 b and 2 b + 1 as bytes, left operand of m16n8k32; of Q6_K of step b, of
  // m16n8k16. They are kCodeFactor times the codes.
  template <int kRegisters>
  __device__ void bytes(int b, uint32_t (&a)[kRegisters]) const {
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) a[i] = row_bytes(b * kRegisters / 2 + i / 2, i % 2);
  }

  // Codes of step s as BF16 integers.
  __device__ void codes(int s, uint32_t (&a)[4]) const {
    if constexpr (kType == WeightType::kQ8_0) {
      const uint4& words = low[s / 2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t word =
            s % 2 == 0 ? (i % 2 == 0 ? words.x : words.y) : (i % 2 == 0 ? words.z : words.w);
        a[i] = ptx::bf16x2_of_f32(byte_of<128>(word ^ 0x80808080u, i / 2),
                                  byte_of<128>(word ^ 0x80808080u, i / 2 + 2));
      }
    } else {
      const uint32_t word = s == 0 ? low[0].x : s == 1 ? low[0].y : s == 2 ? low[0].z : low[0].w;
      constexpr uint32_t kBias = 0x43004300u + 0x00010001u * kSignBit<kType>;  // 128 + sign bit
      __nv_bfloat162 bias;
      memcpy(&bias, &kBias, 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // 128 + code in BF16: the code is the low mantissa bits.
        uint32_t bits = and_xor(word >> (4 * i), 0x000f000fu, kBias);
        const int row = i % 2;
        const int byte = 8 * (i / 2);
        if constexpr (kBytes.high == 128) {
          bits = and_xor(shift_left(high[0], 4 - byte - 2 * s - row), 0x00100010u, bits);
        }
        if constexpr (kBytes.high == 256) {
          bits =
              and_xor(shift_left(high[s / 2], 4 - byte - 4 * (s % 2) - 2 * row), 0x00300030u, bits);
        }
        __nv_bfloat162 pair;
        memcpy(&pair, &bits, 4);
        pair = __hsub2(pair, bias);
        memcpy(&a[i], &pair, 4);
      }
    }
  }

  // Of the sub-block that step s is in; they belong to codes.
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

 private:
  template <bool kOnce, typename T>
  static __device__ T get(const uint8_t* p) {
    if constexpr (kOnce) return load_once<T>(p);
    return *reinterpret_cast<const T*>(p);
  }
  template <bool kOnce>
  __device__ void load_from(const TilePlaces& at) {
#pragma unroll
    for (int part = 0; part < kBytes.low / 512; ++part) {
      low[part] = get<kOnce, uint4>(at.low + part * 512);
    }
    if constexpr (kBytes.high == 128) high[0] = get<kOnce, uint32_t>(at.high);
    if constexpr (kBytes.high == 256) {
      const auto words = get<kOnce, uint2>(at.high);
      high[0] = words.x;
      high[1] = words.y;
    }
    if constexpr (kBytes.scales == 64) {
      const auto words = get<kOnce, uint2>(at.scales);
      scales[0] = words.x;
      scales[1] = words.y;
    } else {
      const auto words = get<kOnce, uint4>(at.scales);
      scales[0] = words.x;
      scales[1] = words.y;
      scales[2] = words.z;
      scales[3] = words.w;
    }
    if constexpr (kBytes.super == 32) super[0] = get<kOnce, uint32_t>(at.super);
    if constexpr (kBytes.super == 64) {
      const auto words = get<kOnce, uint2>(at.super);
      super[0] = words.x;
      super[1] = words.y;
    }
  }

  // The four inputs of step s in row g + 8 r.
  __device__ uint32_t row_bytes(int s, int r) const {
    if constexpr (kType == WeightType::kQ8_0) {
      const uint4& words = low[s / 2];
      return s % 2 == 0 ? (r == 0 ? words.x : words.y) : (r == 0 ? words.z : words.w);
    } else {
      const uint32_t word = s == 0 ? low[0].x : s == 1 ? low[0].y : s == 2 ? low[0].z : low[0].w;
      constexpr int kPlace = kCodeShift<kType>;  // of the lowest bit
      const uint32_t nibbles = shift_left(word, kPlace - 4 * r) & (0x0f0f0f0fu << kPlace);
      if constexpr (kBytes.high == 128) {
        return and_xor(shift_left(high[0], kPlace + 4 - 2 * s - r), 0x10101010u << kPlace, nibbles);
      } else if constexpr (kBytes.high == 256) {
        return and_xor(shift_left(high[s / 2], kPlace + 4 - 4 * (s % 2) - 2 * r),
                       0x30303030u << kPlace, nibbles);
      } else {
        return nibbles;
      }
    }
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
};

// Float weights of a lane for one tile: two matrix operands whose sum is the value (the second is
// zero for BF16, exact for F16, and leaves 2^-17 of F32).
template <WeightType kType>
struct FloatTile {
  static constexpr int kWords = kType == WeightType::kF32 ? 4 : 2;  // of 16 bytes, a row
  static constexpr int kElementBytes = kType == WeightType::kF32 ? 4 : 2;
  uint4 raw[2][kWords];

  __device__ void load(const FloatSource<kType>& source) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int part = 0; part < kWords; ++part) {
        raw[r][part] = load_once<uint4>(source.rows[r] + part * 64);
      }
    }
  }
  // From shared memory, which has the lane's part of row g + 8 r and `part` at first + r *
  // row_bytes + part * part_bytes.
  __device__ void load_shared(const uint8_t* first, int row_bytes, int part_bytes) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int part = 0; part < kWords; ++part) {
        raw[r][part] = *reinterpret_cast<const uint4*>(first + r * row_bytes + part * part_bytes);
      }
    }
  }
  __device__ void load_stage(const uint8_t* stage, int /*i*/, int lane) {
    load_shared(stage + lane * 16, kWords * 512, 512);
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

// An E4M3 code as exponent and mantissa of a BF16 number is 2^-120 of its value, subnormals
// included. Taking that out of codes would cost an instruction for two; so inputs are multiplied by
// 2^64 when they are made ready (below that in magnitude they stay finite), where their sums are
// far from what fp32 cannot hold, and sums by the rest.
inline constexpr float kOfE4m3Codes = 0x1p120f;
inline constexpr float kOfE4m3Inputs = 0x1p64f;
inline constexpr float kOfE4m3Sums = 0x1p56f;

// Codes of two pairs of inputs in a word: where operands want the bits of the second pair they are,
// sign and magnitude of each half, and between them those of the first: sign and three highest bits
// of the magnitude, and its four lowest.
__device__ inline uint32_t e4m3_word(uint32_t codes) {  // bytes 0, 2: first pair; 1, 3: second
  return (codes & 0x80008000u) | (codes & 0x7f007f00u) >> 4 |  // second
         (codes & 0x00800080u) << 4 | (codes & 0x00700070u) << 8 | (codes & 0x000f000fu);
}

// The first or second pair of a word as BF16 numbers of 2^-120 of their values, exactly.
template <bool kSecond>
__device__ inline uint32_t bf16x2_of_e4m3(uint32_t word) {
  constexpr uint32_t kSecondBits = 0x87f087f0u;
  const uint32_t bits =
      kSecond ? word & kSecondBits : and_xor(word >> 4, 0x07000700u, (word << 4) & 0x80f080f0u);
  return bits;
}

// E4M3 codes of a lane for one tile; their rows' scales are left out.
template <WeightType kType>
struct E4m3Tile {
  static constexpr int kParts = tile_bytes(kType).low / 512;
  uint4 words[kParts];

  __device__ void load(const TileSource<kType>& source) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      words[part] = load_once<uint4>(source.low + part * 512);
    }
  }
  // From shared memory.
  __device__ void load_shared(const TilePlaces& at) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      words[part] = *reinterpret_cast<const uint4*>(at.low + part * 512);
    }
  }
  __device__ void load_stage(const uint8_t* stage, int i, int lane) {
    load_shared(Stage<kType>::places(stage, i, lane));
  }
  __device__ void operands(int s, uint32_t (&high)[4], uint32_t (&low)[4]) const {
    const uint4& v = words[s / 2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t word = s % 2 == 0 ? (r == 0 ? v.x : v.y) : (r == 0 ? v.z : v.w);
      high[r] = bf16x2_of_e4m3<false>(word);
      high[r + 2] = bf16x2_of_e4m3<true>(word);
      low[r] = low[r + 2] = 0;
    }
  }
};

template <WeightType kType>
struct TileOf {
  using Type = RawTile<kType>;
  using Source = TileSource<kType>;
};
template <>
struct TileOf<WeightType::kF8_E4M3> {
  using Type = E4m3Tile<WeightType::kF8_E4M3>;
  using Source = TileSource<WeightType::kF8_E4M3>;
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
