// Reads MMA fragments of pages in `sm90` layout (docs/adr/0004): codes of four k-steps and their
// scales, as fp32.
//
// A lane owns of every k-step eight elements: x[2 r + parity] is register r, half `parity`. For
// keys that is token (lane / 4) + 8 (r % 2), channel 2 (lane % 4) + 8 (r / 2) + parity of the step;
// for values channel (lane / 4) + 8 (r % 2), token 2 (lane % 4) + 8 (r / 2) + parity.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "kvant/backend/cuda/ptx.cuh"
#include "kvant/base/small_floats.h"
#include "kvant/formats/format.h"

namespace kvant::backend::cuda {

using formats::BlockAxis;
using formats::Element;
using formats::FormatInfo;
using formats::Scale;

constexpr int kStepChannels = 16;
constexpr int kPartSteps = 4;  // k-steps of 64 channels

// Words of a lane for the steps [4 part, 4 part + 4) of a tile; `steps` are those of head_dim.
template <int kBits>
struct PartWords {
  static constexpr int kWords = kBits == 3 ? 3 : kBits;
  uint32_t w[kWords];

  __device__ __forceinline__ void load(const uint8_t* tile, int lane, int part, int steps) {
    if constexpr (kBits >= 4) {
      load_chunks(tile, lane, part, steps);
    } else {
      load_pairs(tile, lane, part, steps);
      if constexpr (kBits == 3) load_quad(tile + steps * 64, lane, part, steps);
    }
  }

 private:
  __device__ __forceinline__ void load_chunks(const uint8_t* tile, int lane, int part, int steps) {
    const int num_words = steps * kBits / 4;
    if (part < steps / kPartSteps) {
#pragma unroll
      for (int i = 0; i < kBits / 4; ++i) {
        const uint4 v =
            __ldg(reinterpret_cast<const uint4*>(tile) + (part * (kBits / 4) + i) * 32 + lane);
        w[4 * i] = v.x;
        w[4 * i + 1] = v.y;
        w[4 * i + 2] = v.z;
        w[4 * i + 3] = v.w;
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kBits; ++i) {
      const int word = part * kBits + i;
      const int chunk = word / 4;
      const int chunk_words = min(4, num_words - 4 * chunk);
      w[i] = word < num_words ? __ldg(reinterpret_cast<const uint32_t*>(tile) + chunk * 128 +
                                      lane * chunk_words + word % 4)
                              : 0u;
    }
  }

  __device__ __forceinline__ void load_pairs(const uint8_t* tile, int lane, int part, int steps) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int pair = 2 * part + i;
      w[i] = 0;
      if (2 * pair + 1 < steps) {
        w[i] = __ldg(reinterpret_cast<const uint32_t*>(tile) + pair * 32 + lane);
      } else if (2 * pair < steps) {
        const uint32_t h = __ldg(reinterpret_cast<const uint16_t*>(tile + pair * 128) + lane);
        w[i] = (h & 0xff) | (h & 0xff00) << 8;
      }
    }
  }

  __device__ __forceinline__ void load_quad(const uint8_t* plane, int lane, int part, int steps) {
    w[2] = 0;
    if (kPartSteps * part + 3 < steps) {
      w[2] = __ldg(reinterpret_cast<const uint32_t*>(plane) + part * 32 + lane);
      return;
    }
    for (int i = 0; kPartSteps * part + i < steps; ++i) {
      const uint32_t b = __ldg(plane + part * 128 + i * 32 + lane);
      w[2] |= (b & 0xf) << (4 * i) | (b >> 4) << (16 + 4 * i);
    }
  }
};

__device__ __forceinline__ void unpack(uint32_t pair, float* x) {
  const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&pair));
  x[0] = f.x;
  x[1] = f.y;
}

__device__ __forceinline__ void unpack_e4m3(uint32_t pair, float* x) {
  unpack(ptx::f16x2_of_e4m3x2(pair), x);
}

// Integers below 1024 in the halves of `bits`, as FP16 pairs 1024 + n, times 2^-shift.
__device__ __forceinline__ void unpack_unsigned(uint32_t bits, float factor, float* x) {
  unpack(bits | 0x64006400u, x);
  x[0] = (x[0] - 1024.0f) * factor;
  x[1] = (x[1] - 1024.0f) * factor;
}

// Values of codes of one k-step, exact. E2M1 comes as 2^-14 of the value (element_factor).
template <Element kElement, int kBits>
__device__ __forceinline__ void step_values(const PartWords<kBits>& words, int step,
                                            float (&x)[8]) {
  const auto& w = words.w;
  if constexpr (kElement == Element::kBf16) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      x[2 * r] = __uint_as_float(w[4 * step + r] << 16);
      x[2 * r + 1] = __uint_as_float(w[4 * step + r] & 0xffff0000u);
    }
  } else if constexpr (kElement == Element::kF16) {
#pragma unroll
    for (int r = 0; r < 4; ++r) unpack(w[4 * step + r], x + 2 * r);
  } else if constexpr (kElement == Element::kE2m1) {
    constexpr uint32_t kMask = 0x8e008e00u;
    const uint32_t v = w[step];
    unpack(v & kMask, x);
    unpack((v << 3) & kMask, x + 2);
    unpack(((v & 0x40384038u) * 66u) & kMask, x + 4);
    unpack(((v & 0x20072007u) * 516u) & kMask, x + 6);
  } else if constexpr (kElement == Element::kE4m3 || kElement == Element::kE5m2) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint32_t v = w[2 * step + r / 2] >> (16 * (r % 2));
      if constexpr (kElement == Element::kE4m3) {
        unpack_e4m3(v, x + 2 * r);
      } else {  // a byte is the upper half of an FP16 number
        unpack(__byte_perm(v, 0, 0x1404), x + 2 * r);
      }
    }
  } else if constexpr (kElement == Element::kSigned) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint32_t v = (w[2 * step + r / 2] ^ 0x80808080u) >> (16 * (r % 2));
      unpack(__byte_perm(v, 0x64646464u, 0x4140), x + 2 * r);
      x[2 * r] -= 1152.0f;
      x[2 * r + 1] -= 1152.0f;
    }
  } else if constexpr (kBits == 4) {
    const uint32_t v = w[step];
    unpack_unsigned(v & 0x000f000fu, 1.0f, x);
    unpack_unsigned(v & 0x00f000f0u, 0.0625f, x + 2);
    unpack_unsigned((v >> 8) & 0x000f000fu, 1.0f, x + 4);
    unpack_unsigned((v >> 8) & 0x00f000f0u, 0.0625f, x + 6);
  } else {
    const uint32_t v = w[step / 2] >> (8 * (step % 2));
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      uint32_t code = (v >> (2 * r)) & 0x00030003u;
      if constexpr (kBits == 3) code |= ((w[2] >> (4 * step + r)) & 0x00010001u) << 2;
      unpack_unsigned(code, 1.0f, x + 2 * r);
    }
  }
}

constexpr float element_factor(Element element) {
  return element == Element::kE2m1 ? 16384.0f : 1.0f;
}

// Scales of the blocks of 64 channels, of a lane's tokens, as they are stored: keys' tokens g and
// g + 8, values' 2t, 2t + 1, 2t + 8 and 2t + 9. `kBlockSteps` is a block in k-steps; 0: all of a
// row.
template <Scale kScale, int kBlockSteps, bool kKeys>
struct PartScales {
  static constexpr int kBlocks = kBlockSteps == 0 ? 1 : kPartSteps / kBlockSteps;
  static constexpr int kEntry = formats::scale_bytes(kScale);  // bytes of a token's block
  static constexpr int kRowWords = (kBlocks * kEntry + 3) / 4;
  static constexpr int kWords = kKeys ? 2 * kRowWords : kBlocks * kEntry;
  uint32_t w[kWords];

  // `scales` of the tile, which has `num_blocks` in a row.
  __device__ __forceinline__ void load(const uint8_t* scales, int lane, int part, int num_blocks) {
    const int first = kBlockSteps == 0 ? 0 : part * kBlocks;
    if constexpr (kKeys) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        load_row(scales + (((lane / 4) * 2 + row) * num_blocks + first) * kEntry, row,
                 num_blocks - first, num_blocks % kBlocks == 0);
      }
    } else {
      const auto* words =
          reinterpret_cast<const uint32_t*>(scales) + ((lane % 4) * num_blocks + first) * kEntry;
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        w[i] = i / kEntry < num_blocks - first ? __ldg(words + i) : 0;
    }
  }

  // Of one block of the part; zeros of pairs only.
  __device__ __forceinline__ void get(int block, float (&scale)[4], float (&zero)[4]) const {
    if constexpr (kKeys) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const uint32_t v = w[row * kRowWords + block * kEntry / 4] >> (8 * (block * kEntry % 4));
        float pair[2];
        if constexpr (kScale == Scale::kE4m3) {
          unpack_e4m3(v, pair);
        } else if constexpr (kScale == Scale::kE8m0) {
          pair[0] = from_e8m0(static_cast<uint8_t>(v));
        } else if constexpr (kScale == Scale::kF32) {
          pair[0] = __uint_as_float(v);
        } else {
          unpack(v, pair);
          zero[row] = pair[1];
        }
        scale[row] = pair[0];
      }
    } else {
      const uint32_t* v = w + block * kEntry;
      if constexpr (kScale == Scale::kE4m3) {
        unpack_e4m3(v[0], scale);
        unpack_e4m3(v[0] >> 16, scale + 2);
      } else if constexpr (kScale == Scale::kE8m0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scale[i] = from_e8m0(static_cast<uint8_t>(v[0] >> (8 * i)));
      } else if constexpr (kScale == Scale::kF32) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scale[i] = __uint_as_float(v[i]);
      } else {
        unpack(v[0], scale);
        unpack(v[1], scale + 2);
        if constexpr (kScale == Scale::kF16Pair) {
          unpack(v[2], zero);
          unpack(v[3], zero + 2);
        }
      }
    }
  }

 private:
  __device__ __forceinline__ void load_row(const uint8_t* at, int row, int left, bool aligned) {
    uint32_t* out = w + row * kRowWords;
    if constexpr (kEntry == 4) {
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        out[i] = i < left ? __ldg(reinterpret_cast<const uint32_t*>(at) + i) : 0;
      }
    } else if (aligned) {
      out[0] = kBlocks * kEntry == 4 ? __ldg(reinterpret_cast<const uint32_t*>(at))
                                     : __ldg(reinterpret_cast<const uint16_t*>(at));
    } else {
      out[0] = 0;
      for (int i = 0; i < kBlocks * kEntry && i < left * kEntry; ++i) {
        out[0] |= static_cast<uint32_t>(__ldg(at + i)) << (8 * i);
      }
    }
  }
};
// Formats without scales of blocks along head_dim.
template <int kBlockSteps, bool kKeys>
struct PartScales<Scale::kNone, kBlockSteps, kKeys> {
  __device__ __forceinline__ void load(const uint8_t*, int, int, int) {}
};

}  // namespace kvant::backend::cuda
