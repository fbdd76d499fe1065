#include "kvant/backend/cuda/decode/variants.h"

#include <algorithm>
#include <array>

namespace kvant::backend::cuda {
namespace {

std::array<std::span<const DecodeVariant>, 9> all_variants() {
  return {nvfp4_variants(), int4_channel_variants(), e4m3_variants(),
          bf16_variants(),  integer_variants(),      mx_variants(),
          any_variants(),   pre_rope_variants(),     any_pre_rope_variants()};
}

}  // namespace

const DecodeVariant* find_variant(const VariantQuery& query) {
  for (const auto& table : all_variants()) {
    for (const DecodeVariant& variant : table) {
      const bool any = variant.key == KeyKernel::kAny;
      if (variant.pre_rope != query.pre_rope || (query.any && !any)) continue;
      if (!any && (variant.key != query.key || variant.value != query.value)) continue;
      if (variant.page_tokens != 0 && variant.page_tokens != query.page_tokens) continue;
      if (query.fast_pages < variant.least_fast_pages) continue;
      if (variant.head_dim == query.head_dim && query.rows <= variant.max_rows) return &variant;
    }
  }
  return nullptr;
}

VariantLimits variant_limits(int head_dim) {
  VariantLimits most;
  for (const auto& table : all_variants()) {
    for (const DecodeVariant& variant : table) {
      if (variant.head_dim != head_dim) continue;
      const int workers = variant.teams * variant.blocks;
      most.workers = std::max(most.workers, workers);
      most.partial_rows =
          std::max(most.partial_rows, (2 * variant.blocks + workers) * variant.max_rows);
    }
  }
  return most;
}

const char* kernel_name(KeyKernel kernel) {
  constexpr const char* kNames[] = {"nvfp4",        "mxfp4", "fp8",  "fp8:token",    "fp8e5m2",
                                    "mxfp8",        "int8",  "int4", "int4:channel", "int3:channel",
                                    "int2:channel", "bf16",  "f16",  "any"};
  return kNames[static_cast<int>(kernel)];
}

const char* kernel_name(ValueKernel kernel) {
  constexpr const char* kNames[] = {"nvfp4", "mxfp4", "fp8",  "fp8:token", "fp8e5m2", "mxfp8",
                                    "int8",  "int4",  "bf16", "f16",       "any"};
  return kNames[static_cast<int>(kernel)];
}

}  // namespace kvant::backend::cuda
