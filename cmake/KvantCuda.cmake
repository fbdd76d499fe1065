# KVANT_CUDA builds kvant/backend/cuda: kernels for Hopper (sm_90a). Nothing outside that folder sees CUDA, and
# without the option nothing here is read.
include_guard()
option(KVANT_CUDA "Build the CUDA backend (needs CUDA 12.8 or later)" OFF)
if(NOT KVANT_CUDA)
  return()
endif()
set(CMAKE_CUDA_ARCHITECTURES 90a CACHE STRING "GPU architectures to compile for")
enable_language(CUDA)
find_package(CUDAToolkit 12.8 REQUIRED)

# CMake 3.25 knows no C++20 for nvcc, so the flag is given by hand. Codecs are bit-exact: one fp32 operation is one
# rounding (kernels that want fused multiply-adds say so with fmaf).
set(KVANT_CUDA_FLAGS -std=c++20 --expt-relaxed-constexpr --fmad=false -lineinfo --threads=2)
if(KVANT_DEV)
  list(APPEND KVANT_CUDA_FLAGS -Xcompiler=-Wall,-Wextra -Werror=all-warnings)
endif()
