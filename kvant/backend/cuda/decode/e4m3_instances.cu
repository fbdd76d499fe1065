#include "kvant/backend/cuda/decode/instances.cuh"

namespace kvant::backend::cuda {

std::span<const DecodeVariant> e4m3_variants() {
  using K = KeyKernel;
  using V = ValueKernel;
  static const DecodeVariant kVariants[] = {
      row<K::kE4m3, V::kE4m3, 128, 1, 4, 4, 1>(),
      row<K::kE4m3, V::kE4m3, 128, 2, 4, 2, 1>(),
      row<K::kE4m3, V::kE4m3, 64, 1, 2, 4, 2>(),
      row<K::kE4m3, V::kE4m3, 256, 1, 4, 2, 1>(),
  };
  return kVariants;
}

}  // namespace kvant::backend::cuda
