# KVANT_CUDA builds kvant/backend/cuda: kernels for Hopper (sm_90a) or, with CMAKE_CUDA_ARCHITECTURES, any list of
# GPUs from sm_80 on. Nothing outside that folder sees CUDA, and without the option nothing here is read.
include_guard()
option(KVANT_CUDA "Build the CUDA backend (needs CUDA 12.8 or later)" OFF)
if(NOT KVANT_CUDA)
  return()
endif()
set(CMAKE_CUDA_ARCHITECTURES 90a CACHE STRING "GPU architectures to compile for")
enable_language(CUDA)
find_package(CUDAToolkit 12.8 REQUIRED)

if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 knows no C++20 for nvcc
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()

# Codecs are bit-exact: one fp32 operation is one rounding (kernels that want fused multiply-adds say so with fmaf).
set(KVANT_CUDA_FLAGS --expt-relaxed-constexpr --fmad=false -lineinfo)
if(KVANT_DEV)
  list(APPEND KVANT_CUDA_FLAGS -Xcompiler=-Wall,-Wextra -Werror=all-warnings)
endif()
