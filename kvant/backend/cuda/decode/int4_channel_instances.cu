#include "kvant/backend/cuda/decode/instances.cuh"

namespace kvant::backend::cuda {
namespace {
// The preset `4bit`. Scaling the queries takes each warp some time per page: a page per warp is
// fastest.
template <int kHeadDim, int kNTiles, int kTeam, int kTeams, int kBlocks>
using Preset = DecodeShape<KeyKernel::kInt4Channel, ValueKernel::kNvfp4, kHeadDim, kNTiles, kTeam,
                           kTeams, kBlocks>;
}  // namespace

std::span<const DecodeVariant> int4_channel_variants() {
  static const DecodeVariant kVariants[] = {
      variant_of<Preset<128, 1, 1, 12, 1>>(),
      variant_of<Preset<128, 2, 1, 8, 1>>(),
      variant_of<Preset<64, 1, 1, 8, 2>>(),
      variant_of<Preset<256, 1, 2, 4, 1>>(),
  };
  return kVariants;
}

}  // namespace kvant::backend::cuda
