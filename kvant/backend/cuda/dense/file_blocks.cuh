// The blocks of GGUF files, read one element at a time: codes as signed integers, and the scale and
// offset they belong to. value = scale * code + offset with one rounding each, as
// formats::dequantize_row has it. Used when weights are repacked and when rows are embedded.
#pragma once

#include <cstdint>

#include "kvant/base/small_floats.h"
#include "kvant/formats/weight_types.h"

namespace kvant::backend::cuda {

using formats::WeightType;

__device__ inline uint32_t byte_pair(const uint8_t* p) {
  return p[0] | static_cast<uint32_t>(p[1]) << 8;
}
__device__ inline float file_f16(const uint8_t* p) {
  return from_f16(static_cast<uint16_t>(byte_pair(p)));
}

struct ScaleAndOffset {
  float scale;
  float offset;
};

// 6-bit scale and minimum of sub-block j (0..7) of Q4_K and Q5_K.
__device__ inline void scale_and_minimum(const uint8_t* p, int j, int* scale, int* minimum) {
  if (j < 4) {
    *scale = p[j] & 63;
    *minimum = p[j + 4] & 63;
  } else {
    *scale = (p[j + 4] & 15) | (p[j - 4] >> 6) << 4;
    *minimum = (p[j + 4] >> 4) | (p[j] >> 6) << 4;
  }
}

template <WeightType kType>
struct FileBlock;

// Nibbles of a block of 32: byte j holds element j (low) and element j + 16 (high).
__device__ inline int nibble_of_32(const uint8_t* nibbles, int i) {
  return (nibbles[i % 16] >> (4 * (i / 16))) & 15;
}

template <>
struct FileBlock<WeightType::kQ4_0> {
  static constexpr int kElements = 32, kBytes = 18;
  static __device__ int code(const uint8_t* b, int i) { return nibble_of_32(b + 2, i) - 8; }
  static __device__ ScaleAndOffset scale(const uint8_t* b, int) { return {file_f16(b), 0.0f}; }
};

template <>
struct FileBlock<WeightType::kQ4_1> {
  static constexpr int kElements = 32, kBytes = 20;
  static __device__ int code(const uint8_t* b, int i) { return nibble_of_32(b + 4, i); }
  static __device__ ScaleAndOffset scale(const uint8_t* b, int) {
    return {file_f16(b), file_f16(b + 2)};
  }
};

template <>
struct FileBlock<WeightType::kQ5_0> {
  static constexpr int kElements = 32, kBytes = 22;
  static __device__ int code(const uint8_t* b, int i) {
    return (nibble_of_32(b + 6, i) | ((b[2 + i / 8] >> (i % 8)) & 1) << 4) - 16;
  }
  static __device__ ScaleAndOffset scale(const uint8_t* b, int) { return {file_f16(b), 0.0f}; }
};

template <>
struct FileBlock<WeightType::kQ5_1> {
  static constexpr int kElements = 32, kBytes = 24;
  static __device__ int code(const uint8_t* b, int i) {
    return nibble_of_32(b + 8, i) | ((b[4 + i / 8] >> (i % 8)) & 1) << 4;
  }
  static __device__ ScaleAndOffset scale(const uint8_t* b, int) {
    return {file_f16(b), file_f16(b + 2)};
  }
};

template <>
struct FileBlock<WeightType::kQ8_0> {
  static constexpr int kElements = 32, kBytes = 34;
  static __device__ int code(const uint8_t* b, int i) { return static_cast<int8_t>(b[2 + i]); }
  static __device__ ScaleAndOffset scale(const uint8_t* b, int) { return {file_f16(b), 0.0f}; }
};

// Blocks of 256: sub-block j of 32 has the low (j even) or high nibbles of 32 bytes.
template <>
struct FileBlock<WeightType::kQ4_K> {
  static constexpr int kElements = 256, kBytes = 144;
  static __device__ int code(const uint8_t* b, int i) {
    return (b[16 + 32 * (i / 64) + i % 32] >> (4 * (i / 32 % 2))) & 15;
  }
  static __device__ ScaleAndOffset scale(const uint8_t* b, int i) {
    int s, m;
    scale_and_minimum(b + 4, i / 32, &s, &m);
    return {file_f16(b) * static_cast<float>(s), -(file_f16(b + 2) * static_cast<float>(m))};
  }
};

template <>
struct FileBlock<WeightType::kQ5_K> {
  static constexpr int kElements = 256, kBytes = 176;
  static __device__ int code(const uint8_t* b, int i) {
    const int low = (b[48 + 32 * (i / 64) + i % 32] >> (4 * (i / 32 % 2))) & 15;
    return low | ((b[16 + i % 32] >> (i / 32)) & 1) << 4;
  }
  static __device__ ScaleAndOffset scale(const uint8_t* b, int i) {
    return FileBlock<WeightType::kQ4_K>::scale(b, i);
  }
};

template <>
struct FileBlock<WeightType::kQ6_K> {
  static constexpr int kElements = 256, kBytes = 210;
  static __device__ int code(const uint8_t* b, int element) {
    const int half = element / 128;
    const int group = element % 128 / 32;
    const int i = element % 32;
    const int low = (b[64 * half + 32 * (group % 2) + i] >> (4 * (group / 2))) & 15;
    const int high = (b[128 + 32 * half + i] >> (2 * group)) & 3;
    return (low | high << 4) - 32;
  }
  static __device__ ScaleAndOffset scale(const uint8_t* b, int i) {
    return {file_f16(b + 208) * static_cast<float>(static_cast<int8_t>(b[192 + i / 16])), 0.0f};
  }
};

// Codes behind the head of a row, which is their scale; they are multiplied as they are.
template <>
struct FileBlock<WeightType::kF8_E4M3> {
  static constexpr int kElements = 1, kBytes = 1;
  static __device__ int code(const uint8_t* b, int) { return b[0]; }
};
__device__ inline float row_head_scale(const uint8_t* row) {
  return __uint_as_float(byte_pair(row) | byte_pair(row + 2) << 16);
}

// Element `i` of a row of file bytes, exactly as formats::dequantize_row.
template <WeightType kType>
__device__ inline float file_value(const uint8_t* row, int64_t i) {
  if constexpr (kType == WeightType::kF32) {
    return __uint_as_float(byte_pair(row + 4 * i) | byte_pair(row + 4 * i + 2) << 16);
  } else if constexpr (kType == WeightType::kF16) {
    return file_f16(row + 2 * i);
  } else if constexpr (kType == WeightType::kBF16) {
    return from_bf16(static_cast<uint16_t>(byte_pair(row + 2 * i)));
  } else if constexpr (kType == WeightType::kF8_E4M3) {
    constexpr int64_t kHead = formats::row_head_bytes(kType);
    return row_head_scale(row) * from_e4m3(row[kHead + i]);
  } else {
    using Block = FileBlock<kType>;
    const uint8_t* block = row + i / Block::kElements * Block::kBytes;
    const int at = static_cast<int>(i % Block::kElements);
    const ScaleAndOffset s = Block::scale(block, at);
    const float product = s.scale * static_cast<float>(Block::code(block, at));
    return s.offset == 0.0f ? product : product + s.offset;
  }
}

// f(std::integral_constant<WeightType, type>()) for the type at hand.
template <template <WeightType> class Tag, typename F>
auto for_weight_type(WeightType type, F&& f) {
  switch (type) {
    case WeightType::kF32: return f(Tag<WeightType::kF32>());
    case WeightType::kF16: return f(Tag<WeightType::kF16>());
    case WeightType::kQ4_0: return f(Tag<WeightType::kQ4_0>());
    case WeightType::kQ4_1: return f(Tag<WeightType::kQ4_1>());
    case WeightType::kQ5_0: return f(Tag<WeightType::kQ5_0>());
    case WeightType::kQ5_1: return f(Tag<WeightType::kQ5_1>());
    case WeightType::kQ8_0: return f(Tag<WeightType::kQ8_0>());
    case WeightType::kQ4_K: return f(Tag<WeightType::kQ4_K>());
    case WeightType::kQ5_K: return f(Tag<WeightType::kQ5_K>());
    case WeightType::kQ6_K: return f(Tag<WeightType::kQ6_K>());
    case WeightType::kF8_E4M3: return f(Tag<WeightType::kF8_E4M3>());
    case WeightType::kBF16: break;
  }
  return f(Tag<WeightType::kBF16>());
}

template <WeightType kType>
struct WeightTag {
  static constexpr WeightType kValue = kType;
};

}  // namespace kvant::backend::cuda
