#include "kvant/backend/cuda/decode/variants.h"

namespace kvant::backend::cuda {

const DecodeVariant* find_variant(const VariantQuery& query) {
  for (const auto& table : {nvfp4_variants(), int4_channel_variants(), e4m3_variants(),
                            bf16_variants(), integer_variants(), mx_variants(), any_variants()}) {
    for (const DecodeVariant& variant : table) {
      const bool any = variant.key == KeyKernel::kAny;
      if (!any && (variant.key != query.key || variant.value != query.value)) continue;
      if (variant.page_tokens != 0 && variant.page_tokens != query.page_tokens) continue;
      if (variant.head_dim == query.head_dim && query.rows <= variant.max_rows) return &variant;
    }
  }
  return nullptr;
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
