// What a launch of the shared-prefix kernel reads, and the table of its instances.
#pragma once

#include <span>

#include "kvant/backend/cuda/decode/kernel_params.h"
#include "kvant/backend/cuda/shared/plan.h"

namespace kvant::backend::cuda {

struct SharedParams {
  const float* q;             // [rows][num_query_heads][head_dim]
  float* partial_sums;        // of decode's merge: [partial row][head_dim]
  float2* partial_states;     // [partial row]: reference exponent (log2), sum of weights
  const SharedStart* starts;  // [block]
  const SharedItem* items;
  const int32_t* queries;       // see plan.h
  const int32_t* partial_rows;  // see plan.h
  const uint32_t* entries;
  const HeadFactors* factors;  // [num_kv_heads]
  PageSlab stored;
  StoredSections sections;
  int32_t group;
  int32_t max_rows;    // rows of a partial result
  float scale_log2;    // of scores, times log2 e
  int32_t num_slots;   // of the ring of pages as stored
  int32_t page_bytes;  // of a slot: a unit
};

struct SharedVariant {
  KeyKernel key;
  ValueKernel value;
  int head_dim;
  int threads;
  int fixed_bytes;     // shared memory besides the ring
  double page_factor;  // what a page costs, `nvfp4` = 1 (measured)
  const void* kernel;
};

inline constexpr int kMaxSharedSlots = 8;

std::span<const SharedVariant> shared_variants();

// Null where there is none for these formats.
const SharedVariant* find_shared_variant(KeyKernel key, ValueKernel value, int head_dim);

}  // namespace kvant::backend::cuda
