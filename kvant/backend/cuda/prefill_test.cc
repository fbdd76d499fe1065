// Prefill attention on the device against the exact reference on the same pages in host memory.
#include "kvant/backend/cuda/prefill/prefill_attention.h"

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <vector>

#include "kvant/attention/reference.h"
#include "kvant/backend/cuda/testing/cache_on_device.h"

namespace kvant::backend::cuda {
namespace {

using testing::CacheOnDevice;
using testing::CacheShape;
using testing::DeviceBuffer;
using testing::Rows;

struct Case {
  ImageType images = ImageType::kF16;
  CacheShape shape;
  int group = 2;
  int window = 0;  // that only attention knows
  int sink_tokens = 0;
  float softcap = 0.0f;
  bool sink_logits = false;
  float q_factor = 1.0f;
  int64_t image_bytes = int64_t{64} << 20;
  bool background = true;  // if there is such a kernel
};

// What every case of formats and masks runs: chunks on and off page boundaries, with and without
// history, across several pages.
std::vector<CacheShape::Sequence> ragged() {
  return {{200, 37}, {0, 100}, {128, 64}, {77, 1}, {333, 130}};
}

Case of(const char* kv) {
  Case c;
  c.shape.kv = kv;
  c.shape.sequences = ragged();
  return c;
}

class Prefill : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string reason = testing::no_device_reason();
    if (!reason.empty()) GTEST_SKIP() << reason;
  }

  // Relative L2 error; the outputs stay in out_ and exact_.
  double run(const Case& c) {
    CacheOnDevice cache(c.shape);
    cache::GroupView view = cache.view();
    cache::GroupView device_view = cache.device_view();
    if (c.window > 0) view.window = device_view.window = c.window;
    const int heads = c.shape.num_kv_heads * c.group;
    std::vector<float> q = cache.rows(Rows::kQueries, heads);
    for (float& x : q) x *= c.q_factor;
    std::vector<float> sinks;
    for (int h = 0; h < heads; ++h) sinks.push_back(2.0f + 0.5f * static_cast<float>(h));
    attention::AttentionParams params;
    params.num_query_heads = heads;
    params.scale = 1.0f / std::sqrt(static_cast<float>(c.shape.head_dim));
    params.softcap = c.softcap;
    params.sink_tokens = c.sink_tokens;
    params.sink_logits = c.sink_logits ? sinks.data() : nullptr;
    params.rope.rotary_dim = c.shape.head_dim;

    exact_.resize(q.size());
    attention::ReferenceArgs reference;
    reference.view = &view;
    reference.params = params;
    reference.q = q.data();
    reference.out = exact_.data();
    const Status expected = attention::reference_attention(reference);
    EXPECT_TRUE(expected.has_value()) << expected.error().message();
    return run_on_device(c, device_view, params, q);
  }

  double run_on_device(const Case& c, const cache::GroupView& view,
                       const attention::AttentionParams& params, const std::vector<float>& q) {
    PrefillLimits limits;
    limits.images = c.images;
    limits.image_bytes = c.image_bytes;
    limits.max_sequences = static_cast<int>(view.sequences.size());
    for (const cache::SequenceView& seq : view.sequences) {
      limits.max_rows += seq.num_new_tokens;
      limits.max_pages += (seq.first_position + 2 * seq.num_new_tokens) / view.page_tokens + 8;
    }
    limits.num_query_heads = params.num_query_heads;
    limits.num_kv_heads = view.num_kv_heads;
    limits.head_dim = view.head_dim;
    limits.page_tokens = view.page_tokens;
    const int64_t bytes = PrefillAttention::workspace_bytes(limits);
    const DeviceBuffer workspace(bytes);
    workspace.fill(0xff);
    auto prefill = PrefillAttention::create(limits, workspace.as<std::byte>(), bytes);
    EXPECT_TRUE(prefill.has_value()) << prefill.error().message();
    (*prefill)->set_background(c.background);
    const int64_t out_bytes = static_cast<int64_t>(q.size()) * 4;
    const DeviceBuffer device_q(q.data(), out_bytes);
    const DeviceBuffer device_out(out_bytes);
    const int64_t num_lse = static_cast<int64_t>(q.size()) / view.head_dim;
    const DeviceBuffer device_lse(num_lse * 4);
    AttentionArgs args;
    args.view = &view;
    args.params = params;
    args.q = device_q.as<float>();
    args.out = device_out.as<float>();
    out_.resize(q.size());
    lse_.resize(static_cast<size_t>(num_lse));
    std::vector<float> again(q.size());
    for (std::vector<float>* out : {&again, &out_}) {
      device_out.fill(0xff);
      device_lse.fill(0xff);
      const Status done = (*prefill)->run(args, nullptr, device_lse.as<float>());
      EXPECT_TRUE(done.has_value()) << done.error().message();
      const Status range = (*prefill)->check_range(nullptr);
      EXPECT_TRUE(range.has_value()) << range.error().message();
      if (!done || !range) return NAN;
      device_out.read(out->data());
    }
    device_lse.read(lse_.data());
    EXPECT_EQ(out_, again) << "a replay gives the same bits";
    return attention::relative_l2(out_, exact_);
  }

  void expect_close(const Case& c, double limit = 5e-4) {
    const double error = run(c);
    EXPECT_LE(error, limit) << c.shape.kv << " head_dim " << c.shape.head_dim << " group "
                            << c.group << " page " << c.shape.page_tokens;
    EXPECT_FALSE(std::isnan(error));
    if (std::getenv("KVANT_PRINT_ERRORS") != nullptr) {
      std::printf("%-44s d %3d G %2d page %3d %s error %.2e\n", c.shape.kv.c_str(),
                  c.shape.head_dim, c.group, c.shape.page_tokens,
                  c.images == ImageType::kF16 ? "16bit" : "fp8", error);
    }
  }

  std::vector<double> exact_;
  std::vector<float> out_;
  std::vector<float> lse_;
};

TEST_F(Prefill, SingleFormats) {
  for (const char* kv :
       {"bf16", "f16", "fp8", "fp8:head", "fp8:token", "fp8e5m2", "mxfp8", "int8", "int4", "nvfp4",
        "mxfp4", "k=int4:channel,v=int8", "k=int3:channel,v=bf16", "k=int2:channel,v=mxfp4"}) {
    expect_close(of(kv));
  }
}

TEST_F(Prefill, PresetsAndOptions) {
  for (const char* kv : {"8bit", "6bit", "4bit", "3bit", "k=nvfp4+mean,v=nvfp4",
                         "k=nvfp4+bias,v=fp8+bias", "k=int8+smooth,v=int8", "k=int8+rot,v=int8+rot",
                         "k=nvfp4+smooth+rot+mean,v=int4+rot+bias", "k=int8+prerope,v=int8",
                         "k=nvfp4+rot+mean+prerope,v=fp8", "nvfp4+sink+recent100", "fp8+strict"}) {
    expect_close(of(kv));
  }
}

TEST_F(Prefill, GroupSizes) {
  for (int group : {1, 2, 3, 4, 6, 7, 8, 16}) {
    Case c = of("4bit");
    c.group = group;
    expect_close(c);
  }
}

TEST_F(Prefill, HeadDims) {
  for (int d : {64, 80, 96, 128, 192, 256}) {
    for (const char* kv : {"4bit", "k=int3:channel,v=int8", "k=nvfp4+rot,v=int4"}) {
      Case c = of(kv);
      c.shape.head_dim = d;
      expect_close(c);
    }
  }
}

TEST_F(Prefill, PageSizes) {
  for (int page : {16, 32, 64, 128}) {
    for (int d : {64, 256}) {
      Case c = of("nvfp4+46");
      c.shape.page_tokens = page;
      c.shape.head_dim = d;
      c.group = page == 32 ? 3 : 4;
      expect_close(c);
    }
  }
}

TEST_F(Prefill, Windows) {
  for (int window : {1, 16, 64, 100, 300}) {
    Case c = of("4bit");
    c.window = window;
    expect_close(c);
    c.sink_tokens = 4;
    expect_close(c);
    c.sink_tokens = 100;
    expect_close(c);
  }
  Case c = of("k=nvfp4+mean,v=nvfp4");  // a cache that frees pages
  c.shape.cache_window = 96;
  expect_close(c);
}

TEST_F(Prefill, RecentPages) {
  for (const char* kv :
       {"nvfp4+recent64", "nvfp4+recent200", "k=int4:channel,v=nvfp4+sink+recent1"}) {
    for (int window : {0, 150}) {
      for (int group : {1, 4}) {
        Case c = of(kv);
        c.window = window;
        c.sink_tokens = window > 0 ? 3 : 0;
        c.group = group;
        expect_close(c);
      }
    }
  }
}

TEST_F(Prefill, SoftcapAndSinkLogits) {
  for (int d : {64, 128, 256}) {
    Case c = of("4bit");
    c.shape.head_dim = d;
    c.softcap = 3.0f;
    expect_close(c);
    c.sink_logits = true;
    expect_close(c);
    c.softcap = 0.0f;
    expect_close(c);
  }
}

// exp(lse) is what a sink logit is weighed against.
TEST_F(Prefill, LogSumExp) {
  Case c = of("k=nvfp4+mean,v=fp8");
  EXPECT_LE(run(c), 5e-4);
  const std::vector<double> plain = exact_;
  const std::vector<float> lse = lse_;
  c.sink_logits = true;
  EXPECT_LE(run(c), 5e-4);
  const auto d = static_cast<size_t>(c.shape.head_dim);
  const auto heads = static_cast<size_t>(c.shape.num_kv_heads * c.group);
  for (size_t n = 0; n < lse.size(); ++n) {
    double with = 0.0, without = 0.0;
    for (size_t i = 0; i < d; ++i) {
      with += exact_[n * d + i] * plain[n * d + i];
      without += plain[n * d + i] * plain[n * d + i];
    }
    const double sink = 2.0 + 0.5 * static_cast<double>(n % heads);
    const double expected = sink - std::log(without / with - 1.0);
    EXPECT_NEAR(lse[n], expected, 1e-3);
    EXPECT_NEAR(lse_[n], expected, 1e-3) << "sink logits do not belong to it";
  }
}

// Images written beside attention give the same bits as images written before.
TEST_F(Prefill, BackgroundImages) {
  for (const char* kv : {"nvfp4", "4bit", "8bit", "bf16", "k=int4:channel+mean,v=nvfp4+bias"}) {
    for (int group : {1, 4, 7}) {
      Case c = of(kv);
      c.group = group;
      expect_close(c);
      const std::vector<float> beside = out_;
      c.background = false;
      expect_close(c);
      EXPECT_EQ(beside, out_);
    }
  }
}

// One KV head at a time, sequences in turn, and one sequence in ranges of pages.
TEST_F(Prefill, SmallWorkspaces) {
  const int64_t unit = 2 * image_bytes(128, 64, ImageType::kF16);
  for (int64_t images : {40, 14, 8}) {
    for (const char* kv : {"4bit", "nvfp4+sink"}) {
      Case c = of(kv);
      c.image_bytes = images * unit;
      expect_close(c);
      c.window = 200;
      c.sink_tokens = 5;
      c.sink_logits = true;
      expect_close(c);
    }
  }
  Case c = of("4bit");
  c.image_bytes = 2 * unit;
  CacheOnDevice cache(c.shape);
  const cache::GroupView view = cache.device_view();
  PrefillPlan plan;
  const Status status = make_prefill_plan({&view, 4, 0, c.image_bytes}, plan);
  ASSERT_FALSE(status.has_value());
  EXPECT_EQ(status.error().code(), ErrorCode::kResourceExhausted);
}

// Scores of standard deviation 4 and 8: few keys have all the weight.
TEST_F(Prefill, SharpScores) {
  for (const char* kv : {"4bit", "k=nvfp4+mean,v=nvfp4", "int8"}) {
    for (float factor : {4.0f, 8.0f}) {
      Case c = of(kv);
      c.q_factor = factor;
      expect_close(c, 2e-3);
    }
  }
}

TEST_F(Prefill, LongHistory) {
  Case c = of("4bit");
  c.shape.sequences = {{4000, 70}, {2500, 300}};
  c.group = 4;
  c.shape.num_kv_heads = 1;
  expect_close(c);
  c.window = 1024;
  expect_close(c);
}

// ---- E4M3 operands ----

// Three bits of mantissa: a number is off by 2.6 % (root mean square), weights and values so once
// and scores by the keys' and queries' roundings, which average out over head_dim channels.
constexpr double kE4m3Limit = 7e-2;

class PrefillE4m3 : public Prefill {
 protected:
  void SetUp() override {
    Prefill::SetUp();
    const std::string reason = testing::no_hopper_reason();
    if (!reason.empty()) GTEST_SKIP() << reason;
  }
};

Case e4m3(const char* kv) {
  Case c = of(kv);
  c.images = ImageType::kE4m3;
  return c;
}

TEST_F(PrefillE4m3, Formats) {
  for (const char* kv : {"bf16",
                         "f16",
                         "fp8",
                         "fp8:head",
                         "fp8:token",
                         "fp8e5m2",
                         "mxfp8",
                         "int8",
                         "int4",
                         "nvfp4",
                         "mxfp4",
                         "k=int4:channel,v=int8",
                         "k=int3:channel,v=bf16",
                         "k=int2:channel,v=mxfp4",
                         "8bit",
                         "6bit",
                         "4bit",
                         "3bit",
                         "k=nvfp4+mean,v=nvfp4",
                         "k=nvfp4+bias,v=fp8+bias",
                         "k=int8+smooth,v=int8",
                         "k=int8+rot,v=int8+rot",
                         "k=nvfp4+smooth+rot+mean,v=int4+rot+bias",
                         "k=int8+prerope,v=int8",
                         "k=nvfp4+rot+mean+prerope,v=fp8",
                         "nvfp4+sink+recent100",
                         "fp8+strict"}) {
    expect_close(e4m3(kv), kE4m3Limit);
  }
}

TEST_F(PrefillE4m3, Shapes) {
  for (int d : {64, 80, 96, 128, 192, 256}) {
    for (int page : {16, 32, 64, 128}) {
      Case c = e4m3(page == 32 ? "k=nvfp4+rot,v=int4" : "4bit");
      c.shape.head_dim = d;
      c.shape.page_tokens = page;
      c.group = page == 32 ? 3 : page == 64 ? 16 : 4;
      expect_close(c, kE4m3Limit);
    }
  }
}

TEST_F(PrefillE4m3, Masks) {
  for (int d : {64, 80, 128, 192, 256}) {
    for (int window : {1, 64, 300}) {
      Case c = e4m3("4bit");
      c.shape.head_dim = d;
      c.window = window;
      expect_close(c, kE4m3Limit);
      c.sink_tokens = 100;
      c.sink_logits = true;
      expect_close(c, kE4m3Limit);
    }
    Case c = e4m3("k=nvfp4+mean,v=nvfp4");
    c.shape.head_dim = d;
    c.softcap = 3.0f;
    expect_close(c, kE4m3Limit);
  }
}

// Sums that go on from range to range, as many small weights.
TEST_F(PrefillE4m3, SmallWorkspaces) {
  const int64_t unit = 2 * image_bytes(128, 64, ImageType::kE4m3);
  for (int64_t images : {40, 14, 8}) {
    Case c = e4m3("4bit");
    c.image_bytes = images * unit;
    expect_close(c, kE4m3Limit);
  }
  Case c = e4m3("4bit");
  c.shape.sequences = {{4000, 70}, {2500, 300}};
  c.shape.num_kv_heads = 1;
  c.group = 4;
  expect_close(c, kE4m3Limit);
  c.image_bytes = 20 * unit;
  expect_close(c, kE4m3Limit);
}

// A few keys have all the weight: roundings of scores count in full.
TEST_F(PrefillE4m3, SharpScores) {
  for (const char* kv : {"4bit", "k=nvfp4+mean,v=nvfp4", "fp8"}) {
    for (float factor : {4.0f, 8.0f}) {
      Case c = e4m3(kv);
      c.q_factor = factor;
      expect_close(c, 3e-1);
    }
  }
}

TEST_F(PrefillE4m3, LogSumExp) {
  Case c = of("k=nvfp4+mean,v=fp8");
  run(c);
  const std::vector<float> exact = lse_;
  c.images = ImageType::kE4m3;
  run(c);
  for (size_t n = 0; n < exact.size(); ++n) EXPECT_NEAR(lse_[n], exact[n], 0.1);
}

}  // namespace
}  // namespace kvant::backend::cuda
