#include "kvant/backend/cuda/decode/instances.cuh"

namespace kvant::backend::cuda {

std::span<const DecodeVariant> bf16_variants() {
  using K = KeyKernel;
  using V = ValueKernel;
  static const DecodeVariant kVariants[] = {
      row<K::kBf16, V::kBf16, 128, 1, 4, 4, 1>(),
      row<K::kBf16, V::kBf16, 64, 1, 2, 4, 2>(),
      row<K::kBf16, V::kBf16, 256, 1, 4, 2, 1>(),
      row<K::kF16, V::kF16, 128, 1, 4, 4, 1>(),
  };
  return kVariants;
}

}  // namespace kvant::backend::cuda
