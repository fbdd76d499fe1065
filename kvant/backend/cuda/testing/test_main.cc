// main() of tests of which most need a device: without one those skip themselves, and a run without
// failures ends with 77, which CTest reports as skipped, not as passed.
#include <gtest/gtest.h>

#include <cstdio>
#include <string>

#include "kvant/backend/cuda/testing/cache_on_device.h"

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  const int result = RUN_ALL_TESTS();
  const std::string reason = kvant::backend::cuda::testing::no_device_reason();
  if (reason.empty() || result != 0) return result;
  std::fprintf(stderr, "%s: what needs a device was not tested\n", reason.c_str());
  return 77;
}
