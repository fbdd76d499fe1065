// What a decode launch reads: plain data, passed by value.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>

#include "kvant/backend/cuda/decode/plan.h"
#include "kvant/backend/cuda/decode/variant.h"

namespace kvant::backend::cuda {

inline constexpr int kMaxSlots = 6;  // of a team's ring

// One kind of page of one layer: unit = base + slot * page_bytes + kv_head * unit_bytes.
struct PageSlab {
  const std::byte* base;
  int64_t page_bytes;
  int64_t unit_bytes;
};
inline constexpr int kMaxPageKinds = 3;  // BF16, stored, staging (view.h)

// Sections of a stored unit: K half [0, k_bytes), V half [v_start, v_start + v_bytes); scales and
// mean from the start of their half.
struct StoredSections {
  int32_t k_bytes;
  int32_t k_scales;
  int32_t k_mean;  // 0: none
  int32_t v_start;
  int32_t v_bytes;
  int32_t v_scales;
};

struct HeadFactors {
  float key;    // g of the keys
  float value;  // g of the values times value_unit()
};

// Of keys stored before RoPE, for kernels with DecodeShape::kPreRope (pre_rope_keys.cuh).
struct PreRopeParams {
  const float2* pages;  // KeyRotations::Tables
  const uint4* tokens;
  const float* smooth;  // [num_kv_heads][head_dim] or null
  const float* bias;    // likewise
  int32_t octets;       // of 8 pairs that rotate
  int32_t row_bytes;    // of a page's angles; they lie at the end of a slot of keys
  bool rotated;         // +rot
  float rotation_scale;
};

struct DecodeParams {
  const float* q;            // [rows][num_query_heads][head_dim]
  const float* stored_q;     // the same for stored pages, transformed (+smooth, +rot); or q
  const float* q_bias;       // [rows][num_query_heads]: stored_q . bias of the plan; or null
  const float* sink_logits;  // [num_query_heads] or null
  float* out;                // like q
  float* lse;                // [rows][num_query_heads], natural logarithm; or null
  const Segment* segments;
  const WorkerStart* workers;
  const SplitUnit* split_units;
  const uint32_t* entries;
  const HeadFactors* factors;  // [num_kv_heads]
  float* partial_sums;         // [partial][group row][head_dim]: up to max_rows rows
  float2* partial_states;      // [partial][group row]: reference exponent (log2), sum of weights
  float* worker_sums;          // [worker][group row][head_dim]: first segments, for the block
  PageSlab slabs[kMaxPageKinds];
  StoredSections stored;
  KeyKernel key_kernel;      // for kAny
  ValueKernel value_kernel;  // for kAny
  bool stored_by_tile;       // stored pages are BF16 or F16 on both sides
  bool stored_is_f16;
  bool by_position;    // every segment's result stays its own (plan.h)
  bool beside_shared;  // the shared-prefix kernel runs meanwhile: it has waited for those before
  int32_t page_tokens;
  int32_t head_dim;
  int32_t num_query_heads;
  int32_t group;
  int32_t max_rows;
  int32_t window;
  int32_t sink_tokens;
  float scale_log2;  // of scores, times log2 e
  float softcap;     // 0: none
  int32_t teams;     // of a block: those of the kernel, less where shared memory does not take them
  int32_t num_slots;    // of a team's ring
  int32_t spare_slots;  // of these, 0 or 1: what stays empty after the first turn
  int32_t slot_bytes;
  PreRopeParams pre_rope;
};

}  // namespace kvant::backend::cuda
