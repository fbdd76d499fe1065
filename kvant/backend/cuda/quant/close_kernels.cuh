// Which kernels close pages: one for each pair of formats that people use, and one for any.
#pragma once

#include "kvant/backend/cuda/quant/close_args.cuh"
#include "kvant/backend/cuda/status.h"

namespace kvant::backend::cuda::quant {

// A kernel takes CloseArgs: a block of kCloseThreads threads a page, KV head and side, keys first,
// with close_scratch_bytes() of dynamic shared memory.
using CloseKernel = void (*)(CloseArgs);

// Of these formats; `short_scales`: all global scales are powers of two.
CloseKernel find_close_kernel(const formats::SideFormat& k, const formats::SideFormat& v,
                              bool short_scales);

int close_scratch_bytes(int page_tokens, int head_dim, int code_bits);

// Allows the kernels as much shared memory as pages may need; once for a device.
Status allow_shared_memory();

}  // namespace kvant::backend::cuda::quant
