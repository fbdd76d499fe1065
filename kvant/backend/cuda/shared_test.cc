// Attention on pages that sequences share, on the device: against the exact reference, against
// itself and in a captured graph.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kvant/backend/cuda/attention.h"
#include "kvant/backend/cuda/testing/cache_on_device.h"
#include "kvant/backend/cuda/testing/paged_problem.h"

namespace kvant::backend::cuda {
namespace {

using testing::PagedProblem;
using testing::ProblemOptions;

constexpr double kErrorLimit = 5e-4;  // relative L2 of a launch

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// The error of a step whose sequences share pages; `sharing` of them must be read together.
double run(const ProblemOptions& options, int sharing) {
  auto attention = CudaAttention::create();
  if (!attention.has_value()) {
    ADD_FAILURE() << attention.error().message();
    return NAN;
  }
  (*attention)->set_sharing(PageSharing::kWherePossible);
  PagedProblem problem(options);
  std::vector<float> first;
  for (int turn = 0; turn < 2; ++turn) {
    problem.poison_output();
    const Status status = (*attention)->run(problem.device_args(), nullptr);
    EXPECT_TRUE(status.has_value()) << (status ? "" : status.error().message());
    const cudaError_t error = cudaDeviceSynchronize();
    EXPECT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
    if (!status.has_value() || error != cudaSuccess) return NAN;
    const std::vector<float> out = problem.download();
    if (turn == 0) first = out;
    EXPECT_TRUE(same(first, out)) << "two runs of the same step differ";
  }
  EXPECT_EQ((*attention)->num_sharing_sequences(), sharing);
  const double error = problem.error_of(first);
  if (std::getenv("KVANT_PRINT_ERRORS") != nullptr)
    std::printf("%s, %zu sequences, group %d, head_dim %d: %.2e\n", options.kv.c_str(),
                options.lengths.size(), options.group, options.head_dim, error);
  return error;
}

// `count` sequences with `shared` tokens in common and `rest` of their own.
ProblemOptions batch_of(const char* kv, int count, int64_t shared, int64_t rest, int group = 4) {
  ProblemOptions options;
  options.kv = kv;
  options.group = group;
  options.lengths.assign(static_cast<size_t>(count), shared + rest);
  options.prefixes.assign(static_cast<size_t>(count), {0, shared});
  options.prefixes[0] = {};
  return options;
}

class CudaShared : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string reason = testing::no_hopper_reason();
    if (!reason.empty()) GTEST_SKIP() << reason;
  }
};

constexpr const char* kFormats[] = {"nvfp4", "4bit", "k=int4:channel,v=nvfp4", "fp8", "bf16"};

TEST_F(CudaShared, FormatsAndBatchSizes) {
  for (const char* kv : kFormats) {
    for (const int count : {2, 5, 16, 17, 32, 33, 100}) {
      EXPECT_LT(run(batch_of(kv, count, 1024, 100), count), kErrorLimit)
          << kv << ", " << count << " sequences";
    }
  }
}

TEST_F(CudaShared, GroupsAndHeadSizes) {
  for (const char* kv : kFormats) {
    for (const int head_dim : {64, 128}) {
      for (const int group : {1, 2, 3, 6, 7, 8, 12, 16}) {
        ProblemOptions options = batch_of(kv, 9, 512, 65, group);
        options.head_dim = head_dim;
        EXPECT_LT(run(options, 9), kErrorLimit)
            << kv << ", head_dim " << head_dim << ", group " << group;
      }
    }
  }
}

// Sequences 0 to 5 have 1,024 tokens in common, 3 to 5 also 2,048; 7 to 9 have others, 6 none. Some
// end right after what they share.
ProblemOptions nested(const char* kv) {
  ProblemOptions options;
  options.kv = kv;
  options.lengths = {3000, 1025, 1300, 2049, 2500, 2112, 700, 900, 513, 600};
  options.prefixes = {{},        {0, 1024}, {0, 1024}, {0, 2048}, {0, 2048},
                      {0, 2048}, {},        {},        {7, 512},  {7, 512}};
  return options;
}

TEST_F(CudaShared, SeveralAndNestedGroups) {
  for (const char* kv : kFormats) {
    ProblemOptions options = nested(kv);
    EXPECT_LT(run(options, 9), kErrorLimit) << kv;
    options.num_kv_heads = 5;
    options.new_tokens = {1, 1, 3, 1, 4};
    options.lengths = {3000, 1025, 1300, 2049, 2500, 2115, 700, 900, 516, 600};
    EXPECT_LT(run(options, 9), kErrorLimit) << kv << ", several new tokens";
  }
}

TEST_F(CudaShared, LongPrefixes) {
  for (const char* kv : kFormats) {
    for (const int count : {4, 32}) {
      ProblemOptions options = batch_of(kv, count, 8192, 130);
      EXPECT_LT(run(options, count), kErrorLimit) << kv << ", " << count << " sequences";
    }
  }
}

// Sharp softmax, scores that rise along the sequence, logits of sinks.
TEST_F(CudaShared, ScoresAndSinks) {
  std::vector<float> sinks(8);
  for (size_t i = 0; i < sinks.size(); ++i) sinks[i] = 0.5f * static_cast<float>(i) - 1.0f;
  for (const char* kv : kFormats) {
    ProblemOptions options = batch_of(kv, 8, 2048, 70);
    options.params.sink_logits = sinks.data();
    EXPECT_LT(run(options, 8), kErrorLimit) << kv << ", sink logits";
    options.params.sink_logits = nullptr;
    options.score_deviation = 2.0f;
    EXPECT_LT(run(options, 8), kErrorLimit) << kv << ", score deviation 2";
    options.score_deviation = 1.0f;
    options.rising = true;
    EXPECT_LT(run(options, 8), kErrorLimit) << kv << ", rising";
  }
}

// What has no kernel reads each sequence's pages as before.
TEST_F(CudaShared, OthersGoUnshared) {
  EXPECT_LT(run(batch_of("int8", 8, 1024, 70), 0), kErrorLimit);
  ProblemOptions options = batch_of("nvfp4", 8, 1024, 70);
  options.page_tokens = 32;
  EXPECT_LT(run(options, 0), kErrorLimit) << "pages of 32";
  options.page_tokens = 64;
  options.params.softcap = 3.0f;
  EXPECT_LT(run(options, 0), kErrorLimit) << "softcap";
  options.params.softcap = 0.0f;
  options.window = 500;
  options.params.sink_tokens = 64;  // or pages before the window would be gone
  EXPECT_LT(run(options, 0), kErrorLimit) << "window";
}

TEST_F(CudaShared, GraphReplaysGiveTheSameBits) {
  for (const char* kv : kFormats) {
    PagedProblem problem(nested(kv));
    auto attention = CudaAttention::create();
    ASSERT_TRUE(attention.has_value());
    (*attention)->set_sharing(PageSharing::kWherePossible);
    cudaStream_t stream;
    ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
    ASSERT_TRUE((*attention)->run(problem.device_args(), stream).has_value());
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    const std::vector<float> first = problem.download();
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    for (int call = 0; call < 3; ++call)
      ASSERT_TRUE((*attention)->launch(problem.device_args(), stream).has_value());
    ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
    for (int replay = 0; replay < 5; ++replay) {
      problem.poison_output();
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      ASSERT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
      ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
      EXPECT_TRUE(same(problem.download(), first)) << kv << ", replay " << replay;
    }
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
  }
}

}  // namespace
}  // namespace kvant::backend::cuda
