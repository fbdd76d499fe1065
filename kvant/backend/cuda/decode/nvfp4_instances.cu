#include "kvant/backend/cuda/decode/instances.cuh"

namespace kvant::backend::cuda {

std::span<const DecodeVariant> nvfp4_variants() {
  using K = KeyKernel;
  using V = ValueKernel;
  static const DecodeVariant kVariants[] = {
      on_fast_memory(row<K::kNvfp4, V::kNvfp4, 128, 1, 1, 4, 2>(), 64),
      on_fast_memory(row<K::kNvfp4, V::kNvfp4, 64, 1, 1, 4, 2>(), 0),
      on_fast_memory(row<K::kNvfp4, V::kNvfp4, 256, 1, 2, 4, 1>(), 96),
      row<K::kNvfp4, V::kNvfp4, 128, 1, 4, 4, 1>(),
      row<K::kNvfp4, V::kNvfp4, 128, 2, 2, 4, 1>(),
      row<K::kNvfp4, V::kNvfp4, 64, 1, 2, 4, 2>(),
      row<K::kNvfp4, V::kNvfp4, 256, 1, 4, 2, 1>(),
      row<K::kNvfp4, V::kE4m3, 128, 1, 4, 4, 1>(),
  };
  return kVariants;
}

}  // namespace kvant::backend::cuda
