// Scores of stored keys: K . Q^T by tensor cores, one function per way of scaling.
//
// A fragment's rows are 16 tokens, its columns (n) the query rows of a tile. Lane (g, t) = (lane /
// 4, lane % 4) holds tokens g and g + 8 of query rows 2 t and 2 t + 1 of each n-tile. Raw sums
// times units() (rows 0-7, rows 8-15), plus an offset per query row, are q . k / g.
#pragma once

#include "kvant/backend/cuda/decode/fragments.cuh"
#include "kvant/backend/cuda/decode/variant.h"

namespace kvant::backend::cuda {

// B fragments of the queries, fp16.
template <int kHeadDim, int kNTiles>
struct QueryFragments {
  uint32_t b[kNTiles][kHeadDim / 16][2];
};

// The K half of a unit in shared memory, and where its sections start there.
struct KeyPage {
  const std::byte* codes;
  int scales;
  int mean;  // 0: none
};

template <int kNTiles>
struct ScoreOffsets {
  float at[kNTiles][2];  // query rows 2 t and 2 t + 1
};

constexpr Codes key_codes(KeyKernel kernel) {
  switch (kernel) {
    case KeyKernel::kNvfp4:
    case KeyKernel::kMxfp4: return Codes::kE2m1;
    case KeyKernel::kE4m3:
    case KeyKernel::kE4m3Token:
    case KeyKernel::kMxfp8: return Codes::kE4m3;
    case KeyKernel::kE5m2: return Codes::kE5m2;
    case KeyKernel::kInt8: return Codes::kInt8;
    case KeyKernel::kInt4: return Codes::kUint4;
    case KeyKernel::kInt4Channel: return Codes::kUint4Rows;
    case KeyKernel::kInt3Channel: return Codes::kUint3;
    case KeyKernel::kInt2Channel: return Codes::kUint2;
    default: return Codes::k16Bit;
  }
}

// Unit of raw scores in rows 0-7 (half 0) and 8-15 of a fragment.
constexpr float key_unit(KeyKernel kernel, int half) {
  switch (kernel) {
    case KeyKernel::kNvfp4:
    case KeyKernel::kMxfp4: return 16384.0f;
    case KeyKernel::kInt4Channel: return half == 0 ? 16777216.0f : 1048576.0f;
    case KeyKernel::kInt4:
    case KeyKernel::kInt3Channel:
    case KeyKernel::kInt2Channel: return 16777216.0f;
    default: return 1.0f;
  }
}

template <int kHeadDim, int kNTiles>
__device__ __forceinline__ void clear(float (&s)[kNTiles][4]) {
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
}

// No scales, or one per token: two chains of products.
template <KeyKernel kKernel, int kHeadDim, int kNTiles>
__device__ __forceinline__ void plain_scores(const KeyPage& page, int tile, int lane,
                                             const QueryFragments<kHeadDim, kNTiles>& q,
                                             float (&s)[kNTiles][4]) {
  using Reader = TileReader<key_codes(kKernel), kHeadDim>;
  Reader reader(page.codes + tile * Reader::kTileBytes, lane);
  float odd[kNTiles][4];
  clear<kHeadDim>(s);
  clear<kHeadDim>(odd);
#pragma unroll
  for (int step = 0; step < Reader::kSteps; ++step) {
    uint32_t a[4];
    reader.fragment(step, a);
#pragma unroll
    for (int n = 0; n < kNTiles; ++n)
      ptx::mma_f16(step % 2 == 0 ? s[n] : odd[n], a, q.b[n][step][0], q.b[n][step][1]);
  }
  float low = 1.0f, high = 1.0f;
  if constexpr (kKernel == KeyKernel::kE4m3Token) {
    const float2 scales =
        *reinterpret_cast<const float2*>(page.codes + page.scales + tile * 64 + lane / 4 * 8);
    low = scales.x, high = scales.y;
  }
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[n][i] += odd[n][i];
      if constexpr (kKernel == KeyKernel::kE4m3Token) s[n][i] *= i < 2 ? low : high;
    }
  }
}

// E4M3 scales of rows g and g + 8 of a tile, a byte a block.
template <int kBlocks>
__device__ __forceinline__ void load_nvfp4_scales(const std::byte* at,
                                                  uint32_t (&scales)[2][(kBlocks + 3) / 4]) {
  if constexpr (kBlocks % 8 == 0) {  // both rows in 16-byte pieces
    uint32_t both[kBlocks / 2];
    load_words(at, both);
#pragma unroll
    for (int i = 0; i < kBlocks / 4; ++i)
      scales[0][i] = both[i], scales[1][i] = both[kBlocks / 4 + i];
  } else {
    load_bytes<kBlocks>(at, scales[0]);
    load_bytes<kBlocks>(at + kBlocks, scales[1]);
  }
}

// NVFP4: the E4M3 scale of a block of 16 is applied to the fragment, exactly. Several tiles go step
// by step, a chain of products each; a tile alone has two.
template <int kCount, int kHeadDim, int kNTiles>
__device__ __forceinline__ void nvfp4_scores(const KeyPage& page, int tile, int lane,
                                             const QueryFragments<kHeadDim, kNTiles>& q,
                                             float (*s)[kNTiles][4]) {
  using Reader = TileReader<Codes::kE2m1, kHeadDim>;
  constexpr int kBlocks = kHeadDim / 16;
  constexpr bool kTwoChains = kCount == 1;
  const std::byte* codes = page.codes + tile * Reader::kTileBytes;
  const std::byte* at = page.codes + page.scales + tile * 16 * kBlocks + lane / 4 * 2 * kBlocks;
  Reader readers[kCount];
  uint32_t scales[kCount][2][(kBlocks + 3) / 4];
  float odd[kNTiles][4];
  clear<kHeadDim>(odd);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    readers[i] = Reader(codes + i * Reader::kTileBytes, lane);
    load_nvfp4_scales<kBlocks>(at + i * 16 * kBlocks, scales[i]);
    clear<kHeadDim>(s[i]);
  }
  uint32_t low[kCount], high[kCount];  // scales of two blocks, of rows g and g + 8
#pragma unroll
  for (int step = 0; step < Reader::kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (step % 4 == 0) {
        low[i] = ptx::f16x2_of_e4m3x2_low(scales[i][0][step / 4]);
        high[i] = ptx::f16x2_of_e4m3x2_low(scales[i][1][step / 4]);
      } else if (step % 4 == 2) {
        low[i] = ptx::f16x2_of_e4m3x2_high(scales[i][0][step / 4]);
        high[i] = ptx::f16x2_of_e4m3x2_high(scales[i][1][step / 4]);
      }
      uint32_t a[4];
      readers[i].fragment(step, a);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t scale = r % 2 == 0 ? low[i] : high[i];
        a[r] = step % 2 == 0 ? ptx::hmul2_low(a[r], scale) : ptx::hmul2_high(a[r], scale);
      }
#pragma unroll
      for (int n = 0; n < kNTiles; ++n)
        ptx::mma_f16(kTwoChains && step % 2 != 0 ? odd[n] : s[i][n], a, q.b[n][step][0],
                     q.b[n][step][1]);
    }
  }
  if constexpr (kTwoChains) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int k = 0; k < 4; ++k) s[0][n][k] += odd[n][k];
    }
  }
}

// The scale (and zero) of one row and block, fp32.
template <KeyKernel kKernel>
__device__ __forceinline__ float2 block_scale(const uint32_t* words, int block) {
  if constexpr (kKernel == KeyKernel::kInt8) {
    const float2 pair = ptx::f32_of_f16x2(words[block / 2]);
    return {block % 2 == 0 ? pair.x : pair.y, 0.0f};
  } else if constexpr (kKernel == KeyKernel::kInt4) {
    return ptx::f32_of_f16x2(words[block]);
  } else {  // E8M0: the exponent of an fp32
    return {__uint_as_float(((words[block / 4] >> (8 * (block % 4))) & 0xffu) << 23), 0.0f};
  }
}

// Scales per block of 32: exact products of codes, scaled in fp32 (codecs.md: int8, int4, mxfp4,
// mxfp8). int4's zero joins with the sum of the block's queries, a product with ones.
template <KeyKernel kKernel, int kHeadDim, int kNTiles>
__device__ __forceinline__ void block_scores(const KeyPage& page, int tile, int lane,
                                             const QueryFragments<kHeadDim, kNTiles>& q,
                                             float (&s)[kNTiles][4]) {
  using Reader = TileReader<key_codes(kKernel), kHeadDim>;
  constexpr int kBlocks = (kHeadDim + 31) / 32;
  constexpr int kScaleBytes =
      kKernel == KeyKernel::kInt8 ? 2 : (kKernel == KeyKernel::kInt4 ? 4 : 1);
  constexpr int kRowBytes = kBlocks * kScaleBytes;
  Reader reader(page.codes + tile * Reader::kTileBytes, lane);
  uint32_t scales[2][(kRowBytes + 3) / 4];
  const std::byte* at = page.codes + page.scales + tile * 16 * kRowBytes + lane / 4 * 2 * kRowBytes;
  load_bytes<kRowBytes>(at, scales[0]);
  load_bytes<kRowBytes>(at + kRowBytes, scales[1]);
  clear<kHeadDim>(s);
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    float sum[kNTiles][4], ones_sum[kNTiles][4];
    clear<kHeadDim>(sum);
    clear<kHeadDim>(ones_sum);
#pragma unroll
    for (int step = 2 * block; step < 2 * block + 2 && step < Reader::kSteps; ++step) {
      uint32_t a[4];
      reader.fragment(step, a);
      const uint32_t ones[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        ptx::mma_f16(sum[n], a, q.b[n][step][0], q.b[n][step][1]);
        if constexpr (kKernel == KeyKernel::kInt4)
          ptx::mma_f16(ones_sum[n], ones, q.b[n][step][0], q.b[n][step][1]);
      }
    }
    const float2 low = block_scale<kKernel>(scales[0], block);
    const float2 high = block_scale<kKernel>(scales[1], block);
    constexpr float kPerUnit = 1.0f / key_unit(KeyKernel::kInt4, 0);
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 scale = i < 2 ? low : high;
        s[n][i] = fmaf(sum[n][i], scale.x, s[n][i]);
        if constexpr (kKernel == KeyKernel::kInt4)
          s[n][i] = fmaf(ones_sum[n][i] * kPerUnit, scale.y, s[n][i]);
      }
    }
  }
}

// Scales and zeros per channel: queries take the scale once a page, q' = fp16(q s) and the exact
// residual q s - q', so that no rounding is added to that of q; q . zero is an offset of the page.
// `queries(n, step)` reads an fp16 fragment from shared memory.
template <int kHeadDim, int kNTiles>
struct ChannelQueries {
  QueryFragments<kHeadDim, kNTiles> scaled, residual;

  template <typename Queries>
  __device__ __forceinline__ void load(const KeyPage& page, int lane, const Queries& queries,
                                       ScoreOffsets<kNTiles>& offsets) {
    float zero[kNTiles][4];
    clear<kHeadDim>(zero);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      // Rows 0-7: zeros, rows 8-15: scales, of channels 2 t, 2 t + 1 and 2 t + 8, 2 t + 9.
      uint32_t a[4];
      load_words(page.codes + page.scales + step * 64 + lane % 4 * 16, a);
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        const uint2 q = queries(n, step);
        ptx::mma_f16(zero[n], a, q.x, q.y);
        scale(q.x, a[1], scaled.b[n][step][0], residual.b[n][step][0]);
        scale(q.y, a[3], scaled.b[n][step][1], residual.b[n][step][1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) offsets.at[n][0] = zero[n][0], offsets.at[n][1] = zero[n][1];
  }

 private:
  __device__ __forceinline__ static void scale(uint32_t q, uint32_t s, uint32_t& product,
                                               uint32_t& rest) {
    product = ptx::hmul2(q, s);
    rest = ptx::hfma2(q, s, product ^ 0x80008000u);
  }
};

template <KeyKernel kKernel, int kHeadDim, int kNTiles>
__device__ __forceinline__ void channel_scores(const KeyPage& page, int tile, int lane,
                                               const ChannelQueries<kHeadDim, kNTiles>& q,
                                               float (&s)[kNTiles][4]) {
  using Reader = TileReader<key_codes(kKernel), kHeadDim>;
  Reader reader(page.codes + tile * Reader::kTileBytes, lane);
  float rest[kNTiles][4];
  clear<kHeadDim>(s);
  clear<kHeadDim>(rest);
#pragma unroll
  for (int step = 0; step < Reader::kSteps; ++step) {
    uint32_t a[4];
    reader.fragment(step, a);
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      ptx::mma_f16(s[n], a, q.scaled.b[n][step][0], q.scaled.b[n][step][1]);
      ptx::mma_f16(rest[n], a, q.residual.b[n][step][0], q.residual.b[n][step][1]);
    }
  }
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] += rest[n][i];
  }
}

// q . mean of the page (+mean), BF16 to fp16; every row of the product holds it.
template <int kHeadDim, int kNTiles>
__device__ __forceinline__ void mean_offsets(const KeyPage& page, int lane,
                                             const QueryFragments<kHeadDim, kNTiles>& q,
                                             ScoreOffsets<kNTiles>& offsets) {
  float dot[kNTiles][4];
  clear<kHeadDim>(dot);
  const auto half_pair = [&](int channel) {
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(page.codes + page.mean + channel * 2);
    return ptx::f16x2_of_f32(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  };
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    uint32_t a[4];
    a[0] = a[1] = half_pair(step * 16 + lane % 4 * 2);
    a[2] = a[3] = half_pair(step * 16 + 8 + lane % 4 * 2);
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) ptx::mma_f16(dot[n], a, q.b[n][step][0], q.b[n][step][1]);
  }
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) offsets.at[n][0] += dot[n][0], offsets.at[n][1] += dot[n][1];
}

// Raw scores of kTiles tiles of a page, and the page's offsets. `scale_units` multiplies by the
// units of the format: for kernels that learn the format at run time.
template <KeyKernel kKernel, int kHeadDim, int kNTiles, int kTiles, typename Queries>
__device__ __forceinline__ void page_scores(const KeyPage& page, int first_tile, int lane,
                                            const QueryFragments<kHeadDim, kNTiles>& q,
                                            const Queries& shared_queries, bool scale_units,
                                            float (&s)[kTiles][kNTiles][4],
                                            ScoreOffsets<kNTiles>& offsets) {
  if constexpr (is_channel(kKernel)) {
    ChannelQueries<kHeadDim, kNTiles> scaled;
    scaled.load(page, lane, shared_queries, offsets);
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      channel_scores<kKernel>(page, first_tile + i, lane, scaled, s[i]);
  } else if constexpr (kKernel == KeyKernel::kNvfp4) {
    constexpr int kCount = kTiles % 2 == 0 ? 2 : 1;
#pragma unroll
    for (int i = 0; i < kTiles; i += kCount)
      nvfp4_scores<kCount>(page, first_tile + i, lane, q, &s[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if constexpr (kKernel == KeyKernel::kE4m3 || kKernel == KeyKernel::kE5m2 ||
                    kKernel == KeyKernel::kE4m3Token) {
        plain_scores<kKernel>(page, first_tile + i, lane, q, s[i]);
      } else {
        block_scores<kKernel>(page, first_tile + i, lane, q, s[i]);
      }
    }
  }
  if (!scale_units) return;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int k = 0; k < 4; ++k) s[i][n][k] *= key_unit(kKernel, k / 2);
    }
  }
}

}  // namespace kvant::backend::cuda
