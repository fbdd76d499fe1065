// Keys stored before RoPE (+prerope): decoded to A fragments in fp16, rotated, multiplied.
//
// A page of first position p holds tokens j = 0, 1, ..., and R(p + j) = R(p) R(j): R(-p) goes to
// the queries once a page, in fp32, and keys take R(j), which is the same table for every page.
// Halves of a pair of channels lie in the same lane of two fragments, so that the rotation is
// arithmetic of pairs in fp16. What +mean, +bias, +smooth and +rot did to the keys is undone before
// it, on the fragments: none of these commutes with RoPE.
//
// Channels go by *octets*, eight neighbours: a lane holds two channels of each for two tokens.
#pragma once

#include "kvant/backend/cuda/decode/fragments.cuh"
#include "kvant/backend/cuda/decode/keys.cuh"
#include "kvant/backend/cuda/decode/variant.h"

namespace kvant::backend::cuda {

// A tile of 16 tokens: octet o of tokens g and g + 8 is a[o / 2][o % 2 * 2] and the next one.
template <int kHeadDim>
struct KeyFragments {
  uint32_t a[kHeadDim / 16][4];

  __device__ __forceinline__ uint32_t& of(int octet, int half) {
    return a[octet / 2][octet % 2 * 2 + half];
  }
};

// A key is a decoded value times this and g. Units keep values normal in fp16 for keys about 1 and
// finite for the largest that the format's scales are made for.
constexpr float pre_rope_unit(KeyKernel kernel) {
  switch (kernel) {
    case KeyKernel::kNvfp4: return 128.0f;
    case KeyKernel::kMxfp4: return 512.0f;
    case KeyKernel::kE5m2: return 16.0f;
    case KeyKernel::kE4m3Token: return 0.0625f;
    default: return 1.0f;
  }
}

namespace pre_rope {

__device__ __forceinline__ uint32_t both_low(uint32_t x) {
  return ptx::permute_bytes(x, 0, 0x1010u);
}
__device__ __forceinline__ uint32_t both_high(uint32_t x) {
  return ptx::permute_bytes(x, 0, 0x3232u);
}
__device__ __forceinline__ uint32_t negative(uint32_t x) {
  uint32_t y;
  asm("neg.f16x2 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Integers that a reader left in the mantissa, as numbers. Row-wise codes of 4 bits are shifted by
// 4 in rows 8 to 15.
template <Codes kCodes>
__device__ __forceinline__ uint32_t integer_pair(uint32_t bits, int half) {
  const bool shifted = kCodes == Codes::kUint4Rows && half == 1;
  const uint32_t biased = bits | (shifted ? 0x54005400u : 0x64006400u);  // 64 + n or 1024 + n
  return ptx::hadd2(biased, shifted ? 0xd400d400u : 0xe400e400u);
}

// 2^(e + kShift) of E8M0 byte `block`, twice.
template <int kShift>
__device__ __forceinline__ uint32_t power_pair(const uint32_t* words, int block) {
  const float power = __uint_as_float(((words[block / 4] >> (8 * (block % 4))) & 0xffu) << 23);
  const float x = fminf(power * static_cast<float>(1 << kShift), 32768.0f);
  return ptx::f16x2_of_f32(x, x);
}

__device__ __forceinline__ uint32_t f16_of_bf16_pair(uint32_t pair) {
  return ptx::f16x2_of_f32(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

}  // namespace pre_rope

// A tile of 16-bit keys.
template <int kHeadDim>
__device__ __forceinline__ void decode_16_bit_keys(const std::byte* tile, bool is_f16, int lane,
                                                   KeyFragments<kHeadDim>& keys) {
  TileReader<Codes::k16Bit, kHeadDim> reader(tile, lane);
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    reader.fragment(step, keys.a[step]);
    if (is_f16) continue;
#pragma unroll
    for (int r = 0; r < 4; ++r) keys.a[step][r] = pre_rope::f16_of_bf16_pair(keys.a[step][r]);
  }
}

// Steps of a tile of quantised keys in pre_rope_unit(): exact but for products of a scale in fp16.
template <KeyKernel kKernel, int kHeadDim>
class KeyDecoder {
  static constexpr Codes kCodes = key_codes(kKernel);
  static constexpr bool kNvfp4 = kKernel == KeyKernel::kNvfp4;
  static constexpr bool kMx = kKernel == KeyKernel::kMxfp4 || kKernel == KeyKernel::kMxfp8;
  static constexpr int kBlockBytes = kKernel == KeyKernel::kInt4   ? 4
                                     : kKernel == KeyKernel::kInt8 ? 2
                                     : kNvfp4 || kMx               ? 1
                                                                   : 0;
  static constexpr int kBlocks = kNvfp4 ? kHeadDim / 16 : (kHeadDim + 31) / 32;
  static constexpr int kRowBytes = kBlocks * kBlockBytes;
  static constexpr int kWords = kRowBytes > 0 ? (kRowBytes + 3) / 4 : 1;

 public:
  using Reader = TileReader<kCodes, kHeadDim>;

  __device__ __forceinline__ KeyDecoder(const KeyPage& page, int tile, int lane)
      : codes_(page.codes + tile * Reader::kTileBytes),
        scales_(page.codes + page.scales),
        lane_(lane) {
    if constexpr (kRowBytes > 0) {
      const std::byte* at = scales_ + tile * 16 * kRowBytes + lane / 4 * 2 * kRowBytes;
      if constexpr (kRowBytes % 8 == 0) {  // both rows in 16-byte pieces
        uint32_t all[2 * kWords];
        load_words(at, all);
#pragma unroll
        for (int i = 0; i < 2 * kWords; ++i) rows_[i / kWords][i % kWords] = all[i];
      } else {
        load_bytes<kRowBytes>(at, rows_[0]);
        load_bytes<kRowBytes>(at + kRowBytes, rows_[1]);
      }
    } else if constexpr (kKernel == KeyKernel::kE4m3Token) {
      const float2 pair = *reinterpret_cast<const float2*>(scales_ + tile * 64 + lane / 4 * 8);
      constexpr float kPerUnit = 1.0f / pre_rope_unit(kKernel);
      rows_[0][0] = ptx::f16x2_of_f32(pair.x * kPerUnit, pair.x * kPerUnit);
      rows_[1][0] = ptx::f16x2_of_f32(pair.y * kPerUnit, pair.y * kPerUnit);
    }
  }

  __device__ __forceinline__ Reader reader() const {
    return Reader(codes_, lane_);
  }

  // Turns the codes of a step, as the reader gives them, into keys.
  __device__ __forceinline__ void decode(int step, uint32_t (&a)[4]) const {
    if constexpr (is_channel(kKernel)) {
      // Zeros and scales of channels 2 t, 2 t + 1, then those of the next octet.
      uint32_t pairs[4];
      load_words(scales_ + step * 64 + lane_ % 4 * 16, pairs);
#pragma unroll
      for (int r = 0; r < 4; ++r)
        a[r] = ptx::hfma2(pre_rope::integer_pair<kCodes>(a[r], r % 2), pairs[r / 2 * 2 + 1],
                          pairs[r / 2 * 2]);
    } else if constexpr (kNvfp4) {
      constexpr uint32_t kTimes128 = 0x58005800u;  // with codes in 2^-14: pre_rope_unit()
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t word = rows_[half][step / 4];
        const uint32_t two =
            step % 4 < 2 ? ptx::f16x2_of_e4m3x2_low(word) : ptx::f16x2_of_e4m3x2_high(word);
        const uint32_t scale = ptx::hmul2(two, kTimes128);
#pragma unroll
        for (int r = half; r < 4; r += 2)
          a[r] = step % 2 == 0 ? ptx::hmul2_low(a[r], scale) : ptx::hmul2_high(a[r], scale);
      }
    } else if constexpr (kBlockBytes > 0) {
#pragma unroll
      for (int r = 0; r < 4; ++r) a[r] = scale_block(step / 2, r % 2, a[r]);
    } else if constexpr (kKernel == KeyKernel::kE4m3Token) {
#pragma unroll
      for (int r = 0; r < 4; ++r) a[r] = ptx::hmul2(a[r], rows_[r % 2][0]);
    } else if constexpr (kKernel == KeyKernel::kE5m2) {
#pragma unroll
      for (int r = 0; r < 4; ++r) a[r] = ptx::hmul2(a[r], 0x2c002c00u);  // 1 / 16
    }
  }

 private:
  // Blocks of 32 channels.
  __device__ __forceinline__ uint32_t scale_block(int block, int half, uint32_t codes) const {
    if constexpr (kKernel == KeyKernel::kInt8) {
      const uint32_t word = rows_[half][block / 2];
      return block % 2 == 0 ? ptx::hmul2_low(codes, word) : ptx::hmul2_high(codes, word);
    } else if constexpr (kKernel == KeyKernel::kInt4) {
      const uint32_t word = rows_[half][block];
      return ptx::hfma2(pre_rope::integer_pair<kCodes>(codes, half), pre_rope::both_low(word),
                        pre_rope::both_high(word));
    } else {  // codes of mxfp4 are in 2^-14: 2^-14 2^5 = 1 / 512
      constexpr int kShift = kKernel == KeyKernel::kMxfp4 ? 5 : 0;
      return ptx::hmul2(codes, pre_rope::power_pair<kShift>(rows_[half], block));
    }
  }

  const std::byte* codes_;
  const std::byte* scales_;
  const int lane_;
  uint32_t rows_[2][kWords];  // scales of rows g and g + 8
};

// A whole tile.
template <KeyKernel kKernel, int kHeadDim>
__device__ __forceinline__ void decode_keys(const KeyPage& page, int tile, int lane,
                                            KeyFragments<kHeadDim>& keys) {
  const KeyDecoder<kKernel, kHeadDim> decoder(page, tile, lane);
  auto reader = decoder.reader();
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    reader.fragment(step, keys.a[step]);
    decoder.decode(step, keys.a[step]);
  }
}

// Keys in units of `unit` (a power of two is taken from it: the keys' unit is what is returned)
// plus `term(channel)`, the pair of channels' means or biases.
template <int kHeadDim, typename Term>
__device__ __forceinline__ float add_key_terms(float unit, int lane, const Term& term,
                                               KeyFragments<kHeadDim>& keys) {
  const float power = __uint_as_float(__float_as_uint(unit) & 0x7f800000u);
  const float factor = fminf(fmaxf(power, 6.1035156e-5f), 32768.0f);
  const float rest = unit / factor;
  const float per_unit = 1.0f / rest;
  const uint32_t pair = ptx::f16x2_of_f32(factor, factor);
#pragma unroll
  for (int octet = 0; octet < kHeadDim / 8; ++octet) {
    const float2 x = term(octet * 8 + lane % 4 * 2);
    const uint32_t added = ptx::f16x2_of_f32(x.x * per_unit, x.y * per_unit);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      keys.of(octet, half) = ptx::hfma2(keys.of(octet, half), pair, added);
  }
  return rest;
}

template <int kHeadDim, typename Factor>
__device__ __forceinline__ void multiply_keys(int lane, const Factor& factor,
                                              KeyFragments<kHeadDim>& keys) {
#pragma unroll
  for (int octet = 0; octet < kHeadDim / 8; ++octet) {
    const float2 x = factor(octet * 8 + lane % 4 * 2);
    const uint32_t pair = ptx::f16x2_of_f32(x.x, x.y);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      keys.of(octet, half) = ptx::hmul2(keys.of(octet, half), pair);
  }
}

// +rot: the Hadamard matrix of a block is that of 16 channels, whose B fragments are signs, times
// butterflies over the steps, in fp32. Results are multiplied with `factor(channel)`; those of a
// fragment have the places of the fragments' octets.
template <int kHeadDim, typename Factor>
__device__ __forceinline__ void unrotate_keys(int lane, const Factor& factor,
                                              KeyFragments<kHeadDim>& keys) {
  constexpr int kSteps = kHeadDim / 16;
  constexpr int kBlockSteps = (kHeadDim & -kHeadDim) / 16;
  // Channels 2 t and 2 t + 1 of the sum, output channel g: signs by the parity of common bits.
  const int t2 = lane % 4 * 2, g = lane / 4;
  const uint32_t plus = 0x3c003c00u ^ (__popc(t2 & g) % 2 != 0 ? 0x8000u : 0u) ^
                        (__popc((t2 + 1) & g) % 2 != 0 ? 0x80000000u : 0u);
  KeyFragments<kHeadDim> out;
#pragma unroll
  for (int part = 0; part < 2; ++part) {  // of a step: its octets
    // Channels 8 to 15 of the sum have a bit in common with those of the second octet.
    const uint32_t high = part == 0 ? plus : plus ^ 0x80008000u;
    float sum[kSteps][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      sum[step][0] = sum[step][1] = sum[step][2] = sum[step][3] = 0.0f;
      ptx::mma_f16(sum[step], keys.a[step], plus, high);
    }
#pragma unroll
    for (int half = 1; half < kBlockSteps; half *= 2) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if ((step & half) != 0) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float x = sum[step][i], y = sum[step + half][i];
          sum[step][i] = x + y;
          sum[step + half][i] = x - y;
        }
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int octet = 2 * step + part;
      const float2 x = factor(octet * 8 + lane % 4 * 2);
      out.of(octet, 0) = ptx::f16x2_of_f32(sum[step][0] * x.x, sum[step][1] * x.y);
      out.of(octet, 1) = ptx::f16x2_of_f32(sum[step][2] * x.x, sum[step][3] * x.y);
    }
  }
  keys = out;
}

// Two tokens of a pair of octets, by cosine and sine / 2 of the pairs of channels.
__device__ __forceinline__ void rotate_pairs(uint32_t cosine, uint32_t sine, uint32_t& first,
                                             uint32_t& second) {
  const uint32_t x = first, y = second;
  first = ptx::hfma2(pre_rope::negative(sine), y, ptx::hmul2(x, cosine));
  second = ptx::hfma2(sine, x, ptx::hmul2(y, cosine));
}

// R(j) / 2 of the tile's tokens; `table`: KeyRotations::Tables::tokens for octets [0, kOctets) and
// their partners [kOctets, 2 kOctets).
template <int kOctets, int kHeadDim>
__device__ __forceinline__ void rotate_keys(const uint4* table, int tile, int lane,
                                            KeyFragments<kHeadDim>& keys) {
#pragma unroll
  for (int octet = 0; octet < kOctets; ++octet) {
    const uint4 angle = __ldg(table + (tile * kOctets + octet) * 32 + lane);
    rotate_pairs(angle.x, angle.z, keys.of(octet, 0), keys.of(octet + kOctets, 0));
    rotate_pairs(angle.y, angle.w, keys.of(octet, 1), keys.of(octet + kOctets, 1));
  }
}

template <int kHeadDim, int kNTiles>
__device__ __forceinline__ void fragment_scores(const KeyFragments<kHeadDim>& keys,
                                                const QueryFragments<kHeadDim, kNTiles>& q,
                                                float (&s)[kNTiles][4]) {
  float odd[kNTiles][4];
  clear<kHeadDim>(s);
  clear<kHeadDim>(odd);
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n)
      ptx::mma_f16(step % 2 == 0 ? s[n] : odd[n], keys.a[step], q.b[n][step][0], q.b[n][step][1]);
  }
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] += odd[n][i];
  }
}

// Raw scores of a tile where all channels rotate and nothing else was done to the keys: two steps
// at a time, so that few registers hold keys.
template <KeyKernel kKernel, int kHeadDim, int kNTiles>
__device__ __forceinline__ void rotated_scores(const KeyPage& page, const uint4* table, int tile,
                                               int lane, const QueryFragments<kHeadDim, kNTiles>& q,
                                               float (&s)[kNTiles][4]) {
  constexpr int kSteps = kHeadDim / 16;
  static_assert(kSteps % 2 == 0);
  const KeyDecoder<kKernel, kHeadDim> decoder(page, tile, lane);
  auto first = decoder.reader(), second = decoder.reader();
#pragma unroll
  for (int step = 0; step < kSteps / 2; ++step) {  // words that later steps share
    uint32_t unused[4];
    second.fragment(step, unused);
  }
  float odd[kNTiles][4];
  clear<kHeadDim>(s);
  clear<kHeadDim>(odd);
#pragma unroll
  for (int step = 0; step < kSteps / 2; ++step) {
    uint32_t a[4], b[4];
    first.fragment(step, a);
    decoder.decode(step, a);
    second.fragment(step + kSteps / 2, b);
    decoder.decode(step + kSteps / 2, b);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const uint4 angle = __ldg(table + (tile * kSteps + 2 * step + part) * 32 + lane);
      rotate_pairs(angle.x, angle.z, a[2 * part], b[2 * part]);
      rotate_pairs(angle.y, angle.w, a[2 * part + 1], b[2 * part + 1]);
    }
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      ptx::mma_f16(s[n], a, q.b[n][step][0], q.b[n][step][1]);
      ptx::mma_f16(odd[n], b, q.b[n][step + kSteps / 2][0], q.b[n][step + kSteps / 2][1]);
    }
  }
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] += odd[n][i];
  }
}

// R(-p) of the queries of a page: `row`: cosine and sine of each pair, [8 kOctets]; `query(n,
// octet)`: this lane's two channels of a query row. Channels beyond 2 kOctets octets do not rotate.
template <int kOctets, int kHeadDim, int kNTiles, typename Query>
__device__ __forceinline__ void rotate_queries(const std::byte* row, int lane, const Query& query,
                                               QueryFragments<kHeadDim, kNTiles>& q) {
  constexpr int kAll = kHeadDim / 8;
#pragma unroll
  for (int octet = 0; octet < kOctets; ++octet) {
    const float4 angle = *reinterpret_cast<const float4*>(row + (octet * 8 + lane % 4 * 2) * 8);
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      const float2 x = query(n, octet);
      const float2 y = query(n, octet + kOctets);
      q.b[n][octet / 2][octet % 2] =
          ptx::f16x2_of_f32(fmaf(y.x, angle.y, x.x * angle.x), fmaf(y.y, angle.w, x.y * angle.z));
      const int partner = octet + kOctets;
      q.b[n][partner / 2][partner % 2] =
          ptx::f16x2_of_f32(fmaf(-x.x, angle.y, y.x * angle.x), fmaf(-x.y, angle.w, y.y * angle.z));
    }
  }
#pragma unroll
  for (int octet = 2 * kOctets; octet < kAll; ++octet) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      const float2 x = query(n, octet);
      q.b[n][octet / 2][octet % 2] = ptx::f16x2_of_f32(x.x, x.y);
    }
  }
}

}  // namespace kvant::backend::cuda
