#include "kvant/backend/cuda/decode/instances.cuh"

namespace kvant::backend::cuda {
namespace {
template <int kHeadDim, int kNTiles, int kTeam, int kTeams, int kBlocks>
using Mxfp4 =
    DecodeShape<KeyKernel::kMxfp4, ValueKernel::kMxfp4, kHeadDim, kNTiles, kTeam, kTeams, kBlocks>;
template <int kHeadDim, int kNTiles, int kTeam, int kTeams, int kBlocks>
using Mxfp8 =
    DecodeShape<KeyKernel::kMxfp8, ValueKernel::kMxfp8, kHeadDim, kNTiles, kTeam, kTeams, kBlocks>;
// The preset `6bit`.
template <int kHeadDim, int kNTiles, int kTeam, int kTeams, int kBlocks>
using Preset6 =
    DecodeShape<KeyKernel::kE4m3, ValueKernel::kNvfp4, kHeadDim, kNTiles, kTeam, kTeams, kBlocks>;
}  // namespace

std::span<const DecodeVariant> mx_variants() {
  static const DecodeVariant kVariants[] = {
      variant_of<Mxfp4<128, 1, 2, 4, 2>>(),
      variant_of<Mxfp8<128, 1, 2, 8, 1>>(),
      variant_of<Preset6<128, 1, 2, 4, 2>>(),
  };
  return kVariants;
}

}  // namespace kvant::backend::cuda
