// Rows of values whose greatest is easily mistaken: equals, zeros of both signs, ends, what is not
// finite. For tests of Backend::greatest_in_rows.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "kvant/backend/backend.h"
#include "kvant/backend/testing/random_matrix.h"

namespace kvant::backend::testing {

struct HardRows {
  int64_t num_rows = 0;
  int64_t num_cols = 0;
  std::vector<float> values;  // [num_rows][num_cols]

  // One value after the other.
  std::vector<RowMaximum> maxima() const {
    std::vector<RowMaximum> result;
    for (int64_t row = 0; row < num_rows; ++row) {
      const float* from = values.data() + row * num_cols;
      int64_t best = 0;
      for (int64_t i = 0; i < num_cols; ++i) {
        if (from[i] > from[best]) best = i;
      }
      for (int64_t i = 0; i < num_cols; ++i) {
        if (!std::isfinite(from[i])) best = -1;
      }
      result.push_back({best < 0 ? 0.0f : from[best], static_cast<int32_t>(best)});
    }
    return result;
  }
};

inline HardRows hard_rows(int64_t num_cols) {
  using Limits = std::numeric_limits<float>;
  constexpr int64_t kRows = 12;
  HardRows rows{kRows, num_cols, random_activations(kRows, num_cols, 5)};
  const auto at = [&](int64_t row, int64_t i) -> float& {
    return rows.values[static_cast<size_t>(row * num_cols + i % num_cols)];
  };
  const auto fill = [&](int64_t row, float value) {
    for (int64_t i = 0; i < num_cols; ++i) at(row, i) = value;
  };
  at(1, 0) = 99;
  at(2, num_cols - 1) = 99;
  for (const int64_t i : {num_cols / 2, num_cols / 3, num_cols - 1}) at(3, i) = 99;  // equals
  fill(4, -1e30f);
  fill(5, 0.0f);
  at(5, 0) = -0.0f;
  fill(6, Limits::lowest());
  at(7, num_cols / 2) = Limits::max();
  at(8, num_cols - 1) = Limits::infinity();
  at(9, 0) = -Limits::infinity();
  at(10, num_cols / 2) = Limits::quiet_NaN();
  fill(11, -Limits::infinity());
  return rows;
}

}  // namespace kvant::backend::testing
