#include "kvant/backend/cuda/testing/decode_run.h"

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "kvant/backend/cuda/attention.h"

namespace kvant::backend::cuda::testing {

double decode_error(const ProblemOptions& options, bool deterministic) {
  auto attention = CudaAttention::create();
  if (!attention.has_value()) {
    ADD_FAILURE() << attention.error().message();
    return NAN;
  }
  (*attention)->set_deterministic(deterministic);
  PagedProblem problem(options);
  const Status status = (*attention)->run(problem.device_args(), nullptr);
  EXPECT_TRUE(status.has_value()) << (status ? "" : status.error().message());
  const cudaError_t error = cudaDeviceSynchronize();
  EXPECT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
  if (!status.has_value() || error != cudaSuccess) return NAN;
  const std::vector<float> first = problem.download();
  problem.poison_output();
  EXPECT_TRUE((*attention)->run(problem.device_args(), nullptr).has_value());
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const std::vector<float> second = problem.download();
  EXPECT_EQ(std::memcmp(first.data(), second.data(), first.size() * sizeof(float)), 0)
      << "two runs of the same step differ";
  return problem.error_of(first);
}

}  // namespace kvant::backend::cuda::testing
