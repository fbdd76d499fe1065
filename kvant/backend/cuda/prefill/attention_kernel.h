// The prefill attention kernel: what it is given, and its launch. attention_kernel.cuh is the code.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include "kvant/backend/cuda/prefill/dequantise.h"
#include "kvant/backend/cuda/prefill/prefill_plan.h"
#include "kvant/base/result.h"

namespace kvant::backend::cuda {

// The next item, the next unit of images, and how many warps have no more to take.
enum PrefillCounter { kNextItem = 0, kNextUnit = 1, kFinished = 2, kCounters = 3 };

// All pointers are device memory.
struct PrefillKernelArgs {
  // What there is to do, in order of starting.
  const WorkItem* items = nullptr;
  const QueryTile* tiles = nullptr;
  int32_t* counters = nullptr;  // [kCounters], zero before and after a launch
  int num_items = 0;
  int first_head = 0;  // first KV head of this pass

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
  // 65536 / group, rounded up: row * group_inverse >> 16 is row / group of a tile's rows.
  uint32_t group_inverse = 65536;
};

// Images that are written beside attention, by idle warps: attention waits for each. Formats
// without rotation and RoPE.
struct BackgroundImages {
  DequantiseArgs dequantise;
  const ImageChunk* chunks = nullptr;  // in order of use
  int num_chunks = 0;
  int num_units = 0;         // sides of pages of KV heads
  int32_t* ready = nullptr;  // [head of the pass][image][K, V]: `epoch` once written
  int32_t epoch = 0;
  int64_t images_per_head = 0;
};

// Head dimensions that have kernels, on images of either type.
constexpr bool has_prefill_kernel(int head_dim) {
  return head_dim == 64 || head_dim == 80 || head_dim == 96 || head_dim == 128 || head_dim == 192 ||
         head_dim == 256;
}

// f(std::integral_constant<int, head_dim>()) of one that has.
template <typename F>
Status for_head_dim(int head_dim, F&& f) {
  switch (head_dim) {
    case 64: return f(std::integral_constant<int, 64>());
    case 80: return f(std::integral_constant<int, 80>());
    case 96: return f(std::integral_constant<int, 96>());
    case 128: return f(std::integral_constant<int, 128>());
    case 192: return f(std::integral_constant<int, 192>());
    case 256: return f(std::integral_constant<int, 256>());
    default:
      return Error(ErrorCode::kUnsupported,
                   "prefill attention: head_dim " + std::to_string(head_dim));
  }
}

// Pairs of stored formats that have a kernel which writes images beside attention.
constexpr bool has_background_images(int head_dim, formats::FormatId k, formats::FormatId v) {
  using formats::FormatId;
  return head_dim == 128 && ((k == FormatId::kNvfp4 && v == FormatId::kNvfp4) ||
                             (k == FormatId::kInt4Channel && v == FormatId::kNvfp4) ||
                             (k == FormatId::kInt8 && v == FormatId::kInt8) ||
                             (k == FormatId::kBf16 && v == FormatId::kBf16));
}

// On Hopper. `images`: null if they have been written before.
Status launch_prefill_attention(int head_dim, const PrefillKernelArgs& args,
                                const BackgroundImages* images, int num_processors,
                                cudaStream_t stream);

// The same without wgmma, on images that have been written before.
Status launch_prefill_attention_generic(int head_dim, const PrefillKernelArgs& args,
                                        int num_processors, cudaStream_t stream);

// On E4M3 images, which have been written before.
Status launch_prefill_attention_e4m3(int head_dim, const PrefillKernelArgs& args,
                                     int num_processors, cudaStream_t stream);

// One per head dimension, in files of their own: they take long to compile.
template <int kHeadDim>
Status launch_prefill_attention_of(const PrefillKernelArgs& args, int num_processors,
                                   cudaStream_t stream);
template <int kHeadDim>
Status launch_prefill_attention_e4m3_of(const PrefillKernelArgs& args, int num_processors,
                                        cudaStream_t stream);
Status launch_prefill_attention_with_images(const PrefillKernelArgs& args,
                                            const BackgroundImages& images, int num_processors,
                                            cudaStream_t stream);

}  // namespace kvant::backend::cuda
