// Weighted sums of stored values: V^T . P by tensor cores, one function per way of scaling.
//
// Rows of a fragment are 16 channels, its columns the 16 tokens of a tile. The scale of a token is
// folded into its weight, which is why weights carry headroom (kWeightShift). Sums are in the unit
// of value_unit().
#pragma once

#include "kvant/backend/cuda/decode/fragments.cuh"
#include "kvant/backend/cuda/decode/keys.cuh"
#include "kvant/backend/cuda/decode/variant.h"

namespace kvant::backend::cuda {

// Weights are exp2(score - reference) with the reference this much below the maximum: at most 32,
// so that a weight times the largest E4M3 scale (448) is finite in fp16 and small ones stay normal.
inline constexpr float kWeightShift = 5.0f;

template <int kHeadDim, int kNTiles>
struct Accumulators {
  float o[kNTiles][kHeadDim / 16][4];
};

// B fragments of the weights, fp16: tokens 2 t, 2 t + 1 and 2 t + 8, 2 t + 9 of query row g.
template <int kNTiles>
struct WeightFragments {
  uint32_t b[kNTiles][2];
};

constexpr Codes value_codes(ValueKernel kernel) {
  switch (kernel) {
    case ValueKernel::kNvfp4:
    case ValueKernel::kMxfp4: return Codes::kE2m1;
    case ValueKernel::kE4m3:
    case ValueKernel::kE4m3Token:
    case ValueKernel::kMxfp8: return Codes::kE4m3;
    case ValueKernel::kE5m2: return Codes::kE5m2;
    case ValueKernel::kInt8: return Codes::kInt8;
    case ValueKernel::kInt4: return Codes::kUint4;
    default: return Codes::k16Bit;
  }
}

// Words of a block's scales of four tokens (2t, 2t + 1, 2t + 8, 2t + 9), per t.
constexpr int scale_words(ValueKernel kernel) {
  switch (kernel) {
    case ValueKernel::kNvfp4:
    case ValueKernel::kMxfp4:
    case ValueKernel::kMxfp8: return 1;
    case ValueKernel::kInt8: return 2;
    case ValueKernel::kInt4:
    case ValueKernel::kE4m3Token: return 4;
    default: return 0;
  }
}

// 2^e of two E8M0 bytes as fp16. Exponents outside [-24, 15] saturate: a value block beyond 2^15
// times its codes is no activation of a model, one below 2^-24 adds nothing that fp16 output keeps.
__device__ __forceinline__ uint32_t f16x2_of_e8m0x2(uint32_t pair) {
  const float low = __uint_as_float((pair & 0xffu) << 23);
  const float high = __uint_as_float((pair & 0xff00u) << 15);
  return ptx::f16x2_of_f32(fminf(low, 32768.0f), fminf(high, 32768.0f));
}

// The scales of one block as two fp16 pairs.
template <ValueKernel kKernel>
__device__ __forceinline__ uint2 scale_pairs(const uint32_t* words) {
  if constexpr (kKernel == ValueKernel::kNvfp4) {
    return {ptx::f16x2_of_e4m3x2_low(words[0]), ptx::f16x2_of_e4m3x2_high(words[0])};
  } else if constexpr (kKernel == ValueKernel::kMxfp4 || kKernel == ValueKernel::kMxfp8) {
    return {f16x2_of_e8m0x2(words[0]), f16x2_of_e8m0x2(words[0] >> 16)};
  } else if constexpr (kKernel == ValueKernel::kE4m3Token) {  // amax = 448 s keeps fp16 normal
    const auto amax = [&](int i) { return __uint_as_float(words[i]) * 448.0f; };
    return {ptx::f16x2_of_f32(amax(0), amax(1)), ptx::f16x2_of_f32(amax(2), amax(3))};
  } else {
    return {words[0], words[1]};
  }
}

// Adds one tile. `zeros` collects P . zero of int4's blocks: row b of a fragment is block b.
template <ValueKernel kKernel, int kHeadDim, int kNTiles>
__device__ __forceinline__ void add_values(const std::byte* codes, const std::byte* scales,
                                           int tile, int lane, const WeightFragments<kNTiles>& p,
                                           Accumulators<kHeadDim, kNTiles>& sum,
                                           float (&zeros)[kNTiles][4]) {
  using Reader = TileReader<value_codes(kKernel), kHeadDim>;
  constexpr int kWords = scale_words(kKernel);
  constexpr bool kPerToken = kKernel == ValueKernel::kE4m3Token;
  constexpr int kBlockSteps = kKernel == ValueKernel::kNvfp4 ? 1 : 2;
  constexpr int kBlocks = kPerToken ? 1 : (Reader::kSteps + kBlockSteps - 1) / kBlockSteps;
  Reader reader(codes + tile * Reader::kTileBytes, lane);
  const std::byte* at =
      scales + tile * (kWords * 4 * 4 * kBlocks) + lane % 4 * (kWords * 4 * kBlocks);
  [[maybe_unused]] uint32_t words[4];
  WeightFragments<kNTiles> scaled = p;
  if constexpr (kPerToken) {
    load_words(at, words);
    const uint2 pairs = scale_pairs<kKernel>(words);
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      scaled.b[n][0] = ptx::hmul2(p.b[n][0], pairs.x);
      scaled.b[n][1] = ptx::hmul2(p.b[n][1], pairs.y);
    }
  }
#pragma unroll
  for (int step = 0; step < Reader::kSteps; ++step) {
    if constexpr (kWords > 0 && !kPerToken) {
      if (step % kBlockSteps == 0) {
        const int block = step / kBlockSteps;
        // 16 bytes at a time: several blocks' scales, where they are smaller.
        constexpr int kPerLoad = kBlocks * kWords % 4 == 0 ? 4 / kWords : 1;
        if constexpr (kPerLoad == 4 || kPerLoad == 2 || kWords == 4) {
          if (block % kPerLoad == 0) load_words(at + block * kWords * 4, words);
        } else {
          load_words(at + block * kWords * 4, reinterpret_cast<uint32_t(&)[kWords]>(words));
        }
        const uint2 pairs = scale_pairs<kKernel>(words + block % kPerLoad * kWords);
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
          scaled.b[n][0] = ptx::hmul2(p.b[n][0], pairs.x);
          scaled.b[n][1] = ptx::hmul2(p.b[n][1], pairs.y);
        }
      }
    }
    uint32_t a[4];
    reader.fragment(step, a);
#pragma unroll
    for (int n = 0; n < kNTiles; ++n)
      ptx::mma_f16(sum.o[n][step], a, scaled.b[n][0], scaled.b[n][1]);
  }
  if constexpr (kKernel == ValueKernel::kInt4) {
    uint32_t a[4] = {0, 0, 0, 0};
    if (lane / 4 < kBlocks) {  // zeros follow the block's scales
      const uint2 pair = *reinterpret_cast<const uint2*>(at + lane / 4 * 16 + 8);
      a[0] = pair.x, a[2] = pair.y;
    }
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) ptx::mma_f16(zeros[n], a, p.b[n][0], p.b[n][1]);
  }
}

// int4: sum of codes * s * p in units of 2^-24, plus the zeros of each block.
template <int kHeadDim, int kNTiles>
__device__ __forceinline__ void join_zeros(int lane, const float (&zeros)[kNTiles][4],
                                           Accumulators<kHeadDim, kNTiles>& sum) {
  constexpr float kPerUnit = 1.0f / value_unit(ValueKernel::kInt4);
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const int source = step / 2 * 4 + lane % 4;  // lane g = block
      const float z0 = __shfl_sync(~0u, zeros[n][0], source) * kPerUnit;
      const float z1 = __shfl_sync(~0u, zeros[n][1], source) * kPerUnit;
      sum.o[n][step][0] += z0;
      sum.o[n][step][1] += z1;
      sum.o[n][step][2] += z0;
      sum.o[n][step][3] += z1;
    }
  }
}

}  // namespace kvant::backend::cuda
