// Append and close on the device against the scalar oracle: every byte of every page.
#include "kvant/backend/cuda/append.h"

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <string>
#include <vector>

#include "kvant/backend/cuda/testing/cache_mirror.h"
#include "kvant/backend/cuda/testing/cache_on_device.h"
#include "kvant/base/small_floats.h"
#include "kvant/cache/scalar_append.h"
#include "kvant/formats/plan.h"

namespace kvant::backend::cuda {
namespace {

using testing::CacheMirror;
using testing::DeviceBytes;

uint64_t next(uint64_t& seed) {
  seed += 0x9e3779b97f4a7c15ull;
  uint64_t x = seed;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}
float uniform(uint64_t& seed) {
  return static_cast<float>(next(seed) >> 40) * 0x1p-24f;
}

// What the rows of a test hold.
enum class Rows {
  kPlain,      // about normal, some channels large or far from zero, a few exact zeros
  kExtreme,    // magnitudes from subnormal to the largest, signed zeros, whole blocks of zeros
  kNonFinite,  // plain with a few NaN and Inf
};

float value_of(Rows rows, uint64_t& seed, int channel) {
  float x = uniform(seed) + uniform(seed) + uniform(seed) + uniform(seed) - 2.0f;
  if (channel % 11 == 3) x = x * 8.0f + 3.0f;
  const uint64_t dice = next(seed) % 4096;
  if (rows == Rows::kPlain) return dice < 8 ? 0.0f : x;
  if (rows == Rows::kNonFinite) {
    if (dice == 0) return std::bit_cast<float>(0x7fa12345u);
    if (dice == 1) return std::bit_cast<float>(0xff800000u);
    if (dice == 2) return std::bit_cast<float>(0x7f7fffffu);  // rounds to Inf
    return x;
  }
  if (dice < 512) return std::bit_cast<float>(static_cast<uint32_t>(next(seed)) & 0xff7fffffu);
  if (dice < 1024) return dice % 2 == 0 ? -0.0f : 0.0f;
  if (dice < 1100) return std::ldexp(x, static_cast<int>(dice % 240) - 120);
  if (channel / 32 % 3 == 1) return dice % 3 == 0 ? -0.0f : 0.0f;
  // Multiples of a quarter: quotients that lie on boundaries.
  if (channel / 16 % 2 == 0) return std::round(x * 4.0f) / 4.0f;
  return x;
}

struct Geometry {
  int num_kv_heads;
  int head_dim;
  int page_tokens;
};

formats::QuantPlan make_plan(const Geometry& geometry, int num_layers, bool scales) {
  formats::QuantPlan plan;
  plan.layers.resize(num_layers);
  uint64_t seed = 5;
  for (formats::LayerPlan& layer : plan.layers) {
    for (formats::SidePlan* side : {&layer.k, &layer.v}) {
      for (int h = 0; scales && h < geometry.num_kv_heads; ++h)
        side->global_scale.push_back(h == 1 ? 0.25f : 0.01f + 0.02f * uniform(seed));
      for (int i = 0; i < geometry.num_kv_heads * geometry.head_dim; ++i) {
        side->bias.push_back(uniform(seed) - 0.5f);
        side->smooth.push_back(0.5f + uniform(seed));
      }
    }
  }
  return plan;
}

class CudaAppend : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string why = testing::no_device_reason();
    if (!why.empty()) GTEST_SKIP() << why;
  }
};

struct Run {
  std::string kv;
  Geometry geometry;
  Rows rows = Rows::kPlain;
  bool plan_scales = true;
  std::vector<std::vector<int>> steps = {
      {70, 1, 33}, {1, 1, 1}, {90, 127, 2}, {1, 3, 1}, {200, 1, 64}};
};

int64_t count_non_finite(const std::vector<float>& x) {
  int64_t count = 0;
  for (const float value : x) count += (to_bf16(value) & 0x7f80u) == 0x7f80u ? 1 : 0;
  return count;
}

// Runs the steps on both sides; the first difference fails the test.
void compare(const Run& run) {
  const std::string name = run.kv + " heads " + std::to_string(run.geometry.num_kv_heads) +
                           " head_dim " + std::to_string(run.geometry.head_dim) + " page_tokens " +
                           std::to_string(run.geometry.page_tokens);
  SCOPED_TRACE(name);
  constexpr int kLayers = 2;
  const formats::QuantPlan plan = make_plan(run.geometry, kLayers, run.plan_scales);
  const auto format = formats::parse_cache_format(run.kv);
  ASSERT_TRUE(format) << format.error().message();
  cache::CacheConfig config;
  for (int l = 0; l < kLayers; ++l)
    config.layers.push_back({run.geometry.num_kv_heads, run.geometry.head_dim, 0});
  config.format = *format;
  config.plan = &plan;
  config.page_tokens = run.geometry.page_tokens;
  config.max_tokens = 1024;
  config.max_sequences = 3;
  config.max_step_tokens = 512;
  auto mirror = CacheMirror::create(config);
  ASSERT_TRUE(mirror) << mirror.error().message();
  cache::KvCache& cache = (*mirror)->cache();
  auto append = CacheAppend::create();
  ASSERT_TRUE(append) << append.error().message();
  std::vector<cache::SequenceId> ids;
  for (int s = 0; s < 3; ++s) ids.push_back(*cache.add_sequence());
  uint64_t seed = 99;
  for (const std::vector<int>& step : run.steps) {
    std::vector<cache::StepSequence> batch;
    int64_t num_rows = 0;
    for (int s = 0; s < 3; ++s) {
      batch.push_back({ids[s], step[s]});
      num_rows += step[s];
    }
    ASSERT_TRUE(cache.begin_step(batch));
    formats::EncodeStats expected;
    for (int layer = 0; layer < kLayers; ++layer) {
      const auto place = cache.place(layer);
      const int64_t n = num_rows * run.geometry.num_kv_heads * run.geometry.head_dim;
      std::vector<float> k(n), v(n);
      for (int64_t i = 0; i < n; ++i) {
        const int channel = static_cast<int>(i % run.geometry.head_dim);
        k[i] = value_of(run.rows, seed, channel);
        v[i] = value_of(run.rows, seed, channel);
      }
      const auto stats =
          cache::scalar_append(cache.view(place.group), place.index, k.data(), v.data());
      ASSERT_TRUE(stats);
      expected.non_finite += count_non_finite(k) + count_non_finite(v);
      expected.saturated += stats->saturated;
      const DeviceBytes device_k(k.data(), n * 4), device_v(v.data(), n * 4);
      const Status status = (*append)->run({.view = &(*mirror)->device_view(place.group),
                                            .group_layer = place.index,
                                            .k = device_k.data(),
                                            .v = device_v.data()},
                                           nullptr);
      ASSERT_TRUE(status) << status.error().message();
      // Staging is one layer's: compared before the next overwrites it.
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << cudaGetErrorString(cudaGetLastError());
      ASSERT_EQ((*mirror)->difference(), "") << "layer " << layer;
    }
    const auto counted = (*append)->take_stats(nullptr);
    ASSERT_TRUE(counted) << counted.error().message();
    EXPECT_EQ(counted->non_finite, expected.non_finite);
    if (!format->strict) {
      EXPECT_EQ(counted->saturated, expected.saturated);
    }
    cache.commit_step();
  }
}

// Every option of every format on the side that is under test, as the conformance matrix has them.
std::vector<std::string> all_subjects() {
  std::vector<std::string> subjects;
  const std::vector<std::string> options = {
      "",          "+mean",    "+bias",   "+smooth",          "+rot",        "+46",
      "+mean+46",  "+bias+46", "+rot+46", "+mean+smooth+rot", "+smooth+rot", "+mean+smooth+rot+46",
      "+bias+rot", "+prerope"};
  for (const formats::FormatInfo& info : formats::all_formats()) {
    const std::string base(info.name);
    for (const std::string& option : options) {
      const std::string k = "k=" + base + option + ",v=nvfp4+46";
      const std::string v = "k=int4:channel,v=" + base + option;
      if (info.for_keys && formats::parse_cache_format(k)) subjects.push_back(k);
      if (info.for_values && formats::parse_cache_format(v)) subjects.push_back(v);
    }
    const std::string both = "k=" + base + ",v=" + (info.for_values ? base : "nvfp4");
    for (const char* option : {"", "+sink", "+recent20", "+sink+recent40", "+strict"}) {
      if (formats::parse_cache_format(both + option)) subjects.push_back(both + option);
    }
  }
  for (const char* strict :
       {"k=nvfp4+46+rot,v=nvfp4+46+bias+strict", "k=fp8:token+smooth,v=int8+rot+strict",
        "k=int4+bias,v=mxfp4+strict"}) {
    if (formats::parse_cache_format(strict)) subjects.emplace_back(strict);
  }
  for (const formats::Preset& preset : formats::all_presets()) subjects.emplace_back(preset.name);
  return subjects;
}

constexpr Geometry kGeometries[] = {{2, 128, 64}, {3, 64, 16},  {2, 80, 32},  {1, 256, 64},
                                    {2, 96, 64},  {1, 192, 32}, {2, 48, 128}, {1, 512, 16},
                                    {4, 16, 64},  {1, 112, 16}, {2, 128, 128}};

TEST_F(CudaAppend, EveryFormatAndOption) {
  size_t at = 0;
  for (const std::string& kv : all_subjects()) {
    compare({.kv = kv, .geometry = kGeometries[0]});
    // The others in turn.
    const size_t others = std::size(kGeometries) - 1;
    for (int i = 0; i < 2 && !HasFailure(); ++i) {
      compare({.kv = kv,
               .geometry = kGeometries[1 + at++ % others],
               .steps = {{150, 1, 33}, {1, 60, 17}, {3, 2, 31}}});
    }
    if (HasFailure()) return;
  }
}

TEST_F(CudaAppend, EveryGeometryOfTheSpecialisedKernels) {
  for (const Geometry& geometry : kGeometries) {
    for (const char* kv : {"4bit", "8bit", "6bit", "k=nvfp4+46+mean,v=int4", "k=int4,v=nvfp4",
                           "k=mxfp8+mean,v=mxfp4", "k=mxfp4,v=fp8", "k=int8,v=mxfp8",
                           "k=nvfp4,v=fp8e5m2", "k=int4+mean,v=int8"}) {
      compare({.kv = kv, .geometry = geometry, .steps = {{200, 1, 33}, {1, 100, 17}}});
      if (HasFailure()) return;
    }
  }
}

TEST_F(CudaAppend, ExtremeAndNonFiniteValues) {
  for (const Rows rows : {Rows::kExtreme, Rows::kNonFinite}) {
    for (const bool scales : {false, true}) {
      for (const formats::FormatInfo& info : formats::all_formats()) {
        const std::string base(info.name);
        const std::string both = "k=" + base + ",v=" + (info.for_values ? base : "nvfp4+46");
        for (const std::string& kv :
             {both,
              "k=" + base + (info.id == formats::FormatId::kBf16 ? "" : "+mean") + ",v=nvfp4+46"}) {
          compare({.kv = kv,
                   .geometry = {2, 128, 64},
                   .rows = rows,
                   .plan_scales = scales,
                   .steps = {{150, 1, 33}, {1, 64, 31}}});
          compare({.kv = kv,
                   .geometry = {1, 80, 32},
                   .rows = rows,
                   .plan_scales = scales,
                   .steps = {{150, 1, 33}, {1, 64, 31}}});
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST_F(CudaAppend, GraphReplaysAreEqual) {
  const Geometry geometry = {2, 128, 64};
  const formats::QuantPlan plan = make_plan(geometry, 1, true);
  cache::CacheConfig config;
  config.layers = {{2, 128, 0}};
  config.format = *formats::parse_cache_format("4bit");
  config.plan = &plan;
  config.max_tokens = 256;
  auto mirror = CacheMirror::create(config);
  ASSERT_TRUE(mirror);
  cache::KvCache& cache = (*mirror)->cache();
  const cache::StepSequence step = {*cache.add_sequence(), 200};
  ASSERT_TRUE(cache.begin_step({&step, 1}));
  uint64_t seed = 3;
  std::vector<float> k(200 * 2 * 128), v(k.size());
  for (size_t i = 0; i < k.size(); ++i) {
    k[i] = value_of(Rows::kPlain, seed, static_cast<int>(i % 128));
    v[i] = value_of(Rows::kPlain, seed, static_cast<int>(i % 128));
  }
  const DeviceBytes device_k(k.data(), static_cast<int64_t>(k.size() * 4));
  const DeviceBytes device_v(v.data(), static_cast<int64_t>(v.size() * 4));
  ASSERT_TRUE(cache::scalar_append(cache.view(0), 0, k.data(), v.data()));
  auto append = CacheAppend::create();
  ASSERT_TRUE(append);
  const AppendArgs args = {&(*mirror)->device_view(0), 0, device_k.data(), device_v.data()};
  cudaStream_t stream;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  ASSERT_TRUE((*append)->run(args, stream));
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  ASSERT_TRUE((*append)->run(args, stream));
  cudaGraph_t graph;
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  cudaGraphExec_t replay;
  ASSERT_EQ(cudaGraphInstantiate(&replay, graph, 0), cudaSuccess);
  for (int i = 0; i < 3; ++i) {
    ASSERT_EQ(cudaGraphLaunch(replay, stream), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    EXPECT_EQ((*mirror)->difference(), "");
  }
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  cache.commit_step();
}

}  // namespace
}  // namespace kvant::backend::cuda
