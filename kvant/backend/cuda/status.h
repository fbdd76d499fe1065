// Results of CUDA calls as Status. Every call and every launch of this folder goes through here.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <string_view>

#include "kvant/base/result.h"

namespace kvant::backend::cuda {

// `what` says what was being done, e.g. "copying page tables". Out of memory is kResourceExhausted;
// everything else kDeviceError, and the
// device is unusable afterwards.
inline Status cuda_status(cudaError_t error, std::string_view what) {
  if (error == cudaSuccess) return {};
  return Error(
      error == cudaErrorMemoryAllocation ? ErrorCode::kResourceExhausted : ErrorCode::kDeviceError,
      "CUDA, " + std::string(what) + ": " + cudaGetErrorString(error));
}

// After a launch: what was wrong with it. `kernel` names the kernel and its variant.
inline Status launch_status(std::string_view kernel) {
  return cuda_status(cudaGetLastError(), "launching " + std::string(kernel));
}

}  // namespace kvant::backend::cuda
