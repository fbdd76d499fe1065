#include "kvant/backend/cuda/decode/instances.cuh"

namespace kvant::backend::cuda {
namespace {
template <int kHeadDim, int kNTiles, int kTeam, int kTeams, int kBlocks>
using E4m3 =
    DecodeShape<KeyKernel::kE4m3, ValueKernel::kE4m3, kHeadDim, kNTiles, kTeam, kTeams, kBlocks>;
}  // namespace

std::span<const DecodeVariant> e4m3_variants() {
  static const DecodeVariant kVariants[] = {
      variant_of<E4m3<128, 1, 4, 4, 1>>(),
      variant_of<E4m3<128, 2, 2, 4, 1>>(),
      variant_of<E4m3<64, 1, 2, 8, 1>>(),
      variant_of<E4m3<256, 1, 4, 2, 1>>(),
  };
  return kVariants;
}

}  // namespace kvant::backend::cuda
