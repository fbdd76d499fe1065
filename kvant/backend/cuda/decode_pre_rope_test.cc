// Decode attention on keys stored before RoPE (+prerope) against the exact reference.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include "kvant/backend/cuda/attention.h"
#include "kvant/backend/cuda/testing/cache_on_device.h"
#include "kvant/backend/cuda/testing/decode_run.h"
#include "kvant/backend/cuda/testing/paged_problem.h"

namespace kvant::backend::cuda {
namespace {

using testing::decode_error;
using testing::PagedProblem;
using testing::ProblemOptions;

constexpr double kErrorLimit = 5e-4;  // relative L2 of a launch

class CudaDecodeBeforeRope : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string reason = testing::no_device_reason();
    if (!reason.empty()) GTEST_SKIP() << reason;
  }
};

constexpr const char* kKeyFormats[] = {
    "bf16", "f16",          "fp8",          "fp8:token",    "fp8e5m2", "mxfp8", "int8",
    "int4", "int4:channel", "int3:channel", "int2:channel", "nvfp4",   "mxfp4"};

ProblemOptions before_rope(const std::string& kv, int head_dim = 128) {
  ProblemOptions options;
  options.kv = kv;
  options.head_dim = head_dim;
  options.params.rope.rotary_dim = head_dim;
  return options;
}

// Keys stored before RoPE, which the kernel rotates.
TEST_F(CudaDecodeBeforeRope, Formats) {
  for (const char* k : kKeyFormats) {
    for (const char* v : {"bf16", "f16", "int4", "nvfp4", "fp8"}) {
      ProblemOptions options = before_rope(std::string("k=") + k + "+prerope,v=" + v);
      options.lengths = {517, 64, 129};
      EXPECT_LT(decode_error(options), kErrorLimit) << options.kv;
      EXPECT_LT(decode_error(options, true), kErrorLimit) << options.kv << ", deterministic";
    }
  }
  for (const char* kv : {"k=nvfp4+46+prerope+mean,v=nvfp4+46+sink", "k=int4:channel+prerope,v=int4",
                         "k=fp8+prerope,v=fp8+recent100", "k=bf16+prerope,v=bf16"}) {
    for (const int page_tokens : {16, 32, 64, 128}) {
      ProblemOptions options = before_rope(kv);
      options.page_tokens = page_tokens;
      options.lengths = {1000, 1, 65, 256};
      EXPECT_LT(decode_error(options), kErrorLimit) << kv << ", pages of " << page_tokens;
    }
  }
}

// What was done to keys before they were encoded is undone before they rotate.
TEST_F(CudaDecodeBeforeRope, Options) {
  for (const char* kv :
       {"k=int8+mean+prerope,v=int8", "k=fp8+bias+prerope,v=fp8", "k=int8+smooth+prerope,v=int8",
        "k=nvfp4+rot+prerope,v=nvfp4", "k=nvfp4+rot+mean+prerope,v=fp8",
        "k=fp8+bias+smooth+rot+prerope,v=nvfp4+rot+bias", "k=int4+mean+prerope,v=int4+rot",
        "k=int4:channel+smooth+bias+prerope,v=nvfp4", "k=int3:channel+rot+mean+prerope,v=int4",
        "k=mxfp4+mean+smooth+prerope,v=mxfp4", "k=mxfp8+rot+bias+prerope,v=nvfp4",
        "k=fp8:token+mean+prerope,v=int8", "k=fp8e5m2+rot+prerope,v=fp8e5m2",
        "k=f16+rot+mean+prerope,v=nvfp4"}) {
    for (const int head_dim : {64, 96, 128, 256}) {
      for (const bool deterministic : {false, true}) {
        ProblemOptions options = before_rope(kv, head_dim);
        options.lengths = {1300, 64, 65, 700, 1};
        EXPECT_LT(decode_error(options, deterministic), kErrorLimit)
            << kv << ", head_dim " << head_dim;
      }
    }
  }
}

constexpr const char* kBeforeRope[] = {
    "k=nvfp4+prerope,v=nvfp4",       "k=int4:channel+prerope,v=nvfp4",
    "k=int4:channel+prerope,v=int4", "k=int3:channel+prerope,v=int4",
    "k=fp8+prerope,v=fp8",           "k=int8+prerope,v=int8",
    "k=bf16+prerope,v=nvfp4"};

TEST_F(CudaDecodeBeforeRope, Shapes) {
  for (const char* kv : kBeforeRope) {
    for (const int head_dim : {64, 80, 96, 128, 192, 256}) {
      for (const int group : {1, 3, 4, 8, 12}) {
        ProblemOptions options = before_rope(kv, head_dim);
        options.group = group;
        options.lengths = {333, 90};
        EXPECT_LT(decode_error(options), kErrorLimit)
            << kv << ", head_dim " << head_dim << ", group " << group;
      }
    }
    for (const int new_tokens : {2, 5, 8, 70}) {
      for (const int group : {1, 4, 8}) {
        ProblemOptions options = before_rope(kv);
        options.group = group;
        options.lengths = {200, 389, 640 + new_tokens / 2};
        options.new_tokens = {new_tokens, 1, new_tokens};
        EXPECT_LT(decode_error(options), kErrorLimit)
            << kv << ", " << new_tokens << " new tokens, group " << group;
      }
    }
    for (const bool deterministic : {false, true}) {
      ProblemOptions options = before_rope(kv);
      options.lengths = {900, 130, 40};
      options.new_tokens = {1, 3, 1};
      options.window = 128;
      EXPECT_LT(decode_error(options, deterministic), kErrorLimit) << kv << ", a window";
      options.params.softcap = 3.0f;
      options.params.sink_tokens = 70;
      EXPECT_LT(decode_error(options, deterministic), kErrorLimit) << kv << ", sinks and softcap";
    }
  }
}

// Angles are right far from the start and for every kind of RoPE.
TEST_F(CudaDecodeBeforeRope, Settings) {
  std::vector<float> factors(64);
  for (size_t i = 0; i < factors.size(); ++i) factors[i] = 1.0f + static_cast<float>(i) / 8.0f;
  for (const char* kv : kBeforeRope) {
    ProblemOptions options = before_rope(kv);
    options.lengths = {20000, 70};
    EXPECT_LT(decode_error(options), kErrorLimit) << kv << ", a long sequence";
    options.lengths = {100000, 1000000};
    options.window = 1000;
    EXPECT_LT(decode_error(options), kErrorLimit) << kv << ", at position 1000000";
    EXPECT_LT(decode_error(options, true), kErrorLimit)
        << kv << ", deterministic, at position 1000000";
    options.lengths = {3000, 400};
    options.window = 0;
    options.params.rope.base = 500000.0f;
    options.params.rope.position_scale = 0.125f;
    options.params.rope.attention_factor = 1.2f;
    options.params.rope.frequency_factors = factors.data();
    EXPECT_LT(decode_error(options), kErrorLimit) << kv << ", scaled";
    for (const int rotary_dim : {0, 16, 32, 48, 64, 96}) {
      options.params.rope.rotary_dim = rotary_dim;
      EXPECT_LT(decode_error(options), kErrorLimit)
          << kv << ", " << rotary_dim << " channels rotate";
    }
    for (const int head_dim : {80, 256}) {
      options.head_dim = head_dim;
      options.params.rope.rotary_dim = head_dim == 80 ? 32 : 64;
      EXPECT_LT(decode_error(options), kErrorLimit) << kv << ", a part of head_dim " << head_dim;
    }
  }
  // Sharp softmax; sums of products of four rounded numbers.
  for (const char* kv : kBeforeRope) {
    ProblemOptions options = before_rope(kv);
    options.lengths = {3000};
    options.score_deviation = 2.0f;
    EXPECT_LT(decode_error(options), 2 * kErrorLimit) << kv << ", score deviation 2";
  }
  auto attention = CudaAttention::create();
  ASSERT_TRUE(attention.has_value());
  ProblemOptions options = before_rope("k=nvfp4+prerope,v=nvfp4");
  options.params.rope.rotary_dim = 24;
  PagedProblem problem(options);
  EXPECT_FALSE((*attention)->supports(problem.device_args()).has_value());
  EXPECT_FALSE((*attention)->run(problem.device_args(), nullptr).has_value());
}

}  // namespace
}  // namespace kvant::backend::cuda
