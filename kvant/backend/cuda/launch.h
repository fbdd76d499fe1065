// Launches of kernels that begin while the kernel before them ends (programmatic dependent launch).
//
// A kernel launched so calls ptx::launch_dependents() early and ptx::wait_prerequisites() in every
// block before it reads what a kernel before it wrote, and before it writes anything. What nothing
// in the stream writes between two copies or memsets (weights, tables) may be read earlier. As
// every kernel waits for the one before it to be complete, all before that are complete too.
// GPUs before Hopper run one kernel after the other.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string_view>
#include <type_traits>

#include "kvant/backend/cuda/device.h"
#include "kvant/backend/cuda/status.h"

namespace kvant::backend::cuda {

struct LaunchShape {
  dim3 grid;
  int threads = 0;
  size_t shared_bytes = 0;  // dynamic
  cudaStream_t stream = nullptr;
  unsigned cluster = 1;  // blocks of a cluster, along x
};

// `arguments` point to the kernel's parameters; `name` is for messages.
inline Status launch_overlapped(std::string_view name, const void* kernel, const LaunchShape& shape,
                                void** arguments) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (device_traits().overlaps) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {shape.cluster, 1, 1};
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = shape.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  const cudaError_t error = cudaLaunchKernelExC(&config, kernel, arguments);
  if (error == cudaSuccess) return {};
  return cuda_status(error, "launching " + std::string(name));
}

template <typename... Parameters>
Status launch_overlapped(std::string_view name, void (*kernel)(Parameters...),
                         const LaunchShape& shape, std::type_identity_t<Parameters>... parameters) {
  void* arguments[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
  return launch_overlapped(name, reinterpret_cast<const void*>(kernel), shape, arguments);
}

}  // namespace kvant::backend::cuda
