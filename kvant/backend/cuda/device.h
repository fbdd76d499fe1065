// What kernels and launches are chosen by, of the device that the process uses.
#pragma once

#include <cuda_runtime_api.h>

#include "kvant/base/result.h"

namespace kvant::backend::cuda {

// Kernels that need more than every GPU has.
//   generic  tensor cores by mma.sync: compute capability 8.0 and later
//   hopper   wgmma as well: 9.0
enum class DeviceLevel { kGeneric, kHopper };

struct DeviceTraits {
  DeviceLevel level = DeviceLevel::kGeneric;
  int num_sms = 0;
  int shared_per_sm = 0;     // bytes of shared memory of a multiprocessor
  int shared_per_block = 0;  // the most of a block
  bool overlaps = false;     // kernels may begin while the one before them ends (launch.h)
  // Hopper whose memory gives a multiprocessor more than 16 bytes a cycle (H200, not H100), so that
  // few instructions count more than few bytes on their way (docs/kernels/cuda-decode.md).
  bool fast_memory = false;
};

// Of the current device, asked for once; all zero without one. For diagnosis KVANT_CUDA_LEVEL
// overrides the level: generic, or small, which is generic in the 99 KiB of shared memory that GPUs
// of compute capability 8.6, 8.9 and 12.0 have; on Hopper h100 and h200 override fast_memory.
const DeviceTraits& device_traits();

// The current device; kUnsupported unless this build's kernels run on it, with what was found.
Result<cudaDeviceProp> find_device();

}  // namespace kvant::backend::cuda
