#include "kvant/backend/cuda/decode/instances.cuh"

namespace kvant::backend::cuda {
namespace {
// Any pair of formats: a uniform branch per page instead of a kernel per pair.
template <int kHeadDim, int kNTiles>
using Any = DecodeShape<KeyKernel::kAny, ValueKernel::kAny, kHeadDim, kNTiles, 4, 2>;
}  // namespace

std::span<const DecodeVariant> any_variants() {
  static const DecodeVariant kVariants[] = {
      variant_of<Any<64, 1>>(),  variant_of<Any<64, 2>>(),  variant_of<Any<80, 1>>(),
      variant_of<Any<80, 2>>(),  variant_of<Any<96, 1>>(),  variant_of<Any<96, 2>>(),
      variant_of<Any<128, 1>>(), variant_of<Any<128, 2>>(), variant_of<Any<192, 1>>(),
      variant_of<Any<192, 2>>(), variant_of<Any<256, 1>>(), variant_of<Any<256, 2>>(),
  };
  return kVariants;
}

}  // namespace kvant::backend::cuda
