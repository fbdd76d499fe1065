#include "kvant/backend/cuda/decode/instances.cuh"

namespace kvant::backend::cuda {

// The preset `4bit`.
std::span<const DecodeVariant> int4_channel_variants() {
  using K = KeyKernel;
  using V = ValueKernel;
  static const DecodeVariant kVariants[] = {
      on_fast_memory(row<K::kInt4Channel, V::kNvfp4, 128, 1, 1, 4, 2>(), 0),
      on_fast_memory(row<K::kInt4Channel, V::kNvfp4, 64, 1, 1, 4, 2>(), 96),
      on_fast_memory(row<K::kInt4Channel, V::kNvfp4, 256, 1, 2, 4, 1>(), 0),
      on_fast_memory(row<K::kInt4Channel, V::kInt4, 128, 1, 1, 4, 2>(), 0),
      row<K::kInt4Channel, V::kNvfp4, 128, 1, 4, 4, 1>(),
      row<K::kInt4Channel, V::kNvfp4, 128, 2, 2, 4, 1>(),
      row<K::kInt4Channel, V::kNvfp4, 64, 1, 2, 4, 2>(),
      row<K::kInt4Channel, V::kNvfp4, 256, 1, 4, 2, 1>(),
      row<K::kInt4Channel, V::kInt4, 128, 1, 4, 4, 1>(),
  };
  return kVariants;
}

}  // namespace kvant::backend::cuda
