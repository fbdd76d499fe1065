#include "kvant/backend/cpu/attention.h"

#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "kvant/backend/testing/attention_rig.h"
#include "kvant/formats/format.h"

namespace kvant::backend {
namespace {

using testing::AttentionRig;
using testing::Chunk;
using testing::RigOptions;

// Against float64 on the same decoded cache: fp32 with fused operations, or integer products where
// the level has them for a side's format (attention_integer.h).
double max_error(const RigOptions& options) {
  const std::string kv = options.kv;
  const bool integer_format = kv.find("int") != std::string::npos ||
                              kv.find("fp4") != std::string::npos ||
                              kv.find("bit") != std::string::npos;
  return options.level >= CpuLevel::kAvx2 && integer_format ? 3e-4 : 1e-5;
}

std::vector<CpuLevel> levels() {
  std::vector<CpuLevel> all;
  for (CpuLevel level : kCpuLevels) {
    if (level <= detect_cpu_level()) all.push_back(level);
  }
  return all;
}

std::vector<std::string> bases(bool keys) {
  std::vector<std::string> names;
  for (const formats::FormatInfo& info : formats::all_formats()) {
    if (keys ? info.for_keys : info.for_values) names.emplace_back(info.name);
  }
  return names;
}

// A prompt in odd chunks, then decode steps: pages that are open, that fill in a step, that are
// stored.
void run_short_story(RigOptions options) {
  AttentionRig rig(options);
  const int p = options.page_tokens;
  rig.step({{0, p / 2 + 3}});
  rig.step({{0, 2 * p + 1}, {1, 5}});
  for (int i = 0; i < 3; ++i) rig.step({{1, 1}, {0, 1}});
  rig.step({{1, p}, {0, p / 2}});
  EXPECT_LT(rig.worst_error(), max_error(options));
  if (options.window != 1) {  // a window of one key copies its value
    EXPECT_GT(rig.worst_error(), 0.0) << "an error of exactly 0 means nothing was compared";
  }
}

std::string describe(const RigOptions& o) {
  return std::string(o.kv) + " head_dim " + std::to_string(o.head_dim) + " G " +
         std::to_string(o.group) + " page " + std::to_string(o.page_tokens) + " window " +
         std::to_string(o.window) + " " + std::string(cpu_level_name(o.level));
}

TEST(CpuAttention, EveryKeyFormatMeetsEveryValueFormat) {
  for (CpuLevel level : levels()) {
    for (const std::string& k : bases(true)) {
      for (const std::string& v : bases(false)) {
        const std::string kv = "k=" + k + ",v=" + v;
        RigOptions options;
        options.kv = kv.c_str();
        options.num_layers = 1;
        options.page_tokens = 16;
        options.head_dim = 80;  // a short last block of 32
        options.group = 3;
        options.level = level;
        SCOPED_TRACE(describe(options));
        run_short_story(options);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// Kernels know these sizes, and BF16 products take no others.
TEST(CpuAttention, EveryFormatWithPagesOf64Tokens) {
  const auto names = bases(false);
  for (CpuLevel level : levels()) {
    for (const std::string& v : names) {
      for (const std::string& k : bases(true)) {
        if (k != v && v != names.front()) continue;  // all keys once, all values once
        const std::string kv = "k=" + k + ",v=" + v;
        for (int group : {1, 3, 7}) {
          RigOptions options;
          options.kv = kv.c_str();
          options.num_layers = 1;
          options.num_kv_heads = 1;
          options.page_tokens = 64;
          options.head_dim = 64;
          options.group = group;
          options.level = level;
          SCOPED_TRACE(describe(options));
          run_short_story(options);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST(CpuAttention, EveryOption) {
  const char* specs[] = {"k=int8+mean,v=int8+sink",
                         "k=fp8+mean,v=nvfp4+46+sink",
                         "k=int4:channel,v=nvfp4+46+sink",
                         "k=int3:channel,v=int4+sink",
                         "k=nvfp4+46+mean+rot,v=nvfp4+rot",
                         "k=int4+bias+smooth,v=int4+bias",
                         "k=fp8:head+bias+smooth+rot,v=fp8:head+bias+rot",
                         "k=int4+mean+smooth+rot,v=mxfp4+rot+recent40",
                         "k=int2:channel+rot,v=int8+bias+recent16+sink",
                         "k=nvfp4,v=nvfp4+strict",
                         "k=fp8:token+rot,v=int4+strict",
                         "k=bf16,v=int4+recent70",
                         "k=int4:channel+prerope,v=nvfp4",
                         "k=fp8:head+prerope+bias+smooth+rot,v=fp8",
                         "k=int8+mean+prerope,v=int8+sink+recent20"};
  const std::vector<float> factors = {1.0f, 1.5f, 2.0f, 4.0f, 1.0f, 8.0f, 1.0f, 1.0f,
                                      1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 3.0f};
  for (CpuLevel level : levels()) {
    for (const char* kv : specs) {
      RigOptions options;
      options.kv = kv;
      options.level = level;
      options.page_tokens = 16;
      options.head_dim = 48;
      options.params.rope.rotary_dim = 32;
      options.params.rope.position_scale = 0.5f;
      options.params.rope.attention_factor = 1.1f;
      options.params.rope.frequency_factors = factors.data();
      SCOPED_TRACE(describe(options));
      run_short_story(options);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(CpuAttention, EveryGeometry) {
  for (int head_dim : {16, 64, 80, 96, 128, 192, 256}) {
    for (int group : {1, 2, 3, 4, 7, 8, 16}) {
      RigOptions options;
      options.kv = "k=int4:channel,v=nvfp4+46";
      options.num_layers = 1;
      options.num_kv_heads = 1;
      options.page_tokens = 16;
      options.head_dim = head_dim;
      options.group = group;
      options.level = detect_cpu_level();
      SCOPED_TRACE(describe(options));
      run_short_story(options);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(CpuAttention, EveryPageSizeAndMask) {
  const std::vector<float> sinks = {0.5f, -1.0f, 3.0f, 0.0f, 1.0f, 2.0f, -0.5f, 0.25f};
  for (CpuLevel level : levels()) {
    for (int page_tokens : {16, 32, 64, 128}) {
      for (int window : {0, 1, 7, 16, 100, 1000}) {
        for (int variant = 0; variant < 4; ++variant) {
          RigOptions options;
          options.kv = "k=fp8+mean,v=int4";
          options.num_layers = 1;
          options.num_kv_heads = 1;
          options.page_tokens = page_tokens;
          options.head_dim = 32;
          options.window = window;
          options.group = 4;
          options.level = level;
          if (variant % 2 == 1) options.params.softcap = 2.0f;
          if (variant >= 2) options.params.sink_logits = sinks.data();
          SCOPED_TRACE(describe(options) + " variant " + std::to_string(variant));
          run_short_story(options);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST(CpuAttention, SinkTokensStayVisibleBeyondTheWindow) {
  for (CpuLevel level : levels()) {
    for (int page_tokens : {16, 64}) {
      for (int sink_tokens : {1, 4, 17, 90}) {
        RigOptions options;
        options.kv = "k=int4:channel,v=nvfp4+46";
        options.num_layers = 1;
        options.page_tokens = page_tokens;
        options.mask_window = 50;
        options.params.sink_tokens = sink_tokens;
        options.level = level;
        SCOPED_TRACE(describe(options) + " sinks " + std::to_string(sink_tokens));
        AttentionRig with_sinks(options);
        with_sinks.extend(0, 700, 130);
        with_sinks.step({{0, 1}, {1, 200}});
        EXPECT_LT(with_sinks.worst_error(), max_error(options));
        if (HasFatalFailure()) return;
        // Far beyond the window the sinks are what differs from the window alone.
        options.params.sink_tokens = 0;
        AttentionRig window_only(options);
        window_only.extend(0, 701, 130);
        EXPECT_NE(with_sinks.outputs(0, 0).back(), window_only.outputs(0, 0).back());
      }
    }
  }
}

TEST(CpuAttention, LongContextIsMergedFromSplits) {
  for (CpuLevel level : levels()) {
    for (int threads : {1, 3}) {
      RigOptions options;
      options.kv = "4bit";
      options.num_layers = 1;
      options.page_tokens = 64;
      options.head_dim = 64;
      options.num_threads = threads;
      options.level = level;
      AttentionRig rig(options);
      rig.extend(0, 1800, 600);
      rig.step({{0, 1}, {1, 700}});
      rig.step({{0, 2}, {1, 1}});
      EXPECT_LT(rig.worst_error(), max_error(options)) << cpu_level_name(level);
    }
  }
}

// ---- the same bits in any chunk, batch and number of threads ----

constexpr int64_t kLength = 1100;

std::vector<float> outputs_of(RigOptions options, const std::vector<int>& chunks, bool neighbours) {
  options.compare_with_reference = false;
  options.num_layers = 1;
  AttentionRig rig(options);
  size_t n = 0;
  while (rig.length(0) < kLength) {
    const auto chunk =
        static_cast<int>(std::min<int64_t>(chunks[n++ % chunks.size()], kLength - rig.length(0)));
    if (neighbours && rig.length(1) < 900) {
      rig.step({{1, 1 + chunk / 2}, {0, chunk}, {2, 3}});
    } else {
      rig.step({{0, chunk}});
    }
    if (::testing::Test::HasFatalFailure()) return {};
  }
  return rig.outputs(0, 0);
}

void expect_same_bits(RigOptions options) {
  SCOPED_TRACE(describe(options));
  const std::vector<float> expected = outputs_of(options, {1}, false);  // decode all the way
  ASSERT_EQ(expected.size(), static_cast<size_t>(kLength * options.group * options.head_dim));
  const std::vector<std::vector<int>> plans = {{1100}, {512}, {3, 1, 64, 7}, {33, 200}};
  for (const std::vector<int>& chunks : plans) {
    for (int threads : {1, 4}) {
      for (bool neighbours : {false, true}) {
        options.num_threads = threads;
        const std::vector<float> found = outputs_of(options, chunks, neighbours);
        ASSERT_EQ(found.size(), expected.size());
        EXPECT_EQ(std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)), 0)
            << "chunks of " << chunks[0] << ", " << threads << " threads, neighbours "
            << neighbours;
      }
    }
  }
}

TEST(CpuAttention, BitsDoNotDependOnChunksBatchOrThreads) {
  struct Setting {
    const char* kv;
    int group;
    int window;
    int threads;
  };
  const Setting settings[] = {{"4bit", 4, 0, 1},
                              {"k=int8+mean,v=int8+recent100", 1, 0, 2},
                              {"k=nvfp4+rot+mean,v=nvfp4+rot", 3, 200, 1},
                              {"k=fp8:head+bias+prerope,v=int4+bias", 2, 0, 1}};
  for (const Setting& setting : settings) {
    RigOptions options;
    options.kv = setting.kv;
    options.group = setting.group;
    options.window = setting.window;
    options.head_dim = 48;
    options.page_tokens = 32;
    options.num_kv_heads = 1;
    options.params.softcap = 30.0f;
    options.params.rope.rotary_dim = 48;
    options.level = detect_cpu_level();
    options.num_threads = setting.threads;
    expect_same_bits(options);
  }
}

// Whole pages without softcap have kernels of their own, and BF16 products take only such sizes.
TEST(CpuAttention, BitsOfWholePagesDoNotDependOnChunksBatchOrThreads) {
  for (const char* kv : {"bf16", "fp8", "mxfp8", "k=fp8:token,v=nvfp4", "4bit", "8bit", "3bit"}) {
    RigOptions options;
    options.kv = kv;
    options.group = 3;
    options.head_dim = 64;
    options.page_tokens = 64;
    options.num_kv_heads = 1;
    options.level = detect_cpu_level();
    expect_same_bits(options);
  }
}

TEST(CpuAttention, TruncatedSequencesGiveTheSameBits) {
  RigOptions options;
  options.kv = "4bit";
  options.num_layers = 1;
  options.level = detect_cpu_level();
  AttentionRig straight(options), back(options);
  straight.extend(0, 150, 40);
  back.extend(0, 140, 33);
  back.truncate(0, 61);
  EXPECT_LE(back.length(0), 61);
  back.extend(0, 150, 7);
  EXPECT_TRUE(straight.outputs(0, 0) == back.outputs(0, 0));
}

// ---- append ----

TEST(CpuAppend, WritesTheBytesOfTheScalarOracle) {
  const char* specs[] = {"bf16",
                         "4bit",
                         "8bit",
                         "k=int3:channel+mean,v=int4+rot",
                         "k=nvfp4+46+rot,v=fp8:token+strict",
                         "k=int2:channel,v=mxfp8+recent50+sink"};
  for (const char* kv : specs) {
    for (CpuLevel level : levels()) {
      for (int head_dim : {64, 80}) {
        RigOptions options;
        options.kv = kv;
        options.level = level;
        options.head_dim = head_dim;
        options.num_threads = 3;
        options.poison = false;  // padding inside units is zero from the start
        options.compare_with_reference = false;
        SCOPED_TRACE(describe(options));
        AttentionRig fast(options);
        options.scalar_append = true;
        AttentionRig oracle(options);
        for (AttentionRig* rig : {&fast, &oracle}) {
          rig->step({{0, 7}, {1, 100}});
          rig->step({{1, 1}, {0, 1}});
          rig->step({{1, 33}, {0, 90}});
        }
        EXPECT_TRUE(fast.page_bytes(0) == oracle.page_bytes(0));
        EXPECT_TRUE(fast.page_bytes(1) == oracle.page_bytes(1));
      }
    }
  }
}

TEST(CpuAttention, NamesWhatItDoesNotSupport) {
  const auto format = formats::parse_cache_format("4bit");
  ASSERT_TRUE(format.has_value());
  EXPECT_TRUE(cpu::attention_supports(*format, 128, 16).has_value());
  const Status odd = cpu::attention_supports(*format, 72, 4);
  ASSERT_FALSE(odd.has_value());
  EXPECT_NE(odd.error().message().find("72"), std::string::npos);
  EXPECT_EQ(odd.error().code(), ErrorCode::kUnsupported);
  EXPECT_FALSE(cpu::attention_supports(*format, 512, 4).has_value());
  EXPECT_FALSE(cpu::attention_supports(*format, 64, 17).has_value());
}

}  // namespace
}  // namespace kvant::backend
