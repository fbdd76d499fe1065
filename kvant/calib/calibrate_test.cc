#include "kvant/calib/calibrate.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <map>

#include "kvant/base/small_floats.h"
#include "kvant/model/testing/engine.h"
#include "kvant/model/testing/tiny_models.h"

namespace kvant::calib {
namespace {

using model::testing::Engine;
using model::testing::must;
using model::testing::random_tokens;
using model::testing::tiny_model;

constexpr int kVocab = 64, kPage = 16;
constexpr int kHeads = 2, kDim = 32, kLayers = 3;  // of tiny_model

CalibrationConfig config_for(std::string_view kv) {
  CalibrationConfig config;
  config.format = must(formats::parse_cache_format(kv));
  config.page_tokens = kPage;
  config.context_tokens = 700;
  config.corpus_sha256 = "text";
  return config;
}

// Two sequences: one of several steps, with an open page at its end, and a short one.
ForwardLoop two_sequences() {
  return [](const RunSequence& run) -> Status {
    KVANT_TRY(run(random_tokens(600 + 5, kVocab, 1)));
    return run(random_tokens(40, kVocab, 2));
  };
}

formats::QuantPlan plan_of(Engine& engine, std::string_view kv) {
  return must(calibrate(engine.model(), config_for(kv), two_sequences()));
}

// Rows that count, as fp64 values of BF16, seen by an observer of its own.
struct Recorded {
  std::vector<std::vector<double>> k, v;  // [layer][counted token][kv_head][head_dim]
  std::vector<std::vector<double>> q;     // [layer][token][query head][head_dim]
};

Recorded record(Engine& engine, bool sink) {
  Recorded recorded;
  recorded.k.resize(kLayers);
  recorded.v.resize(kLayers);
  recorded.q.resize(kLayers);
  const auto keep = [](std::span<const float> rows, std::vector<double>& all) {
    for (const float x : rows) all.push_back(static_cast<double>(from_bf16(to_bf16(x))));
  };
  const size_t width = kHeads * kDim;
  const model::ModelConfig& geometry = engine.model().config();
  int64_t length = 0;
  engine.model().set_observer([&](const model::LayerRows& rows) {
    for (size_t i = 0; i < rows.positions.size(); ++i) {
      const int64_t page = rows.positions[i] / kPage;
      const bool stays = sink && geometry.layer_window[rows.layer] == 0 && page == 0;
      if (stays || page >= length / kPage) continue;
      keep(rows.k.subspan(i * width, width), recorded.k[rows.layer]);
      keep(rows.v.subspan(i * width, width), recorded.v[rows.layer]);
    }
    for (const float x : rows.q) recorded.q[rows.layer].push_back(static_cast<double>(x));
    return Status();
  });
  auto runtime = calibration_runtime(config_for("fp8"));
  const auto cache = engine.cache(runtime);
  must(two_sequences()([&](std::span<const int32_t> tokens) -> Status {
    const auto id = must(cache->add_sequence());
    length = static_cast<int64_t>(tokens.size());
    for (size_t first = 0; first < tokens.size(); first += 100) {
      const auto part = tokens.subspan(first, std::min<size_t>(100, tokens.size() - first));
      engine.step(*cache, {{id, part, 0}});
    }
    cache->remove_sequence(id);
    return {};
  }));
  engine.model().set_observer({});
  return recorded;
}

class EveryArchitecture : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Calibrate, EveryArchitecture,
                         ::testing::ValuesIn(model::testing::tiny_architectures()));

TEST_P(EveryArchitecture, PlanAgreesWithPlainArithmetic) {
  Engine engine(tiny_model(GetParam()), "cpu");
  const formats::QuantPlan plan = plan_of(engine, "k=fp8:head+bias+smooth,v=nvfp4+bias+sink");
  const Recorded recorded = record(engine, true);
  EXPECT_EQ(plan.geometry_id, engine.model().config().geometry_id());
  EXPECT_EQ(plan.weights_id.size(), 64u);
  EXPECT_EQ(plan.corpus_sha256, "text");
  EXPECT_EQ(plan.kv, "k=fp8:head+bias+smooth,v=nvfp4+bias+sink");
  ASSERT_EQ(plan.layers.size(), static_cast<size_t>(kLayers));
  for (int layer = 0; layer < kLayers; ++layer) {
    SCOPED_TRACE(layer);
    const formats::LayerPlan& terms = plan.layers[layer];
    const std::vector<double>& k = recorded.k[layer];
    const std::vector<double>& v = recorded.v[layer];
    const bool sink = engine.model().config().layer_window[layer] == 0;
    ASSERT_EQ(k.size(), (592u + 32u - (sink ? 32u : 0u)) * kHeads * kDim);
    double v_largest = 0;
    for (int head = 0; head < kHeads; ++head) {
      double k_largest = 0;
      for (int c = 0; c < kDim; ++c) {
        const size_t channel = static_cast<size_t>(head * kDim + c);
        double k_sum = 0, v_sum = 0, count = 0;
        for (size_t i = channel; i < k.size(); i += kHeads * kDim, ++count) {
          k_sum += k[i];
          v_sum += v[i];
        }
        const double factor = static_cast<double>(terms.k.smooth[channel]);
        EXPECT_NEAR(terms.k.bias[channel], k_sum / count / factor, 1e-6 * std::abs(k_sum) + 1e-6);
        EXPECT_NEAR(terms.v.bias[channel], v_sum / count, 1e-6);
        for (size_t i = channel; i < k.size(); i += kHeads * kDim) {
          const double k_offset = static_cast<double>(terms.k.bias[channel]);
          const double v_offset = static_cast<double>(terms.v.bias[channel]);
          k_largest = std::max(k_largest, std::abs(k[i] / factor - k_offset));
          v_largest = std::max(v_largest, std::abs(v[i] - v_offset));
        }
      }
      EXPECT_NEAR(terms.k.global_scale[head], k_largest / 448, 1e-6 * k_largest);
    }
    ASSERT_EQ(terms.v.global_scale.size(), 1u);
    EXPECT_NEAR(terms.v.global_scale[0], v_largest / 448, 1e-6 * v_largest);
  }
}

TEST_P(EveryArchitecture, FactorsBalanceKeysAndQueries) {
  Engine engine(tiny_model(GetParam()), "cpu");
  CalibrationConfig config = config_for("k=int8+smooth,v=int8");
  config.smooth_alpha = 0.75;
  const formats::QuantPlan plan = must(calibrate(engine.model(), config, two_sequences()));
  const Recorded recorded = record(engine, false);
  const int query_heads = engine.model().config().num_query_heads;
  const int group = query_heads / kHeads;
  for (int layer = 0; layer < kLayers; ++layer) {
    for (int head = 0; head < kHeads; ++head) {
      std::vector<double> wanted;
      for (int c = 0; c < kDim; ++c) {
        double k_largest = 0, q_largest = 0;
        for (size_t i = static_cast<size_t>(head * kDim + c); i < recorded.k[layer].size();
             i += kHeads * kDim) {
          k_largest = std::max(k_largest, std::abs(recorded.k[layer][i]));
        }
        for (int member = 0; member < group; ++member) {
          const auto first = static_cast<size_t>((head * group + member) * kDim + c);
          for (size_t i = first; i < recorded.q[layer].size();
               i += static_cast<size_t>(query_heads * kDim)) {
            q_largest = std::max(q_largest, std::abs(recorded.q[layer][i]));
          }
        }
        wanted.push_back(std::pow(k_largest, 0.75) / std::pow(q_largest, 0.25));
      }
      const float* factors = plan.layers[layer].k.smooth.data() + head * kDim;
      for (int c = 1; c < kDim; ++c) {
        EXPECT_NEAR(factors[c] / factors[0] / (wanted[c] / wanted[0]), 1, 1e-5);
      }
    }
    EXPECT_TRUE(plan.layers[layer].k.global_scale.empty());
    EXPECT_TRUE(plan.layers[layer].k.bias.empty());
  }
}

std::string bytes_of(const formats::QuantPlan& plan) {
  const std::string path =
      ::testing::TempDir() + "kvant_calibrate_" + std::to_string(::getpid()) + ".kvplan";
  must(plan.save(path));
  std::ifstream in(path, std::ios::binary);
  std::string bytes((std::istreambuf_iterator<char>(in)), {});
  std::remove(path.c_str());
  return bytes;
}

TEST_P(EveryArchitecture, ThreadsDoNotChangeABit) {
  const char* const kv = "k=nvfp4+mean+smooth+rot,v=fp8:head+bias+sink";
  Engine one(tiny_model(GetParam()), "cpu", 1);
  Engine three(tiny_model(GetParam()), "cpu", 3);
  const std::string bytes = bytes_of(plan_of(one, kv));
  EXPECT_EQ(bytes, bytes_of(plan_of(three, kv)));
  EXPECT_EQ(bytes, bytes_of(plan_of(one, kv)));
}

TEST_P(EveryArchitecture, CachesOfManyFormatsAcceptOnePlan) {
  Engine engine(tiny_model(GetParam()), "cpu");
  const formats::QuantPlan plan = plan_of(engine, "k=nvfp4+bias+smooth+46,v=nvfp4+46+sink");
  const std::vector<int32_t> tokens = random_tokens(60, kVocab, 3);
  std::map<std::string, std::vector<float>> last;
  for (const char* kv : {"bf16", "k=nvfp4+bias+smooth+46,v=nvfp4+46+sink", "nvfp4+smooth", "fp8",
                         "k=int8+bias,v=int8", "k=int4+bias+rot,v=fp8+sink", "4bit"}) {
    SCOPED_TRACE(kv);
    model::RuntimeOptions runtime = model::testing::small_runtime(kv);
    runtime.plan = &plan;
    const auto cache = engine.cache(runtime);
    const auto rows = engine.logits(*cache, must(cache->add_sequence()), tokens, 60);
    last[kv] = rows.back();
    EXPECT_LT(model::testing::relative_error(last[kv], last["bf16"]), 0.3);
  }
  EXPECT_NE(last["k=int8+bias,v=int8"], last["bf16"]);
}

TEST(Calibrate, LayersOfDifferentFormatsShareAPlan) {
  Engine engine(tiny_model("llama"), "cpu");
  const formats::QuantPlan plan = plan_of(engine, "k=nvfp4+bias+smooth,v=nvfp4");
  const std::vector<int32_t> tokens = random_tokens(60, kVocab, 3);
  const auto logits = [&](std::string_view first, std::string_view others) {
    model::RuntimeOptions runtime = model::testing::small_runtime(others);
    runtime.plan = &plan;
    runtime.layer_formats.assign(kLayers, runtime.format);
    runtime.layer_formats[0] = must(formats::parse_cache_format(first));
    const auto cache = engine.cache(runtime);
    return engine.logits(*cache, must(cache->add_sequence()), tokens, 60).back();
  };
  const char* const plain = "k=bf16,v=bf16";
  const char* const coarse = "k=nvfp4+bias,v=nvfp4";
  EXPECT_NE(logits(coarse, plain), logits(plain, plain));
  EXPECT_NE(logits(coarse, plain), logits(coarse, coarse));
  EXPECT_NE(logits(coarse, plain), logits("k=nvfp4+bias+smooth,v=nvfp4", plain));
}

TEST(Calibrate, KeysBeforeRopeHaveTheirOwnStatistics) {
  Engine engine(tiny_model("qwen2"), "cpu");
  const formats::QuantPlan after = plan_of(engine, "k=int8+bias+smooth,v=int8");
  const formats::QuantPlan before = plan_of(engine, "k=int8+bias+smooth+prerope,v=int8");
  // The offsets of qwen2's keys come from a bias of the projection, which RoPE turns.
  double norm_after = 0, norm_before = 0;
  for (size_t c = 0; c < after.layers[1].k.bias.size(); ++c) {
    norm_after += std::pow(after.layers[1].k.bias[c] * after.layers[1].k.smooth[c], 2);
    norm_before += std::pow(before.layers[1].k.bias[c] * before.layers[1].k.smooth[c], 2);
  }
  EXPECT_LT(norm_after, 0.8 * norm_before);
  model::RuntimeOptions runtime = model::testing::small_runtime("k=int8+bias,v=int8");
  runtime.plan = &before;
  const auto cache = engine.model().create_cache(runtime);
  ASSERT_FALSE(cache);
  EXPECT_EQ(cache.error().code(), ErrorCode::kInvalidArgument);
}

TEST(Calibrate, RefusesWhatCannotBe) {
  Engine engine(tiny_model("llama"), "cpu");
  const auto error = [&](CalibrationConfig config, const ForwardLoop& loop) {
    const auto plan = calibrate(engine.model(), config, loop);
    return plan ? std::string() : plan.error().message();
  };
  const auto has = [](const std::string& text, std::string_view part) {
    return text.find(part) != std::string::npos;
  };
  EXPECT_TRUE(has(error(config_for("int8"), two_sequences()), "reads nothing from a plan"));
  CalibrationConfig config = config_for("k=int8+smooth,v=int8");
  config.smooth_alpha = 1.5;
  EXPECT_TRUE(has(error(config, two_sequences()), "1.5"));
  const ForwardLoop short_loop = [](const RunSequence& run) {
    return run(random_tokens(kPage + 3, kVocab, 1));
  };
  EXPECT_EQ(error(config_for("fp8"), short_loop), "");
  for (const char* kv : {"fp8+sink", "k=int8+bias,v=int8+sink"}) {
    EXPECT_TRUE(has(error(config_for(kv), short_loop), "beside the first one")) << kv;
  }
  const ForwardLoop failing = [](const RunSequence&) -> Status {
    return Error(ErrorCode::kIoError, "the text ended");
  };
  EXPECT_EQ(error(config_for("fp8"), failing), "the text ended");
  const std::atomic<bool> stop = true;
  config = config_for("fp8");
  config.cancel = &stop;
  EXPECT_EQ(calibrate(engine.model(), config, two_sequences()).error().code(),
            ErrorCode::kCancelled);
}

TEST(Calibrate, PlansOfOtherModelsAreRefused) {
  Engine engine(tiny_model("llama"), "cpu");
  model::testing::TinyShape shape;
  shape.layers = 2;
  Engine smaller(tiny_model("llama", shape), "cpu");
  const formats::QuantPlan plan = plan_of(engine, "fp8");
  model::RuntimeOptions runtime = model::testing::small_runtime("fp8");
  runtime.plan = &plan;
  const auto cache = smaller.model().create_cache(runtime);
  ASSERT_FALSE(cache);
  EXPECT_EQ(cache.error().code(), ErrorCode::kInvalidArgument);
  EXPECT_NE(cache.error().message().find(plan.geometry_id), std::string::npos);
  EXPECT_FALSE(model::plan_memory(smaller.model().source(), smaller.backend(), runtime));
}

}  // namespace
}  // namespace kvant::calib
