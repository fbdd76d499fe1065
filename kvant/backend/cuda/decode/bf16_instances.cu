#include "kvant/backend/cuda/decode/instances.cuh"

namespace kvant::backend::cuda {
namespace {
template <int kHeadDim, int kNTiles, int kTeam, int kTeams, int kBlocks>
using Bf16 =
    DecodeShape<KeyKernel::kBf16, ValueKernel::kBf16, kHeadDim, kNTiles, kTeam, kTeams, kBlocks>;
template <int kHeadDim, int kNTiles, int kTeam, int kTeams, int kBlocks>
using F16 =
    DecodeShape<KeyKernel::kF16, ValueKernel::kF16, kHeadDim, kNTiles, kTeam, kTeams, kBlocks>;
}  // namespace

std::span<const DecodeVariant> bf16_variants() {
  static const DecodeVariant kVariants[] = {
      variant_of<Bf16<128, 1, 2, 8, 1>>(),
      variant_of<Bf16<64, 1, 2, 8, 1>>(),
      variant_of<Bf16<256, 1, 4, 2, 1>>(),
      variant_of<F16<128, 1, 2, 8, 1>>(),
  };
  return kVariants;
}

}  // namespace kvant::backend::cuda
