// What devices find in rows in place of their values, against the slow way: rows that are peaked,
// flat, full of equals, at the ends of what floats hold, of many widths.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "kvant/backend/cuda/testing/cache_on_device.h"
#include "kvant/backend/testing/hard_rows.h"

namespace kvant::backend::cuda {
namespace {

using Kind = RowQuery::Kind;

// Rows of values and the memory for what is found in them.
class Asked {
 public:
  Asked(Backend& backend, std::vector<float> values, int64_t num_rows)
      : backend_(backend),
        values_(std::move(values)),
        num_rows_(num_rows),
        width_(static_cast<size_t>(std::ssize(values_) / num_rows)) {
    rows_ = buffer(values_.size() * sizeof(float), MemoryUse::kOther);
    queries_ = buffer(count() * sizeof(RowQuery), MemoryUse::kTables);
    maxima_ = buffer(count() * sizeof(RowMaximum), MemoryUse::kTables);
    choices_ = buffer(count() * sizeof(RowChoice), MemoryUse::kTables);
    candidates_ = buffer(count() * kMostCandidates * sizeof(RowMaximum), MemoryUse::kTables);
    copies_ = buffer(values_.size() * sizeof(float), MemoryUse::kTables);
    EXPECT_TRUE(backend.upload_f32(values_.data(), std::ssize(values_), rows_.data()));
  }
  void ask(const std::vector<RowQuery>& queries) {
    std::copy(queries.begin(), queries.end(), queries_.as<RowQuery>());
    std::memset(copies_.data(), 0xff, static_cast<size_t>(copies_.bytes()));
    const RowAnswers answers{maxima_.as<RowMaximum>(), choices_.as<RowChoice>(),
                             candidates_.as<RowMaximum>(), copies_.as<float>()};
    ASSERT_TRUE(backend_.answer_queries(rows_.data(), num_rows_, static_cast<int64_t>(width_),
                                        queries_.as<RowQuery>(), answers));
    ASSERT_TRUE(backend_.synchronize());
  }
  size_t count() const { return static_cast<size_t>(num_rows_); }
  std::span<const float> row(size_t i) const {
    return std::span(values_).subspan(i * width_, width_);
  }
  std::span<const float> copy(size_t i) { return {copies_.as<float>() + i * width_, width_}; }
  const RowMaximum& maximum(size_t i) { return maxima_.as<RowMaximum>()[i]; }
  const RowChoice& choice(size_t i) { return choices_.as<RowChoice>()[i]; }
  const RowMaximum* candidates(size_t i) {
    return candidates_.as<RowMaximum>() + i * kMostCandidates;
  }

 private:
  Buffer buffer(size_t bytes, MemoryUse use) {
    auto made = Buffer::create(backend_.memory(), static_cast<int64_t>(bytes), use);
    EXPECT_TRUE(made);
    return std::move(*made);
  }
  Backend& backend_;
  std::vector<float> values_;
  int64_t num_rows_;
  size_t width_;
  Buffer rows_, queries_, maxima_, choices_, candidates_, copies_;
};

// The first kRandomRows have few equals, the others many.
constexpr size_t kRandomRows = 5;
constexpr size_t kNumRows = 12;
std::vector<float> many_rows(size_t width) {
  std::mt19937 random(77);
  std::normal_distribution<float> normal(0, 1);
  std::vector<float> rows(kNumRows * width);
  const auto fill = [&](size_t row, const auto& value) {
    for (size_t i = 0; i < width; ++i) rows[row * width + i] = value(i);
  };
  fill(0, [&](size_t) { return 3 * normal(random); });
  fill(1, [&](size_t) { return 0.05f * normal(random); });
  fill(2, [&](size_t) { return normal(random) - 200; });
  fill(3, [&](size_t) { return 6 * normal(random); });
  fill(4, [&](size_t) { return 1e4f * normal(random); });
  fill(5, [&](size_t i) { return (i < 64 ? 20.0f : 0.0f) + normal(random); });
  fill(6, [&](size_t) { return std::round(2 * normal(random)) / 2; });
  fill(7, [&](size_t) { return 1.5f; });
  fill(8, [&](size_t i) { return i == width * 2 / 3 ? 30.0f : 0.0f; });
  fill(9, [&](size_t i) { return i == width / 3 ? 1e38f : std::numeric_limits<float>::lowest(); });
  fill(10, [&](size_t i) { return i % 3 == 1 ? -0.0f : 0.0f; });
  fill(11, [&](size_t i) { return -0.01f * static_cast<float>(i); });
  return rows;
}

class CudaChoose : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string reason = testing::no_device_reason();
    if (!reason.empty()) GTEST_SKIP() << reason;
    auto backend = create_backend({.name = "cuda"});
    ASSERT_TRUE(backend) << backend.error().message();
    backend_ = std::move(*backend);
    ASSERT_TRUE(backend_->info().has_queries);
  }
  // As the slow way, or not found and copied where that may be.
  static void expect_answer(Asked& asked, size_t i, const RowQuery& query) {
    std::vector<RowMaximum> candidates(asked.row(i).size());
    const RowChoice expected = answer_query(asked.row(i), query, candidates);
    const RowMaximum greatest = greatest_value(asked.row(i));
    EXPECT_EQ(asked.maximum(i).index, greatest.index);
    EXPECT_EQ(asked.maximum(i).value, greatest.value);
    const RowChoice& choice = asked.choice(i);
    if (!choice.found()) {
      const int most = i < kRandomRows ? (query.kind == Kind::kNear ? kMostCandidates : 300) : 0;
      EXPECT_NE(query.kind, Kind::kDraw);
      EXPECT_TRUE(!expected.found() || expected.num_candidates > most) << expected.num_candidates;
      EXPECT_TRUE(std::ranges::equal(asked.copy(i), asked.row(i)));
      return;
    }
    EXPECT_EQ(choice.total, expected.total);
    EXPECT_EQ(choice.drawn, expected.drawn);
    ASSERT_EQ(choice.num_candidates, expected.num_candidates);
    for (int j = 0; j < expected.num_candidates; ++j) {
      EXPECT_EQ(asked.candidates(i)[j].value, candidates[static_cast<size_t>(j)].value) << j;
      EXPECT_EQ(asked.candidates(i)[j].index, candidates[static_cast<size_t>(j)].index) << j;
    }
    EXPECT_TRUE(std::ranges::all_of(asked.copy(i), [](float v) { return std::isnan(v); }));
  }
  std::unique_ptr<Backend> backend_;
};

TEST_F(CudaChoose, FindsWhatTheSlowWayFinds) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  std::vector<RowQuery> queries;
  for (const float scale : {1.0f, 1.25f, 0.2f, 1e4f, 1e-39f}) {
    for (const double uniform : {0.0, 0.37, 0.92, 1 - 0x1p-53}) {
      queries.push_back({.kind = Kind::kDraw, .scale = scale, .uniform = uniform});
    }
  }
  for (const int32_t k : {1, 2, 40, 200, kMostCandidates}) {
    queries.push_back({.kind = Kind::kTopK, .top_k = k});
  }
  for (const float below : {0.0f, -0.05f, -3.0f, -kInfinity}) {
    queries.push_back({.kind = Kind::kNear, .below = below});
  }
  for (const double top_p : {0.1, 0.9, 0.9999}) {
    for (const float scale : {1.0f, 2.5f}) {
      queries.push_back({.kind = Kind::kTopP, .scale = scale, .top_p = top_p});
    }
  }
  for (const size_t width : {1, 3, 64, 257, 1000, 4100, 49152, 151936, 151937}) {
    Asked asked(*backend_, many_rows(width), kNumRows);
    for (const RowQuery& query : queries) {
      if (query.kind == Kind::kTopK && static_cast<size_t>(query.top_k) > width) continue;
      asked.ask(std::vector<RowQuery>(kNumRows, query));
      for (size_t i = 0; i < kNumRows; ++i) {
        SCOPED_TRACE(::testing::Message()
                     << "width " << width << ", row " << i << ", kind "
                     << static_cast<int>(query.kind) << ", top_k " << query.top_k << ", below "
                     << query.below << ", top_p " << query.top_p << ", scale " << query.scale
                     << ", uniform " << query.uniform);
        expect_answer(asked, i, query);
        if (HasFatalFailure() || ::testing::Test::HasFailure()) return;
      }
    }
  }
}

// Rows of one call with different queries have the answers that they have alone.
TEST_F(CudaChoose, RowsHaveQueriesOfTheirOwn) {
  constexpr size_t kWidth = 5000;
  Asked asked(*backend_, many_rows(kWidth), kNumRows);
  std::vector<RowQuery> queries(kNumRows);
  queries[0] = {.kind = Kind::kTopK, .top_k = 17};
  queries[1] = {.kind = Kind::kDraw, .scale = 0.7f, .uniform = 0.6};
  queries[3] = {.kind = Kind::kNear, .below = -4};
  queries[4] = {.kind = Kind::kTopP, .scale = 1, .top_p = 0.7};
  queries[7] = {.kind = Kind::kTopK, .top_k = 40};  // equals: copied
  asked.ask(queries);
  for (const size_t i : {0, 1, 3, 4, 7}) expect_answer(asked, i, queries[i]);
  for (const size_t i : {2, 5, 6, 8}) {
    EXPECT_FALSE(asked.choice(i).found());
    EXPECT_EQ(asked.maximum(i).index, greatest_value(asked.row(i)).index);
    EXPECT_TRUE(std::isnan(asked.copy(i)[0])) << "nobody asked for it";
  }
}

TEST_F(CudaChoose, WhatIsNotFiniteIsNoticed) {
  for (const int64_t cols : {1, 17, 1024, 49152}) {
    const backend::testing::HardRows rows = backend::testing::hard_rows(cols);
    const std::vector<RowMaximum> expected = rows.maxima();
    Asked asked(*backend_, rows.values, rows.num_rows);
    for (const Kind kind : {Kind::kDraw, Kind::kTopK, Kind::kNear, Kind::kTopP}) {
      RowQuery query{.kind = kind, .top_k = 1, .below = -1, .top_p = 0.5, .uniform = 0.5};
      asked.ask(std::vector<RowQuery>(asked.count(), query));
      for (size_t i = 0; i < expected.size(); ++i) {
        EXPECT_EQ(asked.maximum(i).index, expected[i].index) << cols << ", row " << i;
        EXPECT_EQ(asked.maximum(i).value, expected[i].value) << cols << ", row " << i;
        EXPECT_TRUE(expected[i].index >= 0 || !asked.choice(i).found());
      }
    }
  }
}

TEST_F(CudaChoose, DrawsWithTheProbabilitiesOfSoftmax) {
  constexpr size_t kWidth = 300;
  constexpr size_t kRows = 4096;
  constexpr int kCalls = 16;
  constexpr size_t kClasses = 20;  // of 15 indices each
  std::mt19937 random(5);
  std::normal_distribution<float> normal(0, 1.5f);
  std::vector<float> row(kWidth);
  for (float& value : row) value = normal(random);
  std::vector<float> rows;
  for (size_t i = 0; i < kRows; ++i) rows.insert(rows.end(), row.begin(), row.end());
  Asked asked(*backend_, std::move(rows), kRows);
  constexpr double kTemperature = 0.8;
  std::vector<double> share(kClasses);
  double sum = 0;
  for (size_t i = 0; i < kWidth; ++i) {
    const double weight = std::exp(static_cast<double>(row[i]) / kTemperature);
    share[i % kClasses] += weight;
    sum += weight;
  }
  std::mt19937_64 numbers(6);
  std::uniform_real_distribution<double> uniform(0, 1);
  std::vector<double> drawn(kClasses);
  for (int call = 0; call < kCalls; ++call) {
    std::vector<RowQuery> queries(
        kRows, {.kind = Kind::kDraw, .scale = static_cast<float>(1 / kTemperature)});
    for (RowQuery& query : queries) query.uniform = uniform(numbers);
    asked.ask(queries);
    for (size_t i = 0; i < kRows; ++i) {
      ASSERT_GE(asked.choice(i).drawn, 0);
      ++drawn[static_cast<size_t>(asked.choice(i).drawn) % kClasses];
    }
  }
  double chi_square = 0;
  for (size_t i = 0; i < kClasses; ++i) {
    const double expected = share[i] / sum * kRows * kCalls;
    chi_square += (drawn[i] - expected) * (drawn[i] - expected) / expected;
  }
  EXPECT_LT(chi_square, 43.8) << "19 degrees of freedom: one in a thousand is above";
}

}  // namespace
}  // namespace kvant::backend::cuda
