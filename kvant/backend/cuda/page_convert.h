// Rewrites closed pages in device memory in another order, exactly: `sm90` and `planar` units, and
// the paged NVFP4 layout that other engines exchange.
//
// Layouts permute bits (layout.h), so nothing is decoded. For pages that move between caches, files
// and engines; not part of a step.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "kvant/base/result.h"
#include "kvant/cache/layout.h"

namespace kvant::backend::cuda {

enum class Section { kKeyCodes, kKeyScales, kKeyMean, kValueCodes, kValueScales };
inline constexpr int kNumSections = 5;

// Where the units of some pages lie: section s of head h of page p starts at
// base + p * page_stride + start[s] + h * head_stride[s]. Bytes, multiples of 4.
struct PageBatch {
  std::byte* base = nullptr;
  int64_t page_stride = 0;
  std::array<int64_t, kNumSections> start{};
  std::array<int64_t, kNumSections> head_stride{};
  cache::Layout layout = cache::Layout::kSm90;  // or kPlanar
  // Planar only: value scales of four tokens are interleaved, byte t / 4 * 4 * blocks + block * 4 +
  // t % 4 (the TensorRT-LLM kernels' order).
  bool value_scales_by_four = false;
  bool padded = true;  // sections are padded to 128 bytes: converting zeroes the padding
};

// kvant's own units: `num_kv_heads` units one after the other at base + p * page_stride.
PageBatch unit_batch(const cache::UnitShape& shape, cache::Layout layout, std::byte* base,
                     int64_t page_stride);

// NVFP4 pages as vLLM and FlashInfer have them: [K codes | K scales | V codes | V scales], each
// [head][token][head_dim / 2 or / 16] (E2M1 pairs, low nibble first; E4M3 scales). Their global
// scale is this project's g times 6 / 448 or its inverse, depending on the engine: the caller's.
PageBatch nvfp4_page_batch(const cache::UnitShape& shape, std::byte* base, int num_kv_heads,
                           bool value_scales_by_four);

// Enqueues the conversion of `num_pages` * `num_kv_heads` units. The two must not overlap.
// kUnsupported for layout `cpu`, kInvalidArgument for a paged NVFP4 side of another format or with
// a mean.
Status convert_pages(const cache::UnitShape& shape, const PageBatch& from, const PageBatch& to,
                     int num_pages, int num_kv_heads, cudaStream_t stream);

}  // namespace kvant::backend::cuda
