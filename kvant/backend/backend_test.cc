// The operators of the CPU backend, at every SIMD level, against the reference backend.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "kvant/backend/cpu/cpu_backend.h"
#include "kvant/backend/cpu/moe.h"
#include "kvant/backend/cpu/rope_table.h"
#include "kvant/backend/reference/reference_backend.h"
#include "kvant/backend/testing/hard_rows.h"
#include "kvant/backend/testing/random_matrix.h"

namespace kvant::backend {
namespace {

using cpu::CpuBackend;
using cpu::CpuOptions;
using formats::WeightType;
using testing::random_activations;
using testing::random_matrix;
using testing::RandomMatrix;

WorkspaceNeeds small_needs() {
  WorkspaceNeeds needs;
  needs.max_rows = 40;
  needs.max_cols = 128;
  needs.head_dim = 96;
  needs.num_experts = 6;
  needs.num_experts_used = 3;
  needs.expert_dim = 64;
  return needs;
}

std::unique_ptr<CpuBackend> make_cpu(CpuLevel level, int threads) {
  CpuOptions options;
  options.level = level;
  options.num_threads = threads;
  auto backend = std::make_unique<CpuBackend>(options);
  EXPECT_TRUE(backend->reserve_workspace(small_needs()));
  return backend;
}

// The CPU backend at each level of this machine, with one and with three threads.
class CpuOperators : public ::testing::Test {
 protected:
  // f(backend) returns the operator's output: same bits from every CPU backend; close to the
  // reference's, relative to the largest value.
  template <typename F>
  void compare(double tolerance, F&& f) {
    const std::vector<float> expected = f(reference_);
    double largest = 0.0;
    for (float v : expected) largest = std::max(largest, std::fabs(static_cast<double>(v)));
    std::vector<float> first;
    for (CpuLevel level : kCpuLevels) {
      if (level > detect_cpu_level()) continue;
      for (const int threads : {1, 3}) {
        auto backend = make_cpu(level, threads);
        const std::vector<float> out = f(*backend);
        ASSERT_EQ(out.size(), expected.size());
        for (size_t i = 0; i < out.size(); ++i) {
          ASSERT_NEAR(out[i], expected[i], tolerance * largest)
              << "at " << i << ", " << backend->info().description;
        }
        if (first.empty()) first = out;
        EXPECT_EQ(std::memcmp(out.data(), first.data(), out.size() * sizeof(float)), 0)
            << backend->info().description;
      }
    }
  }

  reference::ReferenceBackend reference_{2, 0};
};

TEST_F(CpuOperators, RmsNorm) {
  for (const int dim : {1, 7, 16, 64, 100, 576}) {
    const std::vector<float> x = random_activations(9, dim, 1);
    const std::vector<float> weight = random_activations(1, dim, 2);
    compare(3e-7, [&](Backend& backend) {
      std::vector<float> out = x;
      RmsNormArgs args;
      args.x = out.data();  // in place
      args.weight = weight.data();
      args.out = out.data();
      args.num_rows = 9;
      args.dim = dim;
      args.epsilon = 1e-5f;
      EXPECT_TRUE(backend.rms_norm(args));
      return out;
    });
  }
}

TEST_F(CpuOperators, GreatestInRows) {
  for (const int64_t cols : {1, 3, 16, 17, 50, 64, 9001}) {
    const testing::HardRows rows = testing::hard_rows(cols);
    const std::vector<RowMaximum> expected = rows.maxima();
    const auto check = [&](Backend& backend) {
      std::vector<RowMaximum> found(static_cast<size_t>(rows.num_rows));
      EXPECT_TRUE(backend.greatest_in_rows(rows.values.data(), rows.num_rows, cols, found.data()));
      for (size_t i = 0; i < found.size(); ++i) {
        EXPECT_EQ(found[i].index, expected[i].index) << cols << ", row " << i;
        EXPECT_EQ(found[i].value, expected[i].value) << cols << ", row " << i;
      }
    };
    check(reference_);
    for (const int threads : {1, 3}) check(*make_cpu(CpuLevel::kScalar, threads));
  }
  EXPECT_EQ(greatest_value({}).index, -1);
}

TEST_F(CpuOperators, AnswersOfQueries) {
  using Kind = RowQuery::Kind;
  const std::vector<float> row = {std::log(0.1f), std::log(0.4f), std::log(0.1f), std::log(0.4f)};
  const auto ask = [&](const RowQuery& query) {
    std::vector<RowMaximum> candidates(4);
    const RowChoice choice = answer_query(row, query, candidates);
    std::vector<int32_t> ids = {choice.drawn};
    for (int i = 0; i < choice.num_candidates; ++i) {
      ids.push_back(candidates[static_cast<size_t>(i)].index);
    }
    return ids;
  };
  using Ids = std::vector<int32_t>;
  EXPECT_EQ(ask({.kind = Kind::kTopK, .top_k = 3}), (Ids{-1, 1, 3, 0}));
  EXPECT_EQ(ask({.kind = Kind::kNear, .below = -1}), (Ids{-1, 1, 3}));
  EXPECT_EQ(ask({.kind = Kind::kTopP, .top_p = 0.75}), (Ids{-1, 1, 3}));
  EXPECT_EQ(ask({.kind = Kind::kTopP, .top_p = 0.85}), (Ids{-1, 1, 3, 0}));
  EXPECT_EQ(ask({.kind = Kind::kDraw, .uniform = 0.05}), Ids{0});
  EXPECT_EQ(ask({.kind = Kind::kDraw, .uniform = 0.45}), Ids{1});
  EXPECT_EQ(ask({.kind = Kind::kDraw, .uniform = 0.55}), Ids{2});
  EXPECT_EQ(ask({.kind = Kind::kDraw, .uniform = 0.95}), Ids{3});
  EXPECT_EQ(ask({}), Ids{-1});

  const testing::HardRows rows = testing::hard_rows(2000);
  const auto count = static_cast<size_t>(rows.num_rows);
  std::vector<RowMaximum> maxima(count);
  std::vector<RowChoice> choices(count);
  std::vector<RowMaximum> candidates(count * kMostCandidates);
  std::vector<float> values(rows.values.size());
  const std::vector<RowQuery> queries(count, {.kind = Kind::kNear, .below = 0});
  EXPECT_TRUE(
      reference_.answer_queries(rows.values.data(), rows.num_rows, rows.num_cols, queries.data(),
                                {maxima.data(), choices.data(), candidates.data(), values.data()}));
  for (size_t i = 0; i < count; ++i) {
    const RowMaximum expected = rows.maxima()[i];
    EXPECT_EQ(maxima[i].index, expected.index);
    if (expected.index < 0) {
      EXPECT_FALSE(choices[i].found());
    } else if (i == 4 || i == 5 || i == 6) {  // equals, more than there is room for
      EXPECT_FALSE(choices[i].found());
      EXPECT_EQ(values[i * 2000 + 1999], rows.values[i * 2000 + 1999]);
    } else {
      EXPECT_EQ(candidates[i * kMostCandidates].index, expected.index);
    }
  }
}

TEST_F(CpuOperators, Rope) {
  std::vector<float> factors;
  for (int i = 0; i < 48; ++i) factors.push_back(1.0f + 0.1f * static_cast<float>(i));
  for (const int rotary : {96, 64, 10}) {
    const std::vector<float> q = random_activations(5 * 3, 96, 3);
    const std::vector<float> k = random_activations(5 * 2, 96, 4);
    const std::vector<int64_t> positions = {0, 1, 77, 8191, 1000003};
    compare(1e-6, [&](Backend& backend) {
      std::vector<float> all = q;
      all.insert(all.end(), k.begin(), k.end());
      RopeArgs args;
      args.q = all.data();
      args.k = all.data() + q.size();
      args.positions = positions.data();
      args.num_rows = 5;
      args.num_query_heads = 3;
      args.num_kv_heads = 2;
      args.head_dim = 96;
      args.rope.rotary_dim = rotary;
      args.rope.base = 5e5f;
      args.rope.position_scale = 0.125f;
      args.rope.frequency_factors = rotary == 96 ? factors.data() : nullptr;
      args.rope.attention_factor = 1.25f;
      EXPECT_TRUE(backend.rope(args));
      return all;
    });
  }
}

// Tables are kept between calls: other positions, other settings and fewer rows must not see old
// ones.
TEST(RopeTables, FollowsPositionsAndSettings) {
  std::vector<uint8_t> memory(static_cast<size_t>(cpu::RopeTables::workspace_bytes(8, 64)));
  cpu::RopeTables tables;
  tables.set_workspace(memory.data(), 8, 64);
  const auto check = [&](float base, std::vector<int64_t> positions, const float* factors) {
    attention::RopeParams rope;
    rope.rotary_dim = 64;
    rope.base = base;
    rope.frequency_factors = factors;
    const float* table = tables.get(rope, positions.data(), static_cast<int64_t>(positions.size()));
    std::vector<double> frequencies(32);
    cpu::RopeTables::compute_frequencies(rope, frequencies.data());
    std::vector<float> expected(64);
    for (size_t row = 0; row < positions.size(); ++row) {
      cpu::RopeTables::compute(rope, positions[row], frequencies.data(), expected.data());
      EXPECT_EQ(std::memcmp(table + row * 64, expected.data(), 64 * sizeof(float)), 0) << row;
    }
  };
  std::vector<float> factors(32, 2.0f);
  check(1e4f, {0, 1, 2, 3}, nullptr);
  check(1e6f, {0, 1, 2, 3}, nullptr);
  check(1e4f, {4}, nullptr);
  check(1e4f, {4, 1, 2, 7, 9, 10, 11, 12}, nullptr);
  check(1e4f, {4, 1}, factors.data());
  factors[3] = 3.0f;  // same address, other values
  check(1e4f, {4, 1}, factors.data());
  check(1e6f, {5, 1}, nullptr);
}

TEST_F(CpuOperators, Gates) {
  std::vector<float> gate;
  for (float v = -120.0f; v < 120.0f; v += 0.37f) gate.push_back(v);
  const std::vector<float> up(gate.size(), 1.0f);
  for (const GateKind kind : {GateKind::kSilu, GateKind::kGeluTanh}) {
    const auto run = [&](Backend& backend, const std::vector<float>& g) {
      std::vector<float> out(g.size());
      EXPECT_TRUE(backend.gate(kind, g.data(), up.data(), out.data(), int64_t(g.size())));
      return out;
    };
    compare(1e-7, [&](Backend& backend) { return run(backend, gate); });
    // Relative accuracy where values are not vanishing.
    auto backend = make_cpu(detect_cpu_level(), 1);
    const std::vector<float> out = run(*backend, gate);
    const std::vector<float> expected = run(reference_, gate);
    for (size_t i = 0; i < gate.size(); ++i) {
      if (std::fabs(expected[i]) > 1e-3f) {
        EXPECT_NEAR(out[i] / expected[i], 1.0, 1e-6) << gate[i];
      }
    }
    EXPECT_TRUE(std::isnan(run(*backend, {std::nanf("")})[0]));
  }
}

TEST_F(CpuOperators, AddAndGatherRows) {
  const std::vector<float> x = random_activations(40, 1000, 5);
  const std::vector<float> y = random_activations(40, 1000, 6);
  compare(0.0, [&](Backend& backend) {
    std::vector<float> out = y;
    EXPECT_TRUE(backend.add(x.data(), out.data(), int64_t(x.size())));
    return out;
  });
  const std::vector<int64_t> rows = {39, 0, 7, 7};
  compare(0.0, [&](Backend& backend) {
    std::vector<float> out(4000);
    EXPECT_TRUE(backend.gather_rows(x.data(), rows, 1000, out.data()));
    return out;
  });
}

TEST_F(CpuOperators, Embed) {
  for (const formats::WeightTypeInfo& info : formats::weight_types()) {
    const RandomMatrix table = random_matrix(info.type, 50, 256, 7);
    const std::vector<int32_t> ids = {0, 49, 3, 3};
    compare(0.0, [&](Backend& backend) {
      std::vector<float> out(4 * 256);
      EXPECT_TRUE(backend.embed(table.source(), ids, 1.5f, out.data()));
      return out;
    });
  }
  const RandomMatrix table = random_matrix(WeightType::kF32, 50, 8, 7);
  float out[8];
  for (const int32_t id : {-1, 50}) {
    EXPECT_EQ(reference_.embed(table.source(), {&id, 1}, 1.0f, out).error().code(),
              ErrorCode::kInvalidArgument);
  }
}

struct Experts {
  RandomMatrix router = random_matrix(WeightType::kF32, 6, 128, 30);
  std::vector<RandomMatrix> gate, up, down;
  Experts() {
    for (uint32_t e = 0; e < 6; ++e) {
      gate.push_back(random_matrix(WeightType::kF32, 64, 128, 40 + e));
      up.push_back(random_matrix(WeightType::kQ8_0, 64, 128, 50 + e));
      down.push_back(random_matrix(WeightType::kF16, 128, 64, 60 + e));
    }
  }
  std::vector<float> run(Backend& backend, const std::vector<float>& x, bool normalize) const {
    std::vector<std::unique_ptr<Matrix>> owned;
    std::vector<const Matrix*> gates, ups, downs;
    const auto load = [&](const RandomMatrix& matrix) {
      auto loaded = backend.load_matrix(matrix.source());
      EXPECT_TRUE(loaded);
      owned.push_back(std::move(*loaded));
      return owned.back().get();
    };
    for (size_t e = 0; e < 6; ++e) {
      gates.push_back(load(gate[e]));
      ups.push_back(load(up[e]));
      downs.push_back(load(down[e]));
    }
    std::vector<float> out(x.size());
    MoeArgs args;
    args.x = x.data();
    args.out = out.data();
    args.num_rows = static_cast<int64_t>(x.size()) / 128;
    args.num_experts = 6;
    args.num_experts_used = 3;
    args.normalize_weights = normalize;
    args.router = load(router);
    args.gate_proj = gates;
    args.up_proj = ups;
    args.down_proj = downs;
    EXPECT_TRUE(backend.moe(args));
    return out;
  }
};

TEST_F(CpuOperators, MixtureOfExperts) {
  const Experts experts;
  std::vector<float> x = random_activations(90, 128, 8);
  for (float& v : x)
    v *= 0.002f;  // keeps the router's logits small: exp would magnify their rounding
  for (const bool normalize : {true, false}) {
    compare(3e-4, [&](Backend& backend) { return experts.run(backend, x, normalize); });
  }
  // A row alone has the bits it has among others.
  auto backend = make_cpu(detect_cpu_level(), 2);
  const std::vector<float> all = experts.run(*backend, x, true);
  for (const size_t row : {0u, 41u, 89u}) {
    const std::vector<float> one(x.begin() + row * 128, x.begin() + (row + 1) * 128);
    const std::vector<float> out = experts.run(*backend, one, true);
    EXPECT_EQ(std::memcmp(out.data(), &all[row * 128], 128 * sizeof(float)), 0) << row;
  }
}

TEST(ChooseExperts, TiesGoToTheLowestIndex) {
  std::vector<float> logits = {1.0f, 2.0f, 2.0f, -1.0f, 2.0f};
  int32_t chosen[3];
  float weights[3];
  cpu::choose_experts(logits.data(), 5, 3, true, chosen, weights);
  EXPECT_EQ(chosen[0], 1);
  EXPECT_EQ(chosen[1], 2);
  EXPECT_EQ(chosen[2], 4);
  for (float w : weights) EXPECT_NEAR(w, 1.0f / 3.0f, 1e-7f);
}

TEST(Workspace, IsWhatIsAllocated) {
  auto backend = make_cpu(CpuLevel::kScalar, 1);
  EXPECT_EQ(backend->memory().stats().total_now, backend->workspace_bytes(small_needs()));
  WorkspaceNeeds larger = small_needs();
  larger.max_cols *= 4;
  ASSERT_TRUE(backend->reserve_workspace(larger));
  EXPECT_EQ(backend->memory().stats().total_now, backend->workspace_bytes(larger));
  EXPECT_EQ(backend->memory().stats().total_peak, backend->workspace_bytes(larger));
}

TEST(Registry, KnowsItsBackends) {
  for (const char* name : {"cpu", "reference"}) {
    BackendOptions options;
    options.name = name;
    options.num_threads = 1;
    auto backend = create_backend(options);
    ASSERT_TRUE(backend);
    EXPECT_EQ((*backend)->info().name, name);
    EXPECT_GT((*backend)->info().memory_total, 0);
  }
  BackendOptions options;
  options.name = "abacus";
  const auto missing = create_backend(options);
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().code(), ErrorCode::kUnsupported);
  EXPECT_NE(missing.error().message().find("cpu, reference"), std::string::npos);
#ifndef KVANT_CUDA
  options.name = "cuda";
  const auto no_cuda = create_backend(options);
  ASSERT_FALSE(no_cuda);
  EXPECT_EQ(no_cuda.error().code(), ErrorCode::kUnsupported);
  EXPECT_NE(no_cuda.error().message().find("scripts/build cuda"), std::string::npos);
#endif
  options.name = "cpu";
  options.prompt_attention = PromptAttention::kFp8;
  const auto no_fp8 = create_backend(options);
  ASSERT_FALSE(no_fp8);
  EXPECT_EQ(no_fp8.error().code(), ErrorCode::kUnsupported);
  EXPECT_NE(no_fp8.error().message().find("--attn 16bit"), std::string::npos);
  options.prompt_attention = PromptAttention::k16Bit;
  options.num_threads = -1;
  EXPECT_EQ(create_backend(options).error().code(), ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvant::backend
