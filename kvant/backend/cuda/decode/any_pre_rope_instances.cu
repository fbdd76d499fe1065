#include "kvant/backend/cuda/decode/instances.cuh"

namespace kvant::backend::cuda {

// Keys before RoPE in any pair of formats, with any options.
std::span<const DecodeVariant> any_pre_rope_variants() {
  using K = KeyKernel;
  using V = ValueKernel;
  static const DecodeVariant kVariants[] = {
      row<K::kAny, V::kAny, 64, 1, 4, 2, 1, true>(),
      row<K::kAny, V::kAny, 64, 2, 4, 2, 1, true>(),
      row<K::kAny, V::kAny, 80, 1, 4, 2, 1, true>(),
      row<K::kAny, V::kAny, 80, 2, 4, 2, 1, true>(),
      row<K::kAny, V::kAny, 96, 1, 4, 2, 1, true>(),
      row<K::kAny, V::kAny, 96, 2, 4, 2, 1, true>(),
      row<K::kAny, V::kAny, 128, 1, 4, 2, 1, true>(),
      row<K::kAny, V::kAny, 128, 2, 4, 2, 1, true>(),
      row<K::kAny, V::kAny, 192, 1, 4, 2, 1, true>(),
      row<K::kAny, V::kAny, 192, 2, 4, 2, 1, true>(),
      row<K::kAny, V::kAny, 256, 1, 4, 2, 1, true>(),
      row<K::kAny, V::kAny, 256, 2, 4, 2, 1, true>(),
  };
  return kVariants;
}

}  // namespace kvant::backend::cuda
