// Random matrices of every weight type in the file's bytes, with scales of sensible size. For tests
// and benchmarks.
#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kvant/backend/backend.h"
#include "kvant/base/small_floats.h"
#include "kvant/formats/weight_types.h"

namespace kvant::backend::testing {

struct RandomMatrix {
  formats::WeightType type;
  int64_t rows;
  int64_t cols;
  std::vector<std::byte> bytes;

  MatrixSource source() const {
    return {formats::weight_type_name(type), type, rows, cols, bytes, {}};
  }
  // Exact values, [rows][cols].
  std::vector<float> values() const {
    std::vector<float> out(static_cast<size_t>(rows * cols));
    const int64_t row_bytes = formats::weight_bytes(type, cols);
    for (int64_t row = 0; row < rows; ++row) {
      formats::dequantize_row(type, bytes.data() + row * row_bytes, cols, out.data() + row * cols);
    }
    return out;
  }
};

// Offsets of the f16 scales in one block.
inline std::vector<size_t> scale_offsets(formats::WeightType type) {
  using formats::WeightType;
  switch (type) {
    case WeightType::kQ4_0:
    case WeightType::kQ5_0:
    case WeightType::kQ8_0: return {0};
    case WeightType::kQ4_1:
    case WeightType::kQ5_1:
    case WeightType::kQ4_K:
    case WeightType::kQ5_K: return {0, 2};
    case WeightType::kQ6_K: return {208};
    default: return {};
  }
}

inline RandomMatrix random_matrix(formats::WeightType type, int64_t rows, int64_t cols,
                                  uint32_t seed) {
  using formats::WeightType;
  RandomMatrix matrix{type, rows, cols, {}};
  matrix.bytes.resize(static_cast<size_t>(formats::weight_bytes(type, rows, cols)));
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  const auto put = [&](size_t at, auto value) {
    std::memcpy(matrix.bytes.data() + at, &value, sizeof(value));
  };
  const size_t n = matrix.bytes.size();
  switch (type) {
    case WeightType::kF32:
      for (size_t i = 0; i < n; i += 4) put(i, uniform(random));
      return matrix;
    case WeightType::kF16:
      for (size_t i = 0; i < n; i += 2) put(i, to_f16(uniform(random)));
      return matrix;
    case WeightType::kBF16:
      for (size_t i = 0; i < n; i += 2) put(i, to_bf16(uniform(random)));
      return matrix;
    case WeightType::kF8_E4M3:  // every code but NaN, scales of both signs
      for (std::byte& byte : matrix.bytes) {
        do byte = static_cast<std::byte>(random());
        while ((byte & std::byte{0x7f}) == std::byte{0x7f});
      }
      for (int64_t row = 0; row < rows; ++row) {
        put(static_cast<size_t>(formats::weight_bytes(type, row, cols)), 0.01f * uniform(random));
      }
      return matrix;
    default: break;
  }
  for (std::byte& byte : matrix.bytes) byte = static_cast<std::byte>(random());
  const size_t block = static_cast<size_t>(formats::weight_type_info(type).block_bytes);
  for (size_t at = 0; at < n; at += block) {
    for (size_t offset : scale_offsets(type)) put(at + offset, to_f16(0.01f * uniform(random)));
  }
  return matrix;
}

// Values with blocks of very different size and a few outliers, as activations have.
inline std::vector<float> random_activations(int64_t rows, int64_t cols, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(rows * cols));
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = normal(random) * std::ldexp(1.0f, static_cast<int>(i / 32 % 9) - 4);
    if (random() % 97 == 0) x[i] *= 50.0f;
  }
  return x;
}

}  // namespace kvant::backend::testing
