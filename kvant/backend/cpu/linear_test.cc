// Products of every weight type against double sums, and the same bits at every level, number of
// rows and number of threads.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "kvant/backend/cpu/cpu_backend.h"
#include "kvant/backend/cpu/matrix.h"
#include "kvant/backend/testing/random_matrix.h"

namespace kvant::backend::cpu {
namespace {

using formats::WeightType;
using formats::WeightTypeInfo;
using testing::random_activations;
using testing::random_matrix;
using testing::RandomMatrix;

std::vector<CpuLevel> levels() {
  std::vector<CpuLevel> all;
  for (CpuLevel level : kCpuLevels) {
    if (level <= detect_cpu_level()) all.push_back(level);
  }
  return all;
}

std::unique_ptr<CpuBackend> make_backend(CpuLevel level, int threads, int64_t rows, int cols) {
  CpuOptions options;
  options.level = level;
  options.num_threads = threads;
  auto backend = std::make_unique<CpuBackend>(options);
  WorkspaceNeeds needs;
  needs.max_rows = rows;
  needs.max_cols = cols;
  EXPECT_TRUE(backend->reserve_workspace(needs));
  return backend;
}

std::vector<float> multiply(CpuBackend& backend, const RandomMatrix& matrix,
                            const std::vector<float>& x, int64_t num_rows,
                            const float* bias = nullptr) {
  auto loaded = backend.load_matrix(matrix.source());
  EXPECT_TRUE(loaded) << loaded.error().message();
  std::vector<float> out(static_cast<size_t>(num_rows * matrix.rows), -1e9f);
  LinearTarget target;
  target.matrix = loaded->get();
  target.bias = bias;
  target.out = out.data();
  EXPECT_TRUE(backend.linear(x.data(), num_rows, {&target, 1}));
  return out;
}

// A few widths per type: whole blocks for the quantised, anything for floats.
std::vector<int64_t> widths(const WeightTypeInfo& info) {
  if (info.block_elements == 1) return {1, 33, 576};
  if (info.block_elements == 32) return {32, 576};
  return {256, 768};
}

// The largest error that rounding can cause: activations to half a step of 1/16256 of their block's
// largest magnitude, sums in fp32.
double tolerance(const float* w, const float* x, int64_t cols, bool quantised) {
  double bound = 0.0;
  for (int64_t first = 0; first < cols; first += 32) {
    double amax = 0.0;
    double weights = 0.0;
    double products = 0.0;
    for (int64_t i = first; i < std::min(cols, first + 32); ++i) {
      amax = std::max(amax, std::fabs(static_cast<double>(x[i])));
      weights += std::fabs(static_cast<double>(w[i]));
      products += std::fabs(static_cast<double>(w[i]) * static_cast<double>(x[i]));
    }
    if (quantised) bound += weights * amax / 16256 * 0.5001;
    bound += (products + 32 * amax * weights / 32) * 0x1p-20;
  }
  return bound;
}

void expect_close(const RandomMatrix& matrix, const std::vector<float>& x, int64_t num_rows,
                  const std::vector<float>& out) {
  const std::vector<float> w = matrix.values();
  const bool quantised = formats::weight_type_info(matrix.type).block_elements > 1;
  double error2 = 0.0;
  double norm2 = 0.0;
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t i = 0; i < matrix.rows; ++i) {
      double exact = 0.0;
      for (int64_t j = 0; j < matrix.cols; ++j) {
        exact += static_cast<double>(w[static_cast<size_t>(i * matrix.cols + j)]) *
                 static_cast<double>(x[static_cast<size_t>(r * matrix.cols + j)]);
      }
      const double error =
          static_cast<double>(out[static_cast<size_t>(r * matrix.rows + i)]) - exact;
      const double bound =
          tolerance(&w[static_cast<size_t>(i * matrix.cols)],
                    &x[static_cast<size_t>(r * matrix.cols)], matrix.cols, quantised);
      ASSERT_LE(std::fabs(error), bound)
          << formats::weight_type_name(matrix.type) << " " << matrix.rows << " x " << matrix.cols
          << ", row " << r << ", output " << i << ": " << exact + error << " not " << exact;
      error2 += error * error;
      norm2 += exact * exact;
    }
  }
  // Uniform rounding errors of one block are at most sqrt(32 / 12) / 16256 = 1e-4 of its norm;
  // outputs of random signs can be smaller than that norm.
  EXPECT_LE(std::sqrt(error2 / norm2), quantised ? 3e-4 : 1e-6)
      << formats::weight_type_name(matrix.type);
}

TEST(Linear, EveryTypeIsCloseToDouble) {
  for (const WeightTypeInfo& info : formats::weight_types()) {
    for (const int64_t cols : widths(info)) {
      for (const int64_t rows : {1, 16, 45}) {
        const RandomMatrix matrix = random_matrix(info.type, rows, cols, 7);
        const std::vector<float> x = random_activations(3, cols, 8);
        auto backend = make_backend(detect_cpu_level(), 2, 3, static_cast<int>(cols));
        expect_close(matrix, x, 3, multiply(*backend, matrix, x, 3));
      }
    }
  }
}

TEST(Linear, SameBitsForAnyRowsThreadsAndLevel) {
  constexpr int64_t kRows = 33;
  for (const WeightTypeInfo& info : formats::weight_types()) {
    const int64_t cols = info.block_elements == 1 ? 45 : 512;
    const RandomMatrix matrix = random_matrix(info.type, 61, cols, 9);
    const std::vector<float> x = random_activations(kRows, cols, 10);
    auto first = make_backend(CpuLevel::kScalar, 1, 1, static_cast<int>(cols));
    std::vector<float> expected;
    for (int64_t r = 0; r < kRows; ++r) {
      const std::vector<float> row(x.begin() + r * cols, x.begin() + (r + 1) * cols);
      const std::vector<float> out = multiply(*first, matrix, row, 1);
      expected.insert(expected.end(), out.begin(), out.end());
    }
    for (const CpuLevel level : levels()) {
      for (const int threads : {1, 3}) {
        auto backend = make_backend(level, threads, kRows, static_cast<int>(cols));
        for (int64_t rows = 1; rows <= kRows; rows += threads == 1 ? 1 : 8) {
          const std::vector<float> out = multiply(*backend, matrix, x, rows);
          ASSERT_EQ(std::memcmp(out.data(), expected.data(), out.size() * sizeof(float)), 0)
              << info.name << ", " << rows << " rows, " << threads << " threads, "
              << cpu_level_name(level);
        }
      }
    }
  }
}

// Several chunks, wide panels that are full and not, rows behind them; tiles that are no whole
// group.
TEST(Linear, SameBitsOfManyRows) {
  constexpr int64_t kRows = 117;
  constexpr int64_t kOutputs = 150;
  const std::vector<float> bias = random_activations(1, kOutputs, 24);
  const std::vector<float> before = random_activations(kRows, kOutputs, 25);
  for (const WeightTypeInfo& info : formats::weight_types()) {
    const std::vector<int64_t> all_cols = info.block_elements == 256
                                              ? std::vector<int64_t>{256, 768}
                                              : std::vector<int64_t>{32, 64, 160, 288};
    for (const int64_t cols : all_cols) {
      const RandomMatrix matrix = random_matrix(info.type, kOutputs, cols, 26);
      const std::vector<float> x = random_activations(kRows, cols, 27);
      std::vector<float> expected;
      for (const CpuLevel level : levels()) {
        auto backend = make_backend(level, 2, kRows, static_cast<int>(cols));
        auto loaded = backend->load_matrix(matrix.source());
        ASSERT_TRUE(loaded);
        for (const int64_t rows : {kRows, int64_t{96}, int64_t{22}, int64_t{21}, int64_t{6}}) {
          std::vector<float> out = before;
          out.resize(static_cast<size_t>(rows * kOutputs));
          const LinearTarget target{loaded->get(), bias.data(), out.data(), true};
          ASSERT_TRUE(backend->linear(x.data(), rows, {&target, 1}));
          if (expected.empty()) expected = out;
          ASSERT_EQ(std::memcmp(out.data(), expected.data(), out.size() * sizeof(float)), 0)
              << info.name << ", " << cols << " columns, " << rows << " rows, "
              << cpu_level_name(level);
        }
      }
    }
  }
}

TEST(Linear, ManyRowsTakeSeveralChunks) {
  const RandomMatrix matrix = random_matrix(WeightType::kQ4_1, 40, 64, 11);
  const std::vector<float> x = random_activations(1000, 64, 12);
  auto large = make_backend(detect_cpu_level(), 2, 1000, 64);
  auto small = make_backend(detect_cpu_level(), 2, 7, 64);
  const std::vector<float> out = multiply(*large, matrix, x, 1000);
  EXPECT_EQ(out, multiply(*small, matrix, x, 1000));
  expect_close(matrix, x, 1000, out);
}

TEST(Linear, BiasAccumulateAndSeveralTargets) {
  constexpr int64_t kCols = 96;
  constexpr int64_t kRows = 5;
  const std::vector<float> x = random_activations(kRows, kCols, 13);
  for (const CpuLevel level : levels()) {
    auto backend = make_backend(level, 2, kRows, kCols);
    const RandomMatrix a = random_matrix(WeightType::kQ5_0, 37, kCols, 14);
    const RandomMatrix b = random_matrix(WeightType::kF16, 20, kCols, 15);
    const std::vector<float> plain_a = multiply(*backend, a, x, kRows);
    const std::vector<float> plain_b = multiply(*backend, b, x, kRows);
    const std::vector<float> bias = random_activations(1, 37, 16);
    std::vector<float> out_a = random_activations(kRows, 37, 17);
    const std::vector<float> before = out_a;
    std::vector<float> out_b(static_cast<size_t>(kRows * 20));
    auto loaded_a = backend->load_matrix(a.source());
    auto loaded_b = backend->load_matrix(b.source());
    ASSERT_TRUE(loaded_a && loaded_b);
    const LinearTarget targets[2] = {{loaded_a->get(), bias.data(), out_a.data(), true},
                                     {loaded_b->get(), nullptr, out_b.data(), false}};
    ASSERT_TRUE(backend->linear(x.data(), kRows, targets));
    EXPECT_EQ(out_b, plain_b);
    for (size_t i = 0; i < out_a.size(); ++i) {
      EXPECT_EQ(out_a[i], before[i] + (plain_a[i] + bias[i % 37])) << i;
    }
  }
}

TEST(Linear, RowOrderMovesRows) {
  const RandomMatrix matrix = random_matrix(WeightType::kQ4_K, 20, 256, 18);
  std::vector<int32_t> order;
  for (int32_t i = 0; i < 20; ++i) order.push_back(19 - i);
  MatrixSource source = matrix.source();
  source.row_order = order;
  const std::vector<float> x = random_activations(1, 256, 19);
  auto backend = make_backend(detect_cpu_level(), 1, 1, 256);
  std::vector<float> expected = multiply(*backend, matrix, x, 1);
  std::reverse(expected.begin(), expected.end());
  auto loaded = backend->load_matrix(source);
  ASSERT_TRUE(loaded);
  std::vector<float> out(20);
  const LinearTarget target{loaded->get(), nullptr, out.data(), false};
  ASSERT_TRUE(backend->linear(x.data(), 1, {&target, 1}));
  EXPECT_EQ(out, expected);
}

// Blocks of zeros, of tiny values and of huge ones; NaN and Inf in an activation reach every
// output.
TEST(Linear, ExtremeActivations) {
  for (const CpuLevel level : levels()) {
    auto backend = make_backend(level, 1, 1, 64);
    const RandomMatrix matrix = random_matrix(WeightType::kQ8_0, 16, 64, 20);
    EXPECT_EQ(multiply(*backend, matrix, std::vector<float>(64, 0.0f), 1),
              std::vector<float>(16, 0.0f));
    EXPECT_EQ(multiply(*backend, matrix, std::vector<float>(64, 1e-35f), 1),
              std::vector<float>(16, 0.0f));
    std::vector<float> x(64, 1e30f);
    for (float v : multiply(*backend, matrix, x, 1)) EXPECT_TRUE(std::isfinite(v));
    for (const float bad : {std::nanf(""), INFINITY, -INFINITY}) {
      x = random_activations(1, 64, 21);
      x[40] = bad;
      for (float v : multiply(*backend, matrix, x, 1)) EXPECT_TRUE(std::isnan(v)) << bad;
    }
    // Among other rows it stays where it is; zeros, tiny and huge values too.
    auto wide = make_backend(level, 1, 16, 64);
    x = random_activations(16, 64, 28);
    x[5 * 64 + 40] = INFINITY;
    std::fill_n(x.begin() + 6 * 64, 64, 0.0f);
    std::fill_n(x.begin() + 7 * 64, 64, 1e-35f);
    std::fill_n(x.begin() + 8 * 64, 64, 1e30f);
    const std::vector<float> out = multiply(*wide, matrix, x, 16);
    for (int64_t r = 0; r < 16; ++r) {
      const std::vector<float> row(x.begin() + r * 64, x.begin() + (r + 1) * 64);
      const std::vector<float> alone = multiply(*backend, matrix, row, 1);
      for (int64_t i = 0; i < 16; ++i) {
        const float v = out[static_cast<size_t>(16 * r + i)];
        if (r == 5) {
          EXPECT_TRUE(std::isnan(v));
        } else {
          EXPECT_EQ(v, alone[static_cast<size_t>(i)]) << r;
        }
      }
    }
  }
}

TEST(Matrix, BytesAreWhatIsAllocated) {
  for (const WeightTypeInfo& info : formats::weight_types()) {
    const RandomMatrix matrix = random_matrix(info.type, 576, 1536, 22);
    auto backend = make_backend(detect_cpu_level(), 1, 1, 1536);
    const int64_t workspace = backend->memory().stats().total_now;
    auto loaded = backend->load_matrix(matrix.source());
    ASSERT_TRUE(loaded);
    EXPECT_EQ((*loaded)->memory_bytes(), backend->matrix_bytes(matrix.source()));
    EXPECT_EQ(backend->memory().stats().total_now - workspace, (*loaded)->memory_bytes());
    const double ratio =
        static_cast<double>((*loaded)->memory_bytes()) / static_cast<double>(matrix.bytes.size());
    EXPECT_GE(ratio, 1.0);
    EXPECT_LE(ratio, 1.03) << info.name;
    loaded->reset();
    EXPECT_EQ(backend->memory().stats().total_now, workspace);
  }
}

TEST(Matrix, BadSourcesAreErrors) {
  auto backend = make_backend(CpuLevel::kScalar, 1, 1, 64);
  const RandomMatrix matrix = random_matrix(WeightType::kQ4_0, 4, 64, 23);
  MatrixSource source = matrix.source();
  source.bytes = source.bytes.first(source.bytes.size() - 1);
  EXPECT_EQ(backend->load_matrix(source).error().code(), ErrorCode::kInvalidArgument);
  source = matrix.source();
  source.cols = 48;
  EXPECT_EQ(backend->load_matrix(source).error().code(), ErrorCode::kInvalidArgument);
  source = matrix.source();
  const std::vector<int32_t> order = {0, 1, 2, 4};
  source.row_order = order;
  EXPECT_EQ(backend->load_matrix(source).error().code(), ErrorCode::kInvalidArgument);
  CpuOptions options;
  options.memory_limit = 100;
  CpuBackend limited(options);
  EXPECT_EQ(limited.load_matrix(matrix.source()).error().code(), ErrorCode::kResourceExhausted);
}

}  // namespace
}  // namespace kvant::backend::cpu
