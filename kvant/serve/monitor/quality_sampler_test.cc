// The sampled error is that of the pages: it depends on the format as it should, costs no answer,
// and is taken when it is due.
#include "kvant/serve/monitor/quality_sampler.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "kvant/model/testing/engine.h"
#include "kvant/model/testing/tiny_models.h"
#include "kvant/serve/testing/collector.h"

namespace kvant::serve {
namespace {

using model::testing::must;
using model::testing::random_tokens;
using testing::Collector;

// Serves `prompts` prompts and returns what was sampled; `answers` gets the tokens.
std::vector<QualitySample> samples_of(const std::string& kv, int prompts, int64_t every,
                                      std::vector<std::vector<int32_t>>* answers = nullptr,
                                      bool sampling = true) {
  model::testing::Engine model(model::testing::tiny_model("llama"), "cpu");
  EngineOptions options;
  options.runtime = model::testing::small_runtime(kv);
  options.runtime.max_sequences = 4;
  options.runtime.max_step_tokens = 64;
  options.runtime.total_tokens = 2048;
  options.runtime.held_sink_pages = 32;
  options.runtime.held_windows = 32;
  std::vector<QualitySample> samples;
  std::unique_ptr<QualitySampler> sampler;
  if (sampling) {
    sampler = must(
        QualitySampler::create(model.model(), options.runtime, every,
                               [&](const QualitySample& sample) { samples.push_back(sample); }));
  }
  {
    const auto engine = must(Engine::create(model.model(), options, sampler.get()));
    for (int i = 0; i < prompts; ++i) {
      const auto collector = std::make_shared<Collector>();
      Request request;
      request.prompt = random_tokens(50, 64, static_cast<uint32_t>(i + 1));
      request.sampling.temperature = 0;
      request.sampling.max_tokens = 4;
      request.listener = collector;
      must(engine->submit(std::move(request)));
      collector->wait();
      if (answers != nullptr) answers->push_back(collector->ids());
    }
  }
  return samples;
}

double mean_error(const std::vector<QualitySample>& samples, bool keys) {
  double sum = 0;
  int count = 0;
  for (const QualitySample& sample : samples) {
    if (sample.keys != keys) continue;
    sum += sample.error;
    ++count;
  }
  return count == 0 ? -1 : sum / count;
}

TEST(QualitySampler, ErrorFollowsTheBits) {
  const double eight = mean_error(samples_of("int8", 6, 1), true);
  const double four = mean_error(samples_of("int4", 6, 1), true);
  const double two = mean_error(samples_of("k=int2:channel,v=int8", 6, 1), true);
  EXPECT_GT(eight, 0);
  EXPECT_LT(eight, 0.02);
  EXPECT_GT(four, 5 * eight);
  EXPECT_GT(two, 2 * four);
  EXPECT_LT(two, 1);
}

TEST(QualitySampler, IsTakenWhenItIsDue) {
  EXPECT_EQ(samples_of("int8", 6, 1).size(), 12u);  // both sides
  EXPECT_EQ(samples_of("int8", 6, 3).size(), 4u);   // the first prompt and the fourth
  EXPECT_TRUE(samples_of("int8", 6, 0).empty());
  EXPECT_TRUE(samples_of("bf16", 2, 1).empty());
  const std::vector<QualitySample> values_only = samples_of("k=bf16,v=int8", 2, 1);
  EXPECT_EQ(values_only.size(), 2u);
  EXPECT_FALSE(values_only.front().keys);
}

TEST(QualitySampler, CostsNoAnswer) {
  std::vector<std::vector<int32_t>> with, without;
  samples_of("nvfp4", 4, 1, &with, true);
  samples_of("nvfp4", 4, 1, &without, false);
  EXPECT_EQ(with, without);
}

TEST(AuditScales, SaysWhereScalesComeFrom) {
  model::RuntimeOptions runtime = model::testing::small_runtime("k=int4:channel,v=nvfp4");
  const auto layers = [&](bool keys, ScaleSource source) {
    for (const ScaleAudit& one : audit_scales(runtime, 3, keys)) {
      if (one.source == source) return one.layers;
    }
    return -1;
  };
  EXPECT_EQ(layers(true, ScaleSource::kNone), 3);
  EXPECT_EQ(layers(false, ScaleSource::kUnit), 3);
  formats::QuantPlan plan;
  plan.layers.resize(3);
  plan.layers[1].v.global_scale = {0.5f};
  runtime.plan = &plan;
  EXPECT_EQ(layers(false, ScaleSource::kPlan), 1);
  EXPECT_EQ(layers(false, ScaleSource::kUnit), 2);
}

}  // namespace
}  // namespace kvant::serve
