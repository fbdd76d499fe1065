#include "kvant/backend/cuda/device.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string>
#include <string_view>

#include "kvant/backend/cuda/status.h"

namespace kvant::backend::cuda {
namespace {

constexpr int kLeastMajor = 8;
constexpr int kHopperMajor = 9;
constexpr const char* kLevelVariable = "KVANT_CUDA_LEVEL";
constexpr int kSmallShared = 100 * 1024;    // of a multiprocessor; a block has 1 KiB less
constexpr double kFastBytesOfCycle = 16.0;  // H100: 12.8, H200: 18.4

// Only to ask what code this build has for the device.
__global__ void probe_kernel() {}

std::string_view wanted_level() {
  const char* const level = std::getenv(kLevelVariable);
  return level == nullptr ? "" : level;
}

int attribute(cudaDeviceAttr what, int device) {
  int value = 0;
  if (cudaDeviceGetAttribute(&value, what, device) != cudaSuccess) cudaGetLastError();
  return value;
}

// What memory gives a multiprocessor in a cycle, both at their highest clocks; 0 if unknown.
double bytes_of_cycle(int device, int num_sms) {
  const double transfers = 2e3 * attribute(cudaDevAttrMemoryClockRate, device);
  const double bytes = attribute(cudaDevAttrGlobalMemoryBusWidth, device) / 8.0;
  const double cycles = 1e3 * attribute(cudaDevAttrClockRate, device);
  return cycles > 0.0 && num_sms > 0 ? transfers * bytes / cycles / num_sms : 0.0;
}

DeviceTraits ask_device() {
  DeviceTraits traits;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) {
    cudaGetLastError();
    return traits;
  }
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  traits.num_sms = attribute(cudaDevAttrMultiProcessorCount, device);
  traits.shared_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  traits.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  // Kernels compiled for GPUs before Hopper do not wait for the one before them.
  cudaFuncAttributes probe = {};
  if (cudaFuncGetAttributes(&probe, probe_kernel) != cudaSuccess) cudaGetLastError();
  traits.overlaps = major >= kHopperMajor && probe.ptxVersion >= 10 * kHopperMajor;
  const std::string_view wanted = wanted_level();
  if (wanted == "small") {
    traits.shared_per_sm = kSmallShared;
    traits.shared_per_block = kSmallShared - 1024;
  }
  const bool hopper =
      major == kHopperMajor && (wanted.empty() || wanted == "h100" || wanted == "h200");
  traits.level = hopper ? DeviceLevel::kHopper : DeviceLevel::kGeneric;
  traits.fast_memory =
      hopper && (wanted.empty() ? bytes_of_cycle(device, traits.num_sms) > kFastBytesOfCycle
                                : wanted == "h200");
  return traits;
}

Error no_device(const std::string& found) {
  return Error(ErrorCode::kUnsupported,
               "--device cuda needs an NVIDIA GPU of compute capability 8.0 or later, best of the "
               "Hopper generation (9.0: H100, H200, GH200), and its driver; found " +
                   found + "; use --device cpu, or choose a GPU with CUDA_VISIBLE_DEVICES");
}

}  // namespace

const DeviceTraits& device_traits() {
  static const DeviceTraits traits = ask_device();
  return traits;
}

Result<cudaDeviceProp> find_device() {
  const std::string_view level = wanted_level();
  constexpr std::string_view kLevels[] = {"", "generic", "small", "h100", "h200"};
  if (std::find(std::begin(kLevels), std::end(kLevels), level) == std::end(kLevels)) {
    return Error(ErrorCode::kInvalidArgument,
                 std::string(kLevelVariable) +
                     ": expected generic, small, h100 or h200, or nothing; found " +
                     std::string(level));
  }
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    cudaGetLastError();
    return no_device(std::string("none (") + cudaGetErrorString(error) + ")");
  }
  if (count == 0) return no_device("none");
  int device = 0;
  KVANT_TRY(cuda_status(cudaGetDevice(&device), "asking for the current device"));
  cudaDeviceProp properties = {};
  KVANT_TRY(cuda_status(cudaGetDeviceProperties(&properties, device), "asking about the device"));
  const std::string found = std::string(properties.name) + " of compute capability " +
                            std::to_string(properties.major) + "." +
                            std::to_string(properties.minor);
  if (properties.major < kLeastMajor) return no_device(found);
  cudaFuncAttributes attributes = {};
  if (cudaFuncGetAttributes(&attributes, probe_kernel) != cudaSuccess) {
    cudaGetLastError();
    return Error(
        ErrorCode::kUnsupported,
        "--device cuda: this build has kernels for GPUs " KVANT_CUDA_ARCHITECTURES ", found " +
            found + "; build with KVANT_CUDA_ARCHITECTURES=" + std::to_string(properties.major) +
            std::to_string(properties.minor) + (properties.major == kHopperMajor ? "a" : "") +
            " scripts/build cuda");
  }
  return properties;
}

}  // namespace kvant::backend::cuda
