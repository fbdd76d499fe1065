#include "kvant/backend/cuda/decode/instances.cuh"

namespace kvant::backend::cuda {

// `int8` and the preset `8bit`, `int4`, and the preset `3bit`.
std::span<const DecodeVariant> integer_variants() {
  using K = KeyKernel;
  using V = ValueKernel;
  static const DecodeVariant kVariants[] = {
      on_fast_memory(row<K::kInt4, V::kInt4, 128, 1, 1, 4, 2>(), 0),
      on_fast_memory(row<K::kInt3Channel, V::kInt4, 128, 1, 1, 4, 2>(), 0),
      row<K::kInt8, V::kInt8, 128, 1, 4, 4, 1>(),
      row<K::kInt4, V::kInt4, 128, 1, 4, 4, 1>(),
      row<K::kInt3Channel, V::kInt4, 128, 1, 4, 4, 1>(),
  };
  return kVariants;
}

}  // namespace kvant::backend::cuda
