// A tile of 16 tokens of a stored page becomes FP16 rows in shared memory, as wgmma reads them.
//
// Images of a page: [64 channels][token] rows of 128 bytes, chunks of 16 bytes swizzled by the row
// modulo 8. Keys and values of formats without rounding here are exact: codes times scales in the
// format's unit (key_unit, value_unit) have at most 11 significant bits.
#pragma once

#include "kvant/backend/cuda/decode/keys.cuh"
#include "kvant/backend/cuda/decode/values.cuh"
#include "kvant/backend/cuda/hopper.cuh"
#include "kvant/backend/cuda/shared/kernel_params.h"

namespace kvant::backend::cuda {

// Where a lane's rows of a step's four 8 x 8 matrices go. Values are transposed on the way.
template <bool kKeys>
class TileTarget {
 public:
  __device__ __forceinline__ TileTarget(uint32_t image, int tile, int lane) {
    const int matrix = lane / 8;
    const int row = 8 * (kKeys ? matrix % 2 : matrix / 2) + lane % 8;
    const int chunk = kKeys ? matrix / 2 : matrix % 2;
    start_ = image + (tile * 16 + row) * 128 + ((chunk ^ (row % 8)) << 4);
  }
  __device__ __forceinline__ void store(int step, const uint32_t (&a)[4]) const {
    store_matrices<!kKeys>((start_ ^ (step % 4 * 32)) + step / 4 * (kSharedPageTokens * 128), a);
  }

 private:
  uint32_t start_;
};

// A lane's words of a tile, [16 bytes][lane].
template <int kWords>
__device__ __forceinline__ void load_lane(const std::byte* tile, int lane,
                                          uint32_t (&words)[kWords]) {
#pragma unroll
  for (int i = 0; i < kWords; i += 4) {
    const uint4 x = *reinterpret_cast<const uint4*>(tile + i * 128 + lane * 16);
    words[i] = x.x, words[i + 1] = x.y, words[i + 2] = x.z, words[i + 3] = x.w;
  }
}

// Unit of keys in an image, for those of nvfp4 and fp8; channel formats have none.
constexpr float image_key_unit(KeyKernel kernel) {
  return is_channel(kernel) ? 1.0f : key_unit(kernel, 0);
}

// A warp's tile of a page: load() takes it to registers, write() to the image. All loads go first:
// they do not pass stores to shared memory.

template <KeyKernel kKernel, int kHeadDim>
class KeyTile;

template <int kHeadDim>
class KeyTile<KeyKernel::kNvfp4, kHeadDim> {
  static constexpr int kSteps = kHeadDim / 16;
  static_assert(kSteps % 4 == 0, "scales of a token are whole words");

 public:
  __device__ __forceinline__ void load(const std::byte* unit, const StoredSections& sections,
                                       const std::byte*, int tile, int lane) {
    load_lane(unit + tile * (kHeadDim * 8), lane, codes_);
    load_words(unit + sections.k_scales + tile * 16 * kSteps + lane / 4 * 2 * kSteps, scales_);
  }
  __device__ __forceinline__ void write(const TileTarget<true>& target) const {
    uint32_t pair_low = 0, pair_high = 0;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step % 2 == 0) {
        const int shift = 8 * (step % 4);
        pair_low = ptx::f16x2_of_e4m3x2((scales_[step / 4] >> shift) & 0xffffu);
        pair_high = ptx::f16x2_of_e4m3x2((scales_[kSteps / 4 + step / 4] >> shift) & 0xffffu);
      }
      const uint32_t selector = step % 2 == 0 ? 0x1010u : 0x3232u;
      const uint32_t low = ptx::permute_bytes(pair_low, 0, selector);
      const uint32_t high = ptx::permute_bytes(pair_high, 0, selector);
      uint32_t a[4];
      unpack_e2m1(codes_[step], a);
      a[0] = ptx::hmul2(a[0], low);
      a[1] = ptx::hmul2(a[1], high);
      a[2] = ptx::hmul2(a[2], low);
      a[3] = ptx::hmul2(a[3], high);
      target.store(step, a);
    }
  }

 private:
  uint32_t codes_[kSteps];
  uint32_t scales_[kSteps / 2];  // of tokens g and g + 8
};

// Scales and zeros per channel: k = n s + z. The image holds k less the reference key b = z0 + 8 s0
// of the item's first page, so that offsets common to all keys cost no precision: (n - 8) s +
// 8 (s - s0) + (z - z0). `reference`: scales section of that page.
template <int kHeadDim>
class KeyTile<KeyKernel::kInt4Channel, kHeadDim> {
  static constexpr int kSteps = kHeadDim / 16;

 public:
  __device__ __forceinline__ void load(const std::byte* unit, const StoredSections& sections,
                                       const std::byte* reference, int tile, int lane) {
    constexpr uint32_t kEight = 0x48004800u;
    const auto minus = [](uint32_t a, uint32_t b) { return ptx::hadd2(a, b ^ 0x80008000u); };
    load_lane(unit + tile * (kHeadDim * 8), lane, codes_);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      // Zeros, then scales, of channels 2 t, 2 t + 1; the same of 2 t + 8, 2 t + 9.
      uint32_t now[4], first[4];
      load_words(unit + sections.k_scales + step * 64 + lane % 4 * 16, now);
      load_words(reference + step * 64 + lane % 4 * 16, first);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        scales_[step][c] = now[2 * c + 1];
        offsets_[step][c] = ptx::hfma2(minus(now[2 * c + 1], first[2 * c + 1]), kEight,
                                       minus(now[2 * c], first[2 * c]));
      }
    }
  }
  __device__ __forceinline__ void write(const TileTarget<true>& target) const {
    constexpr uint32_t kOne = 0x64006400u;  // 1024: codes n become 1024 + n, or 1024 + 16 n
    constexpr uint32_t kMinus1032 = 0xe408e408u;
    constexpr uint32_t kSixteenth = 0x2c002c00u;
    constexpr uint32_t kMinus72 = 0xd480d480u;  // -(1024 / 16 + 8)
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t low = codes_[step], high = codes_[step] >> 8;
      uint32_t a[4];
      a[0] = ptx::hadd2((low & 0x000f000fu) | kOne, kMinus1032);
      a[1] = ptx::hfma2((low & 0x00f000f0u) | kOne, kSixteenth, kMinus72);
      a[2] = ptx::hadd2((high & 0x000f000fu) | kOne, kMinus1032);
      a[3] = ptx::hfma2((high & 0x00f000f0u) | kOne, kSixteenth, kMinus72);
#pragma unroll
      for (int r = 0; r < 4; ++r)
        a[r] = ptx::hfma2(a[r], scales_[step][r / 2], offsets_[step][r / 2]);
      target.store(step, a);
    }
  }

 private:
  uint32_t codes_[kSteps];
  uint32_t scales_[kSteps][2];
  uint32_t offsets_[kSteps][2];
};

// Formats without scales, keys or values: their codes as FP16, or BF16 as it is.
template <Codes kCodes, int kHeadDim>
class PlainTile {
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kStepWords = code_bits(kCodes) / 4;

 public:
  __device__ __forceinline__ void load_codes(const std::byte* codes, int tile, int lane) {
    load_lane(codes + tile * (kHeadDim * 2 * code_bits(kCodes)), lane, words_);
  }
  template <bool kKeys>
  __device__ __forceinline__ void write(const TileTarget<kKeys>& target) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      if constexpr (kCodes == Codes::k16Bit) {
#pragma unroll
        for (int r = 0; r < 4; ++r) a[r] = words_[4 * step + r];
      } else {
        static_assert(kCodes == Codes::kE4m3);
        unpack_e4m3(words_[2 * step], words_[2 * step + 1], a);
      }
      target.store(step, a);
    }
  }

 private:
  uint32_t words_[kSteps * kStepWords];
};

template <KeyKernel kKernel, int kHeadDim>
class KeyTile : public PlainTile<key_codes(kKernel), kHeadDim> {
 public:
  __device__ __forceinline__ void load(const std::byte* unit, const StoredSections&,
                                       const std::byte*, int tile, int lane) {
    this->load_codes(unit, tile, lane);
  }
};

template <ValueKernel kKernel, int kHeadDim>
class ValueTile : public PlainTile<value_codes(kKernel), kHeadDim> {
 public:
  __device__ __forceinline__ void load(const std::byte* values, const StoredSections&, int tile,
                                       int lane) {
    this->load_codes(values, tile, lane);
  }
};

template <int kHeadDim>
class ValueTile<ValueKernel::kNvfp4, kHeadDim> {
  static constexpr int kSteps = kHeadDim / 16;

 public:
  __device__ __forceinline__ void load(const std::byte* values, const StoredSections& sections,
                                       int tile, int lane) {
    load_lane(values + tile * (kHeadDim * 8), lane, codes_);
    load_words(values + sections.v_scales + tile * 16 * kSteps + lane % 4 * 4 * kSteps, scales_);
  }
  __device__ __forceinline__ void write(const TileTarget<false>& target) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint2 pairs = scale_pairs<ValueKernel::kNvfp4>(scales_ + step);
      uint32_t a[4];
      unpack_e2m1(codes_[step], a);
      a[0] = ptx::hmul2(a[0], pairs.x);
      a[1] = ptx::hmul2(a[1], pairs.x);
      a[2] = ptx::hmul2(a[2], pairs.y);
      a[3] = ptx::hmul2(a[3], pairs.y);
      target.store(step, a);
    }
  }

 private:
  uint32_t codes_[kSteps];
  uint32_t scales_[kSteps];  // of tokens 2 t, 2 t + 1, 2 t + 8, 2 t + 9
};

}  // namespace kvant::backend::cuda
