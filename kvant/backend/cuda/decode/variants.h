// The table of compiled decode kernels, and how one is chosen.
#pragma once

#include <span>

#include "kvant/backend/cuda/decode/variant.h"

namespace kvant::backend::cuda {

// VariantQuery::fast_pages where memory is not fast (device.h), DecodeVariant::least_fast_pages of
// kernels that do not ask for it.
inline constexpr int kNotFast = -1;

struct DecodeVariant {
  KeyKernel key;
  ValueKernel value;
  bool pre_rope;  // keys are stored before RoPE
  int head_dim;
  int max_rows;           // query rows of a tile: 8 or 16
  int page_tokens;        // 0: any
  int teams;              // of a block: workers
  int blocks;             // on a multiprocessor
  bool slots_take_steps;  // keys and values of a page, not one of them (ring.cuh)
  int team_bytes;         // dynamic shared memory of a team besides its ring
  int fixed_bytes;        // static shared memory of a block
  const void* kernel;
  int least_fast_pages = kNotFast;  // pages for each multiprocessor, where memory is fast
};

// One per source file of instances; find_variant searches them in this order.
std::span<const DecodeVariant> nvfp4_variants();
std::span<const DecodeVariant> int4_channel_variants();
std::span<const DecodeVariant> e4m3_variants();
std::span<const DecodeVariant> bf16_variants();
std::span<const DecodeVariant> integer_variants();
std::span<const DecodeVariant> mx_variants();
std::span<const DecodeVariant> any_variants();
std::span<const DecodeVariant> pre_rope_variants();
std::span<const DecodeVariant> any_pre_rope_variants();

struct VariantQuery {
  KeyKernel key;
  ValueKernel value;
  int head_dim = 0;
  int page_tokens = 0;
  int rows = 1;  // query rows of a tile, at most 16
  bool pre_rope = false;
  bool any = false;               // only the one that decides at run time will do
  int64_t fast_pages = kNotFast;  // that the step has for each multiprocessor
};

// The first kernel for these formats, or the one that decides at run time; null for a head_dim that
// no kernel has.
const DecodeVariant* find_variant(const VariantQuery& query);

// The most of any kernel for this head_dim, on one multiprocessor.
struct VariantLimits {
  int workers = 0;
  int partial_rows = 0;  // query rows of two results of each block and one of each worker
};
VariantLimits variant_limits(int head_dim);

// Names for messages, e.g. "decode nvfp4/nvfp4 128x8".
const char* kernel_name(KeyKernel kernel);
const char* kernel_name(ValueKernel kernel);

}  // namespace kvant::backend::cuda
