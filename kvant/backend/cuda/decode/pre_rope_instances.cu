#include "kvant/backend/cuda/decode/instances.cuh"

namespace kvant::backend::cuda {

// Keys before RoPE in formats that people use. Small teams, for rotating the queries takes each
// warp some time per page, and few warps with many registers: they hold fragments of keys, angles
// and rotated queries at once.
std::span<const DecodeVariant> pre_rope_variants() {
  using K = KeyKernel;
  using V = ValueKernel;
  static const DecodeVariant kVariants[] = {
      row<K::kNvfp4, V::kNvfp4, 128, 1, 2, 4, 1, true>(),
      row<K::kNvfp4, V::kNvfp4, 128, 2, 2, 4, 1, true>(),
      row<K::kNvfp4, V::kNvfp4, 64, 1, 2, 4, 2, true>(),
      row<K::kNvfp4, V::kNvfp4, 256, 1, 2, 4, 1, true>(),
      row<K::kInt4Channel, V::kNvfp4, 128, 1, 2, 4, 1, true>(),
      row<K::kInt4Channel, V::kNvfp4, 128, 2, 2, 4, 1, true>(),
      row<K::kInt4Channel, V::kNvfp4, 64, 1, 2, 4, 2, true>(),
      row<K::kInt4Channel, V::kNvfp4, 256, 1, 2, 4, 1, true>(),
      row<K::kInt4Channel, V::kInt4, 128, 1, 2, 4, 1, true>(),
      row<K::kInt3Channel, V::kInt4, 128, 1, 2, 4, 1, true>(),
      row<K::kE4m3, V::kE4m3, 128, 1, 2, 4, 1, true>(),
      row<K::kInt8, V::kInt8, 128, 1, 2, 4, 1, true>(),
  };
  return kVariants;
}

}  // namespace kvant::backend::cuda
