// Weights that are re-quantised to F8_E4M3 while they are loaded: what becomes of which matrix,
// what it costs in memory and in logits.

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/model/model.h"
#include "kvant/model/source.h"
#include "kvant/model/testing/engine.h"
#include "kvant/model/testing/tiny_models.h"

namespace kvant::model {
namespace {

using formats::WeightType;
using testing::Engine;
using testing::must;
using testing::random_tokens;
using testing::small_runtime;

constexpr int kVocab = 64;

std::vector<std::byte> tiny(const std::string& architecture, WeightType type) {
  testing::TinyShape shape;
  shape.type = type;
  return testing::tiny_model(architecture, shape);
}

Engine engine(const std::string& architecture, WeightType type, const std::string& backend,
              WeightStorage storage) {
  return Engine(tiny(architecture, type),
                backend::BackendOptions{.name = backend, .num_threads = 1}, storage);
}

class Requantised : public ::testing::TestWithParam<std::string> {};

INSTANTIATE_TEST_SUITE_P(Architectures, Requantised,
                         ::testing::ValuesIn(testing::tiny_architectures()));

TEST_P(Requantised, TheAllocatorSeesWhatWasPlanned) {
  for (const char* name : {"cpu", "reference"}) {
    for (const WeightType type : {WeightType::kBF16, WeightType::kQ8_0}) {
      const std::vector<std::byte> file = tiny(GetParam(), type);
      const auto backend = must(backend::create_backend({.name = name, .num_threads = 1}));
      const RuntimeOptions runtime = small_runtime("4bit");
      auto source = must(ModelSource::parse(file, "test", WeightStorage::kF8E4m3));
      const MemoryPlan plan = must(plan_memory(*source, *backend, runtime));
      const auto model = must(Model::load(std::move(source), *backend, {}));
      must(model->reserve(runtime));
      const auto cache = must(model->create_cache(runtime));
      const MemoryStats stats = backend->memory().stats();
      EXPECT_EQ(stats.total_now, plan.total()) << name;
      EXPECT_EQ(stats.total_peak, plan.peak()) << name;
      EXPECT_EQ(stats.bytes_now[static_cast<size_t>(MemoryUse::kWeights)],
                plan.weights.matrices + plan.weights.parameters)
          << name;
    }
  }
}

// Mean of the relative errors of all rows of logits.
double mean_error(Engine& a, Engine& b) {
  const RuntimeOptions runtime = small_runtime("bf16");
  const std::vector<int32_t> tokens = random_tokens(70, kVocab, 1);
  const auto cache_a = a.cache(runtime);
  const auto cache_b = b.cache(runtime);
  const auto of_a = a.logits(*cache_a, must(cache_a->add_sequence()), tokens, 70);
  const auto of_b = b.logits(*cache_b, must(cache_b->add_sequence()), tokens, 70);
  double mean = 0;
  for (size_t i = 0; i < tokens.size(); ++i) mean += testing::relative_error(of_a[i], of_b[i]);
  return mean / static_cast<double>(tokens.size());
}

TEST_P(Requantised, CpuAgreesWithTheReferenceBackend) {
  Engine cpu = engine(GetParam(), WeightType::kBF16, "cpu", WeightStorage::kF8E4m3);
  Engine reference = engine(GetParam(), WeightType::kBF16, "reference", WeightStorage::kF8E4m3);
  EXPECT_LT(mean_error(cpu, reference), 1e-3);
}

// Random weights are the worst case: errors of some 2^-5 in each, layer after layer, and nothing
// that was learned.
TEST_P(Requantised, LogitsAreNearThoseOfTheFile) {
  for (const WeightType type : {WeightType::kBF16, WeightType::kF16, WeightType::kQ8_0}) {
    Engine file = engine(GetParam(), type, "cpu", WeightStorage::kAsInFile);
    Engine e4m3 = engine(GetParam(), type, "cpu", WeightStorage::kF8E4m3);
    const double error = mean_error(e4m3, file);
    EXPECT_GT(error, 1e-3);  // something was quantised
    EXPECT_LT(error, 0.25);
  }
}

TEST(RequantisedSource, TablesAndRoutersKeepTheirType) {
  const std::vector<std::byte> file = tiny("qwen3moe", WeightType::kBF16);
  HostMemory memory;  // outlives what the source makes in it
  const auto source = must(ModelSource::parse(file, "test", WeightStorage::kF8E4m3));
  const auto type = [&](const char* name, int64_t rows, int64_t cols) {
    const auto described = must(source->describe(name, rows, cols));
    const auto loaded = must(source->matrix(name, rows, cols, memory));
    EXPECT_EQ(loaded.type, described.type) << name;
    EXPECT_EQ(static_cast<int64_t>(loaded.bytes.size()),
              formats::weight_bytes(loaded.type, rows, cols))
        << name;
    return loaded.type;
  };
  EXPECT_EQ(type("token_embd.weight", 64, 64), WeightType::kBF16);
  EXPECT_EQ(type("output.weight", 64, 64), WeightType::kBF16);
  EXPECT_EQ(type("blk.0.ffn_gate_inp.weight", 4, 64), WeightType::kBF16);
  EXPECT_EQ(type("blk.0.attn_q.weight", 128, 64), WeightType::kF8_E4M3);
  EXPECT_EQ(type("blk.2.attn_output.weight", 64, 128), WeightType::kF8_E4M3);
  const auto experts = must(source->experts("blk.1.ffn_up_exps.weight", 4, 32, 64, memory));
  ASSERT_EQ(experts.size(), 4u);
  for (const backend::MatrixSource& expert : experts) {
    EXPECT_EQ(expert.type, WeightType::kF8_E4M3);
    EXPECT_EQ(expert.bytes.size(), 32u * (4 + 64));
  }
}

// A row of the made matrix is the quantised row of the file.
TEST(RequantisedSource, RowsAreThoseOfTheFileQuantised) {
  const std::vector<std::byte> file = tiny("llama", WeightType::kQ8_0);
  HostMemory memory;
  const auto as_is = must(ModelSource::parse(file, "test"));
  const auto e4m3 = must(ModelSource::parse(file, "test", WeightStorage::kF8E4m3));
  const auto from = must(as_is->matrix("blk.1.ffn_down.weight", 64, 96, memory));
  const auto made = must(e4m3->matrix("blk.1.ffn_down.weight", 64, 96, memory));
  std::vector<float> values(96);
  std::vector<std::byte> row(100);
  for (int64_t r = 0; r < 64; ++r) {
    formats::dequantize_row(from.type, from.bytes.data() + r * formats::weight_bytes(from.type, 96),
                            96, values.data());
    ASSERT_TRUE(formats::quantize_row_e4m3(values, row.data()));
    ASSERT_EQ(std::memcmp(row.data(), made.bytes.data() + r * 100, 100), 0) << r;
  }
}

TEST(RequantisedSource, WhatIsNotFiniteIsAnErrorThatNamesTensorAndRow) {
  std::vector<std::byte> file = tiny("llama", WeightType::kF32);
  {
    HostMemory memory;
    const auto source = must(ModelSource::parse(file, "test"));
    const auto matrix = must(source->matrix("blk.1.ffn_up.weight", 96, 64, memory));
    const float bad = std::numeric_limits<float>::infinity();
    const auto at = matrix.bytes.data() + 4 * (7 * 64 + 3) - file.data();
    std::memcpy(file.data() + at, &bad, sizeof(bad));
  }
  const auto backend = must(backend::create_backend({.name = "cpu", .num_threads = 1}));
  auto source = must(ModelSource::parse(file, "tiny.gguf", WeightStorage::kF8E4m3));
  const auto model = Model::load(std::move(source), *backend, {});
  ASSERT_FALSE(model);
  EXPECT_EQ(model.error().code(), ErrorCode::kCorruptData);
  EXPECT_NE(model.error().message().find("tiny.gguf: tensor blk.1.ffn_up.weight: row 7"),
            std::string::npos)
      << model.error().message();
}

}  // namespace
}  // namespace kvant::model
