// Decode attention on the device against the exact reference, and against itself.
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

class CudaDecode : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string reason = testing::no_device_reason();
    if (!reason.empty()) GTEST_SKIP() << reason;
  }
};

constexpr const char* kKeyFormats[] = {
    "bf16", "f16",          "fp8",          "fp8:token",    "fp8e5m2", "mxfp8", "int8",
    "int4", "int4:channel", "int3:channel", "int2:channel", "nvfp4",   "mxfp4"};
constexpr const char* kValueFormats[] = {"bf16",  "f16",  "fp8",  "fp8:token", "fp8e5m2",
                                         "mxfp8", "int8", "int4", "nvfp4",     "mxfp4"};

TEST_F(CudaDecode, EveryPairOfFormats) {
  for (const char* k : kKeyFormats) {
    for (const char* v : kValueFormats) {
      ProblemOptions options;
      options.kv = std::string("k=") + k + ",v=" + v;
      options.lengths = {517, 64, 129};
      const double error = decode_error(options);
      EXPECT_LT(error, kErrorLimit) << options.kv;
    }
  }
}

TEST_F(CudaDecode, Presets) {
  for (const char* kv : {"8bit", "6bit", "4bit", "3bit", "k=nvfp4+46+mean,v=nvfp4+46+sink",
                         "nvfp4+recent100", "bf16", "f16"}) {
    for (const int page_tokens : {16, 32, 64, 128}) {
      ProblemOptions options;
      options.kv = kv;
      options.page_tokens = page_tokens;
      options.lengths = {1000, 1, 65, 256};
      EXPECT_LT(decode_error(options), kErrorLimit) << kv << ", pages of " << page_tokens;
    }
  }
}

TEST_F(CudaDecode, GroupsAndHeadSizes) {
  for (const char* kv : {"nvfp4", "4bit", "fp8", "int8", "bf16"}) {
    for (const int head_dim : {64, 80, 96, 128, 192, 256}) {
      for (const int group : {1, 2, 3, 4, 6, 7, 8, 12, 16}) {
        ProblemOptions options;
        options.kv = kv;
        options.head_dim = head_dim;
        options.group = group;
        options.lengths = {333, 90};
        EXPECT_LT(decode_error(options), kErrorLimit)
            << kv << ", head_dim " << head_dim << ", group " << group;
      }
    }
  }
}

TEST_F(CudaDecode, SeveralNewTokens) {
  for (const char* kv : {"nvfp4", "4bit", "bf16"}) {
    for (const int new_tokens : {2, 3, 5, 8, 70}) {
      for (const int group : {1, 4, 8}) {
        ProblemOptions options;
        options.kv = kv;
        options.group = group;
        options.lengths = {200, 389, 640 + new_tokens / 2};
        options.new_tokens = {new_tokens, 1, new_tokens};
        EXPECT_LT(decode_error(options), kErrorLimit)
            << kv << ", " << new_tokens << " new tokens, group " << group;
      }
    }
  }
}

TEST_F(CudaDecode, WindowsSoftcapAndSinks) {
  std::vector<float> sinks(8);
  for (size_t i = 0; i < sinks.size(); ++i) sinks[i] = 0.5f * static_cast<float>(i) - 1.0f;
  for (const char* kv : {"nvfp4", "4bit", "int8", "bf16"}) {
    for (const int window : {0, 1, 100, 128, 500}) {
      ProblemOptions options;
      options.kv = kv;
      options.window = window;
      options.lengths = {900, 130, 40};
      options.new_tokens = {1, 3, 1};
      EXPECT_LT(decode_error(options), kErrorLimit) << kv << ", window " << window;
      options.params.softcap = 3.0f;
      EXPECT_LT(decode_error(options), kErrorLimit) << kv << ", softcap, window " << window;
      options.params.softcap = 0.0f;
      options.params.sink_tokens = 70;
      options.params.sink_logits = sinks.data();
      EXPECT_LT(decode_error(options), kErrorLimit) << kv << ", sinks, window " << window;
    }
  }
}

TEST_F(CudaDecode, LongAndManySequences) {
  for (const char* kv : {"nvfp4", "4bit"}) {
    ProblemOptions options;
    options.kv = kv;
    options.lengths = {20000};
    EXPECT_LT(decode_error(options), kErrorLimit) << kv << ", one long sequence";
    options.lengths.assign(100, 70);
    options.lengths[7] = 5000;
    options.num_kv_heads = 3;
    EXPECT_LT(decode_error(options), kErrorLimit) << kv << ", a ragged batch";
  }
}

// More than 16 for each team of an H100: a slot of each ring stays empty after its first turn.
TEST_F(CudaDecode, ManyPagesForEachTeam) {
  ProblemOptions options;
  options.group = 1;
  options.lengths.assign(20, 14'000);
  EXPECT_LT(decode_error(options), kErrorLimit);
}

// Terms that queries and outputs take over from the pages, beside pages in BF16 that have none.
TEST_F(CudaDecode, SmoothedRotatedAndBiased) {
  for (const char* kv :
       {"k=nvfp4+rot,v=nvfp4", "k=nvfp4,v=nvfp4+rot", "k=int8+smooth,v=int8+bias",
        "k=nvfp4+bias,v=fp8+bias", "k=nvfp4+smooth+rot+mean,v=int4+rot+bias+sink",
        "k=int4:channel+rot,v=nvfp4+rot+46+sink+recent100", "k=fp8+smooth+bias,v=int8+rot"}) {
    for (const int head_dim : {64, 96, 128, 256}) {
      for (const bool deterministic : {false, true}) {
        ProblemOptions options;
        options.kv = kv;
        options.head_dim = head_dim;
        options.lengths = {1300, 64, 65, 700, 1};
        EXPECT_LT(decode_error(options, deterministic), kErrorLimit)
            << kv << ", head_dim " << head_dim;
        options.lengths = {1300, 400, 200};
        options.new_tokens = {3, 1, 8};
        options.group = 7;
        options.window = 300;
        options.params.sink_tokens = 70;
        EXPECT_LT(decode_error(options, deterministic), kErrorLimit)
            << kv << ", a window, " << head_dim;
      }
    }
  }
  ProblemOptions options;
  options.kv = "k=nvfp4+rot+bias,v=nvfp4+rot+bias";
  options.lengths = {20000, 100};
  EXPECT_LT(decode_error(options), kErrorLimit) << "a long sequence";
}

// Means and biases beside zeros of channels, and beside pages that are read by tiles.
TEST_F(CudaDecode, OffsetsOfOtherKeys) {
  for (const char* kv :
       {"k=int4:channel+mean,v=nvfp4", "k=int3:channel+mean,v=int4", "k=f16+mean,v=nvfp4"}) {
    ProblemOptions options;
    options.kv = kv;
    options.lengths = {1300, 64, 65, 700, 1};
    EXPECT_LT(decode_error(options), kErrorLimit) << kv;
  }
  auto attention = CudaAttention::create();
  ASSERT_TRUE(attention.has_value());
  for (const char* kv : {"k=int4:channel+bias,v=nvfp4", "k=f16+mean,v=f16", "k=f16+rot,v=nvfp4",
                         "k=f16+rot+prerope,v=f16"}) {
    const Result<formats::CacheFormat> format = formats::parse_cache_format(kv);
    ASSERT_TRUE(format.has_value()) << kv;
    EXPECT_FALSE((*attention)->supports(*format, 128, 4).has_value()) << kv;
  }
}

// Splits at fixed positions, several launches of one step.
TEST_F(CudaDecode, ByPosition) {
  for (const char* kv : {"nvfp4", "4bit", "k=int4:channel,v=int4", "fp8", "int8", "bf16"}) {
    for (const int head_dim : {64, 128, 256}) {
      ProblemOptions options;
      options.kv = kv;
      options.head_dim = head_dim;
      options.lengths = {2100, 400, 513, 1};
      options.new_tokens = {1, 300, 2, 1};
      EXPECT_LT(decode_error(options, true), kErrorLimit) << kv << ", head_dim " << head_dim;
      options.group = 12;
      options.new_tokens = {1};
      options.window = 600;
      options.params.sink_tokens = 64;
      EXPECT_LT(decode_error(options, true), kErrorLimit)
          << kv << ", a window, head_dim " << head_dim;
    }
  }
  ProblemOptions options;
  options.lengths = {40000};
  options.new_tokens = {60};
  EXPECT_LT(decode_error(options, true), kErrorLimit) << "several launches";
}

// What is planned for a step is enough for it.
TEST_F(CudaDecode, StepsStayWithinTheirWorkspace) {
  for (const bool deterministic : {false, true}) {
    for (const int head_dim : {64, 128, 256}) {
      for (const int group : {1, 4, 12}) {
        for (const char* kv :
             {"nvfp4", "4bit", "int8", "k=int4:channel,v=int4", "k=nvfp4+rot+bias,v=nvfp4+rot+sink",
              "k=nvfp4+rot+bias+prerope,v=nvfp4"}) {
          for (const int new_tokens : {1, 8}) {
            ProblemOptions options;
            options.kv = kv;
            const bool pre_rope = options.kv.find("+prerope") != std::string::npos;
            if (pre_rope && group != 4) continue;
            options.head_dim = head_dim;
            options.group = group;
            options.lengths = {3000, 9, 700, 1500};
            options.new_tokens = {new_tokens};
            options.params.rope.rotary_dim = head_dim;
            PagedProblem problem(options);
            auto attention = CudaAttention::create();
            ASSERT_TRUE(attention.has_value());
            (*attention)->set_deterministic(deterministic);
            WorkspaceNeeds needs;
            needs.num_layers = 1;
            needs.max_rows = 4 * new_tokens;
            needs.max_context = 3000;
            needs.num_query_heads = problem.device_args().params.num_query_heads;
            needs.num_kv_heads = options.num_kv_heads;
            needs.head_dim = head_dim;
            needs.page_tokens = options.page_tokens;
            needs.max_sequences = 4;
            needs.transforms = options.kv.find("+rot") != std::string::npos;
            needs.pre_rope = pre_rope;
            std::byte* memory = nullptr;
            const auto bytes = static_cast<size_t>((*attention)->workspace_bytes(needs));
            ASSERT_EQ(cudaMalloc(reinterpret_cast<void**>(&memory), bytes), cudaSuccess);
            (*attention)->set_workspace(memory, needs);
            EXPECT_TRUE((*attention)->run(problem.device_args(), nullptr).has_value());
            EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
            EXPECT_FALSE((*attention)->outgrew_workspace())
                << kv << ", head_dim " << head_dim << ", group " << group << ", " << new_tokens
                << " new tokens" << (deterministic ? ", deterministic" : "");
            EXPECT_LT(problem.error_of(problem.download()), kErrorLimit);
            cudaFree(memory);
          }
        }
      }
    }
  }
}

// Sharp softmax, and scores that rise from page to page so that the reference always moves.
TEST_F(CudaDecode, SharpAndRisingScores) {
  for (const char* kv :
       {"nvfp4", "4bit", "k=int3:channel,v=int4", "int8", "fp8", "mxfp4", "bf16"}) {
    ProblemOptions options;
    options.kv = kv;
    options.lengths = {3000};
    options.score_deviation = 2.0f;
    EXPECT_LT(decode_error(options), kErrorLimit) << kv << ", score deviation 2";
    options.score_deviation = 1.0f;
    options.rising = true;
    EXPECT_LT(decode_error(options), kErrorLimit) << kv << ", rising";
  }
}

}  // namespace
}  // namespace kvant::backend::cuda
