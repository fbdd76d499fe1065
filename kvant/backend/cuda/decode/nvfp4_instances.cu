#include "kvant/backend/cuda/decode/instances.cuh"

namespace kvant::backend::cuda {
namespace {
template <int kHeadDim, int kNTiles, int kTeam, int kTeams, int kBlocks>
using Nvfp4 =
    DecodeShape<KeyKernel::kNvfp4, ValueKernel::kNvfp4, kHeadDim, kNTiles, kTeam, kTeams, kBlocks>;
}  // namespace

std::span<const DecodeVariant> nvfp4_variants() {
  static const DecodeVariant kVariants[] = {
      variant_of<Nvfp4<128, 1, 2, 4, 2>>(),
      variant_of<Nvfp4<128, 2, 1, 8, 1>>(),
      variant_of<Nvfp4<64, 1, 1, 8, 2>>(),
      variant_of<Nvfp4<256, 1, 2, 4, 1>>(),
  };
  return kVariants;
}

}  // namespace kvant::backend::cuda
