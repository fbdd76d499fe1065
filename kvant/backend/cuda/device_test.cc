#include "kvant/backend/cuda/device.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

namespace kvant::backend::cuda {
namespace {

TEST(CudaDevice, LevelsThatDoNotExistAreErrors) {
  ::setenv("KVANT_CUDA_LEVEL", "ampere", 1);
  const auto status = find_device();
  ::unsetenv("KVANT_CUDA_LEVEL");
  ASSERT_FALSE(status.has_value());
  EXPECT_EQ(status.error().code(), ErrorCode::kInvalidArgument);
  EXPECT_NE(status.error().message().find("expected generic, small, h100 or h200"),
            std::string::npos);
  EXPECT_NE(status.error().message().find("ampere"), std::string::npos);
}

// What is found is said, whatever it is.
TEST(CudaDevice, WithoutADeviceItSaysWhatIsNeeded) {
  const auto status = find_device();
  if (status) {
    EXPECT_GT(device_traits().num_sms, 0);
    EXPECT_GE(device_traits().shared_per_sm, device_traits().shared_per_block);
    return;
  }
  EXPECT_EQ(status.error().code(), ErrorCode::kUnsupported);
  EXPECT_NE(status.error().message().find("found"), std::string::npos);
  EXPECT_EQ(device_traits().num_sms, 0);
}

}  // namespace
}  // namespace kvant::backend::cuda
