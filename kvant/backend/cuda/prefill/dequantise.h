// Writes pages as FP16 or E4M3 tile images (prefill_plan.h) for prefill attention: every format,
// every option.
//
// What a K image holds in FP16 is k - b: the key that the format defines (decoded, mean and bias
// added, rotated back, times smooth, after RoPE) less the sequence's *reference key* b, so that
// offsets common to all keys cost no precision in FP16; softmax does not see q . b. A V image holds
// v times a power of two that brings the sequence's values into FP16's normal range; the output is
// divided by it. Values beyond FP16 become infinite and are reported.
//
// In E4M3 both are scaled like that: the largest of the reference page is in [4, 8), which leaves a
// factor of 56 above it and one of 256 to 512 of normal numbers below. Values beyond that become
// the largest, 448, and are reported. A side that is stored as E4M3 codes with one scale per head
// has no b and that scale: images hold the codes, nothing is rounded. (BF16 pages of such a
// sequence saturate at 448 like the codes they are about to become.)
//
// References: the mean of the first (up to) 16 keys of one page, and the scales of that page's
// keys and values.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kvant/backend/cuda/prefill/prefill_plan.h"
#include "kvant/base/result.h"
#include "kvant/formats/format.h"

namespace kvant::backend::cuda {

// Floats of one (sequence, KV head): b [head_dim], the scale of values, its inverse, the scale of
// keys (1 in FP16), its inverse.
constexpr int reference_floats(int head_dim) {
  return head_dim + 4;
}

inline constexpr int kMaxPrefillKinds = 8;

struct SideKind {
  formats::FormatId format = formats::FormatId::kBf16;
  bool mean = false;
  bool bias = false;
  bool smooth = false;
  bool rotate = false;
  int32_t codes = 0;  // byte offsets in a unit
  int32_t scales = 0;
  int32_t mean_at = 0;
};

struct UnitKind {
  SideKind k;
  SideKind v;
  const std::byte* base = nullptr;  // unit of KV head 0 of slot 0, of this layer
  int64_t page_bytes = 0;           // from one slot to the next
  int64_t unit_bytes = 0;           // from one KV head to the next
};

// All pointers are device memory, per KV head where there is a [head].
struct DequantiseArgs {
  const ImageJob* jobs = nullptr;
  int num_jobs = 0;
  int first_head = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int page_tokens = 0;
  UnitKind kinds[kMaxPrefillKinds];

  const float* k_scale = nullptr;   // [head]: global scales of the plan
  const float* v_scale = nullptr;   // [head]
  const float* k_bias = nullptr;    // [head][head_dim] or null
  const float* v_bias = nullptr;    // [head][head_dim] or null
  const float* k_smooth = nullptr;  // [head][head_dim] or null
  // Keys before RoPE: angle of pair i = position * frequency[i].
  const double* rope_frequency = nullptr;  // [rope_half] or null
  int rope_half = 0;
  float rope_magnitude = 1.0f;

  float* references = nullptr;  // [sequence][head][reference_floats]
  ImageType type = ImageType::kF16;
  std::byte* images = nullptr;       // [head of the pass][image][K, V]
  int64_t head_stride = 0;           // bytes
  uint32_t* out_of_range = nullptr;  // set to 1 if a value did not fit the image
};

// Whether E4M3 images of this side hold the stored codes.
constexpr bool keeps_codes(const SideKind& side) {
  return (side.format == formats::FormatId::kFp8 || side.format == formats::FormatId::kFp8Head) &&
         !side.mean && !side.bias && !side.smooth && !side.rotate;
}

// Frequencies of RopeParams, in float64: [rotary_dim / 2]. `factors` is device memory or null.
Status launch_rope_frequencies(int rotary_dim, float base, float position_scale,
                               const float* factors, double* frequency, cudaStream_t stream);

// jobs: one per sequence.
Status launch_references(const DequantiseArgs& args, cudaStream_t stream);

Status launch_dequantise(const DequantiseArgs& args, int num_processors, cudaStream_t stream);

}  // namespace kvant::backend::cuda
