// The prefill attention kernel: what it is given, and its launch. attention_kernel.cuh is the code.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kvant/backend/cuda/prefill/prefill_plan.h"
#include "kvant/base/result.h"

namespace kvant::backend::cuda {

// All pointers are device memory.
struct PrefillKernelArgs {
  // What there is to do: every tile for every KV head of the pass; item = tile * num_heads + head.
  const QueryTile* tiles = nullptr;
  int32_t* next_item = nullptr;  // zero at launch
  int num_items = 0;
  int num_heads = 0;   // KV heads of this pass
  int first_head = 0;  // the first of them

  const std::byte* images = nullptr;  // [head of the pass][image][K, V]
  int64_t head_stride = 0;            // bytes
  int page_tokens = 0;
  int page_shift = 0;   // log2 page_tokens
  int slice_shift = 0;  // log2 of a slice's tokens

  const float* q = nullptr;  // [row][query head][head_dim]
  float* out = nullptr;      // like q
  float* state = nullptr;    // [row][query head]: log2 of the sum so far, between batches
  float* lse = nullptr;      // [row][query head] or null
  int num_query_heads = 0;
  int num_kv_heads = 0;
  int group = 0;  // query heads per KV head

  const float* references = nullptr;  // [sequence][KV head][reference_floats]; see dequantise.h
  float q_scale = 1.0f;               // of q before rounding to FP16: scores come in log2 units,
                                      // or in units of the cap
  float cap = 0.0f;                   // softcap in log2 units; 0: none
  int window = 0;
  int sink_tokens = 0;
  const float* sink_logits = nullptr;  // [query head] or null
};

// Head dimensions that have a kernel.
constexpr bool has_prefill_kernel(int head_dim) {
  return head_dim == 64 || head_dim == 80 || head_dim == 96 || head_dim == 128 || head_dim == 192 ||
         head_dim == 256;
}

Status launch_prefill_attention(int head_dim, const PrefillKernelArgs& args, int num_processors,
                                cudaStream_t stream);

// One per head dimension, in files of their own: they take long to compile.
template <int kHeadDim>
Status launch_prefill_attention_of(const PrefillKernelArgs& args, int num_processors,
                                   cudaStream_t stream);

}  // namespace kvant::backend::cuda
