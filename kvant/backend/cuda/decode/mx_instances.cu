#include "kvant/backend/cuda/decode/instances.cuh"

namespace kvant::backend::cuda {

// MX formats, and the preset `6bit`.
std::span<const DecodeVariant> mx_variants() {
  using K = KeyKernel;
  using V = ValueKernel;
  static const DecodeVariant kVariants[] = {
      on_fast_memory(row<K::kMxfp4, V::kMxfp4, 128, 1, 1, 4, 2>(), 64),
      on_fast_memory(row<K::kE4m3, V::kNvfp4, 128, 1, 1, 4, 2>(), 128),
      row<K::kMxfp4, V::kMxfp4, 128, 1, 4, 4, 1>(),
      row<K::kMxfp8, V::kMxfp8, 128, 1, 4, 4, 1>(),
      row<K::kE4m3, V::kNvfp4, 128, 1, 4, 4, 1>(),
  };
  return kVariants;
}

}  // namespace kvant::backend::cuda
