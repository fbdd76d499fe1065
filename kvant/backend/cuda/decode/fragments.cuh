// From words of an `sm90` page (ADR 0004) to A fragments of mma.m16n8k16: loads and unpacking.
//
// A tile is 16 tokens; step s of a tile covers channels [16 s, 16 s + 16): as columns of A for
// keys, as rows for values. A lane owns eight elements of each step: four registers of two.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvant/backend/cuda/ptx.cuh"

namespace kvant::backend::cuda {

// N words from shared memory, by the widest accesses that the size allows.
template <int N>
__device__ __forceinline__ void load_words(const std::byte* p, uint32_t (&w)[N]) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const uint4 x = *reinterpret_cast<const uint4*>(p + 4 * i);
      w[i] = x.x, w[i + 1] = x.y, w[i + 2] = x.z, w[i + 3] = x.w;
    }
  } else if constexpr (N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const uint2 x = *reinterpret_cast<const uint2*>(p + 4 * i);
      w[i] = x.x, w[i + 1] = x.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) w[i] = *reinterpret_cast<const uint32_t*>(p + 4 * i);
  }
}

// `kBytes` bytes whose address is a multiple of the largest power of two in kBytes; the rest of the
// last word is zero.
template <int kBytes>
__device__ __forceinline__ void load_bytes(const std::byte* p, uint32_t (&w)[(kBytes + 3) / 4]) {
  if constexpr (kBytes % 4 == 0) {
    load_words(p, w);
  } else {
#pragma unroll
    for (uint32_t& word : w) word = 0;
    if constexpr (kBytes % 2 == 0) {
#pragma unroll
      for (int i = 0; i < kBytes; i += 2)
        w[i / 4] |= static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(p + i))
                    << (8 * (i % 4));
    } else {
#pragma unroll
      for (int i = 0; i < kBytes; ++i)
        w[i / 4] |= static_cast<uint32_t>(*reinterpret_cast<const uint8_t*>(p + i))
                    << (8 * (i % 4));
    }
  }
}

// What the codes of a tile are.
enum class Codes { kE2m1, kE4m3, kE5m2, kInt8, kUint4, kUint4Rows, kUint3, kUint2, k16Bit };

constexpr int code_bits(Codes codes) {
  switch (codes) {
    case Codes::kE2m1:
    case Codes::kUint4:
    case Codes::kUint4Rows: return 4;
    case Codes::kUint3: return 3;
    case Codes::kUint2: return 2;
    case Codes::k16Bit: return 16;
    default: return 8;
  }
}

// E2M1 in the permuted order: fp16 pairs scaled by 2^-14 (six logic operations, a shift, two
// multiplies).
__device__ __forceinline__ void unpack_e2m1(uint32_t w, uint32_t (&a)[4]) {
  constexpr uint32_t kMask = 0x8e008e00u;
  a[0] = w & kMask;
  a[1] = (w << 3) & kMask;
  a[2] = ((w & 0x40384038u) * 66u) & kMask;
  a[3] = ((w & 0x20072007u) * 516u) & kMask;
}

// Unsigned integers as fp16 subnormals n * 2^-24.
__device__ __forceinline__ void unpack_uint4(uint32_t w, uint32_t (&a)[4]) {
#pragma unroll
  for (int r = 0; r < 4; ++r) a[r] = (w >> (4 * r)) & 0x000f000fu;
}
// The same without two of the shifts: rows 8 to 15 are n * 2^-20.
__device__ __forceinline__ void unpack_uint4_rows(uint32_t w, uint32_t (&a)[4]) {
  const uint32_t high = w >> 8;
  a[0] = w & 0x000f000fu;
  a[1] = w & 0x00f000f0u;
  a[2] = high & 0x000f000fu;
  a[3] = high & 0x00f000f0u;
}

// Two's complement bytes, exactly: 1024 + (n + 128) as fp16, less 1152.
__device__ __forceinline__ uint32_t unpack_int8_pair(uint32_t biased, uint32_t selector) {
  constexpr uint32_t kMinus1152 = 0xe480e480u;
  return ptx::hadd2(ptx::permute_bytes(biased, 0x64646464u, selector), kMinus1152);
}
// Two words hold registers 0, 1 and 2, 3.
__device__ __forceinline__ void unpack_int8(uint32_t w0, uint32_t w1, uint32_t (&a)[4]) {
  w0 ^= 0x80808080u;
  w1 ^= 0x80808080u;
  a[0] = unpack_int8_pair(w0, 0x4140u);
  a[1] = unpack_int8_pair(w0, 0x4342u);
  a[2] = unpack_int8_pair(w1, 0x4140u);
  a[3] = unpack_int8_pair(w1, 0x4342u);
}

__device__ __forceinline__ void unpack_e4m3(uint32_t w0, uint32_t w1, uint32_t (&a)[4]) {
  a[0] = ptx::f16x2_of_e4m3x2_low(w0);
  a[1] = ptx::f16x2_of_e4m3x2_high(w0);
  a[2] = ptx::f16x2_of_e4m3x2_low(w1);
  a[3] = ptx::f16x2_of_e4m3x2_high(w1);
}
// E5M2 is the upper byte of fp16.
__device__ __forceinline__ void unpack_e5m2(uint32_t w0, uint32_t w1, uint32_t (&a)[4]) {
  a[0] = ptx::permute_bytes(w0, 0, 0x1404u);
  a[1] = ptx::permute_bytes(w0, 0, 0x3424u);
  a[2] = ptx::permute_bytes(w1, 0, 0x1404u);
  a[3] = ptx::permute_bytes(w1, 0, 0x3424u);
}

// Reads the A fragments of a tile in the order of its steps.
template <Codes kCodes, int kHeadDim>
class TileReader {
 public:
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kTileBytes = 16 * kHeadDim * code_bits(kCodes) / 8;

  TileReader() = default;
  __device__ __forceinline__ TileReader(const std::byte* tile, int lane)
      : tile_(tile), lane_(lane) {}

  // `step` is a constant after unrolling and counts up from 0.
  __device__ __forceinline__ void fragment(int step, uint32_t (&a)[4]) {
    if constexpr (code_bits(kCodes) <= 3) {
      few_bits(step, a);
    } else {
      constexpr int kStepWords = code_bits(kCodes) / 4;
      const int word = step * kStepWords;
      if (word % 4 == 0) load_chunk(word / 4);
      const uint32_t w0 = words_[word % 4];
      const uint32_t w1 = words_[(word + 1) % 4];
      if constexpr (kCodes == Codes::kE2m1) unpack_e2m1(w0, a);
      if constexpr (kCodes == Codes::kUint4) unpack_uint4(w0, a);
      if constexpr (kCodes == Codes::kUint4Rows) unpack_uint4_rows(w0, a);
      if constexpr (kCodes == Codes::kE4m3) unpack_e4m3(w0, w1, a);
      if constexpr (kCodes == Codes::kE5m2) unpack_e5m2(w0, w1, a);
      if constexpr (kCodes == Codes::kInt8) unpack_int8(w0, w1, a);
      if constexpr (kCodes == Codes::k16Bit) {
#pragma unroll
        for (int r = 0; r < 4; ++r) a[r] = words_[r];
      }
    }
  }

 private:
  // [chunk][lane][up to 4 words]
  __device__ __forceinline__ void load_chunk(int chunk) {
    constexpr int kWords = kSteps * code_bits(kCodes) / 4;
    const std::byte* base = tile_ + chunk * 512;
    const int left = kWords - 4 * chunk;
    if (left >= 4) {
      load_words(base + lane_ * 16, words_);
    } else if (left == 2) {
      const uint2 x = *reinterpret_cast<const uint2*>(base + lane_ * 8);
      words_[0] = x.x, words_[1] = x.y;
    } else {
      for (int i = 0; i < left; ++i)
        words_[i] = *reinterpret_cast<const uint32_t*>(base + (lane_ * left + i) * 4);
    }
  }

  // 2- and 3-bit codes: pairs of steps share a word of low bits, quadruples one of high bits.
  __device__ __forceinline__ void few_bits(int step, uint32_t (&a)[4]) {
    if (step % 2 == 0) words_[0] = low_word(step);
    if constexpr (kCodes == Codes::kUint3) {
      if (step % 4 == 0) words_[1] = high_word(step);
    }
    const int shift = 8 * (step % 2);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      a[r] = (words_[0] >> (shift + 2 * r)) & 0x00030003u;
      if constexpr (kCodes == Codes::kUint3)
        a[r] |= ((words_[1] >> (4 * (step % 4) + r)) & 0x00010001u) << 2;
    }
  }

  __device__ __forceinline__ uint32_t low_word(int step) const {
    const std::byte* base = tile_ + step / 2 * 128;
    if (step + 1 < kSteps) return *reinterpret_cast<const uint32_t*>(base + lane_ * 4);
    const uint32_t half = *reinterpret_cast<const uint16_t*>(base + lane_ * 2);
    return (half & 0xffu) | (half & 0xff00u) << 8;
  }

  __device__ __forceinline__ uint32_t high_word(int step) const {
    const std::byte* base = tile_ + kHeadDim * 4 + step / 4 * 128;
    if (step + 3 < kSteps) return *reinterpret_cast<const uint32_t*>(base + lane_ * 4);
    uint32_t word = 0;  // up to three last steps: a byte per lane and step
    for (int i = 0; step + i < kSteps; ++i) {
      const uint32_t byte = *reinterpret_cast<const uint8_t*>(base + i * 32 + lane_);
      word |= (byte & 0xfu) << (4 * i) | (byte >> 4) << (16 + 4 * i);
    }
    return word;
  }

  const std::byte* tile_;
  int lane_;
  uint32_t words_[4];
};

}  // namespace kvant::backend::cuda
