// How many runs are kept as graphs, and that the memory plan counts them.

#include "kvant/backend/cuda/kept_graphs.h"

#include <gtest/gtest.h>

#include <memory>

#include "kvant/backend/cuda/status.h"
#include "kvant/backend/cuda/testing/cache_on_device.h"

namespace kvant::backend::cuda {
namespace {

WorkspaceNeeds needs_of(int layers, int sequences) {
  WorkspaceNeeds needs;
  needs.num_layers = layers;
  needs.max_rows = 512;
  needs.max_context = 1024;
  needs.max_cols = 1536;
  needs.num_query_heads = 9;
  needs.num_kv_heads = 3;
  needs.head_dim = 64;
  needs.page_tokens = 64;
  needs.max_sequences = sequences;
  return needs;
}

TEST(KeptGraphs, AsManyAsStepsOfTheModelMayHave) {
  EXPECT_EQ(KeptGraphs::most_graphs(needs_of(30, 1), 5, 256), 4 * 32);
  EXPECT_EQ(KeptGraphs::most_graphs(needs_of(30, 4), 5, 256), 4 * 32);
  EXPECT_EQ(KeptGraphs::most_graphs(needs_of(30, 16), 5, 256), 16 * 32);
  EXPECT_EQ(KeptGraphs::most_graphs(needs_of(80, 200), 5, 256), 2048);
  WorkspaceNeeds needs = needs_of(30, 16);
  needs.max_rows = 6;
  EXPECT_EQ(KeptGraphs::most_graphs(needs, 5, 256), 2 * 32);
  needs.max_rows = 4;
  EXPECT_EQ(KeptGraphs::most_graphs(needs, 5, 256), 0);
  needs = needs_of(30, 16);
  needs.num_experts = 8;
  EXPECT_EQ(KeptGraphs::most_graphs(needs, 5, 256), 0);
}

class KeptGraphsOnDevice : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string reason = testing::no_device_reason();
    if (!reason.empty()) GTEST_SKIP() << reason;
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
    ASSERT_EQ(cudaMalloc(reinterpret_cast<void**>(&byte_), 1), cudaSuccess);
  }
  void TearDown() override {
    static_cast<void>(graphs_.clear(stream_));
    if (byte_ != nullptr) cudaFree(byte_);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }
  // Sets the byte to `rows` by run `rows`; true if that was enqueued as it is, or captured now.
  bool run(int64_t rows) {
    bool enqueued = false;
    EXPECT_EQ(cudaMemsetAsync(byte_, 0, 1, stream_), cudaSuccess);
    EXPECT_TRUE(graphs_.run({.owner = this, .part = 1, .num_rows = rows}, stream_, [&] {
      enqueued = true;
      return cuda_status(cudaMemsetAsync(byte_, static_cast<int>(rows), 1, stream_), "setting");
    }));
    uint8_t found = 0;
    EXPECT_EQ(cudaMemcpyAsync(&found, byte_, 1, cudaMemcpyDeviceToHost, stream_), cudaSuccess);
    EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    EXPECT_EQ(found, rows);
    return enqueued;
  }
  cudaStream_t stream_ = nullptr;
  uint8_t* byte_ = nullptr;
  KeptGraphs graphs_;
};

TEST_F(KeptGraphsOnDevice, KeepsNoMoreThanItMay) {
  for (int time = 0; time < 6; ++time) EXPECT_TRUE(run(1));
  EXPECT_EQ(graphs_.num_graphs(), 0) << "none is allowed";
  graphs_.set_most(4);
  for (int64_t rows = 1; rows <= 30; ++rows) {
    for (int time = 0; time < 8; ++time) EXPECT_EQ(run(rows), time < 4) << rows << ' ' << time;
    EXPECT_LE(graphs_.num_graphs(), 4);
    EXPECT_GE(graphs_.num_graphs(), 1);
  }
  EXPECT_FALSE(run(30)) << "the last one is kept";
  EXPECT_TRUE(run(1)) << "the first one is not";
  ASSERT_TRUE(graphs_.clear(stream_));
  EXPECT_EQ(graphs_.num_graphs(), 0);
  EXPECT_TRUE(run(30));
  graphs_.set_most(1);
  for (int64_t rows = 1; rows <= 4; ++rows) {
    for (int time = 0; time < 8; ++time) EXPECT_EQ(run(rows), time < 4);
    EXPECT_EQ(graphs_.num_graphs(), 1);
  }
}

TEST_F(KeptGraphsOnDevice, ThePlanCountsThem) {
  const auto planned = [](Repetition repetition, int64_t limit, bool fits) {
    BackendOptions options;
    options.name = "cuda";
    options.repetition = repetition;
    options.memory_limit = limit;
    auto backend = create_backend(options);
    EXPECT_TRUE(backend);
    const WorkspaceNeeds needs = needs_of(30, 16);
    const int64_t bytes = (*backend)->workspace_bytes(needs);
    EXPECT_EQ(static_cast<bool>((*backend)->reserve_workspace(needs)), fits);
    if (fits) {
      EXPECT_EQ((*backend)->memory().stats().total_now, bytes);
      EXPECT_TRUE((*backend)->reserve_workspace(needs));
      EXPECT_EQ((*backend)->memory().stats().total_now, bytes);
      EXPECT_EQ((*backend)->memory().stats().total_peak, bytes);
      EXPECT_TRUE((*backend)->reserve_workspace({}));
      EXPECT_EQ((*backend)->memory().stats().total_now, 0);
    }
    return bytes;
  };
  const int64_t without = planned(Repetition::kNever, 0, true);
  const int64_t with = planned(Repetition::kWherePays, 0, true);
  EXPECT_EQ(with - without, 16 * 32 * KeptGraphs::kBytesOfGraph);
  planned(Repetition::kWherePays, with, true);
  planned(Repetition::kWherePays, with - 1, false);
}

}  // namespace
}  // namespace kvant::backend::cuda
