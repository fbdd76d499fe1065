#include "kvant/backend/cuda/decode/instances.cuh"

namespace kvant::backend::cuda {
namespace {
template <int kHeadDim, int kNTiles, int kTeam, int kTeams, int kBlocks>
using Bf16 =
    DecodeShape<KeyKernel::kBf16, ValueKernel::kBf16, kHeadDim, kNTiles, kTeam, kTeams, kBlocks>;
}  // namespace

std::span<const DecodeVariant> bf16_variants() {
  static const DecodeVariant kVariants[] = {
      variant_of<Bf16<128, 1, 2, 8, 1>>(),
  };
  return kVariants;
}

}  // namespace kvant::backend::cuda
