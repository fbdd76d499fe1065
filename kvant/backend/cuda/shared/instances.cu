#include "kvant/backend/cuda/shared/kernel.cuh"

namespace kvant::backend::cuda {
namespace {

template <KeyKernel kKey, ValueKernel kValue, int kHeadDim>
SharedVariant variant_of(double page_factor) {
  using Shape = SharedShape<kKey, kValue, kHeadDim>;
  return {kKey,
          kValue,
          kHeadDim,
          Shape::kThreads,
          Shape::kFixedBytes,
          page_factor,
          reinterpret_cast<const void*>(&shared_kernel<Shape>)};
}

}  // namespace

std::span<const SharedVariant> shared_variants() {
  static const SharedVariant kVariants[] = {
      variant_of<KeyKernel::kNvfp4, ValueKernel::kNvfp4, 128>(1.0),
      variant_of<KeyKernel::kInt4Channel, ValueKernel::kNvfp4, 128>(1.2),
      variant_of<KeyKernel::kE4m3, ValueKernel::kE4m3, 128>(0.9),
      variant_of<KeyKernel::kBf16, ValueKernel::kBf16, 128>(1.6),
      variant_of<KeyKernel::kNvfp4, ValueKernel::kNvfp4, 64>(1.0),
      variant_of<KeyKernel::kInt4Channel, ValueKernel::kNvfp4, 64>(1.2),
      variant_of<KeyKernel::kE4m3, ValueKernel::kE4m3, 64>(0.9),
      variant_of<KeyKernel::kBf16, ValueKernel::kBf16, 64>(1.6),
  };
  return kVariants;
}

const SharedVariant* find_shared_variant(KeyKernel key, ValueKernel value, int head_dim) {
  for (const SharedVariant& variant : shared_variants()) {
    if (variant.key == key && variant.value == value && variant.head_dim == head_dim)
      return &variant;
  }
  return nullptr;
}

}  // namespace kvant::backend::cuda
