#include "kvant/backend/cuda/decode/instances.cuh"

namespace kvant::backend::cuda {

// The preset `4bit`. Scaling the queries takes each warp some time per page: a page per warp is
// fastest.
std::span<const DecodeVariant> int4_channel_variants() {
  using K = KeyKernel;
  using V = ValueKernel;
  static const DecodeVariant kVariants[] = {
      row<K::kInt4Channel, V::kNvfp4, 128, 1, 1, 12, 1>(),
      row<K::kInt4Channel, V::kNvfp4, 128, 2, 1, 8, 1>(),
      row<K::kInt4Channel, V::kNvfp4, 64, 1, 1, 8, 2>(),
      row<K::kInt4Channel, V::kNvfp4, 256, 1, 2, 4, 1>(),
      row<K::kInt4Channel, V::kInt4, 128, 1, 1, 12, 1>(),
  };
  return kVariants;
}

}  // namespace kvant::backend::cuda
