#include "kvant/backend/cuda/decode/instances.cuh"

namespace kvant::backend::cuda {
namespace {
// int8 and the preset `8bit`; int4; the preset `3bit`.
template <int kHeadDim, int kNTiles, int kTeam, int kTeams, int kBlocks>
using Int8 =
    DecodeShape<KeyKernel::kInt8, ValueKernel::kInt8, kHeadDim, kNTiles, kTeam, kTeams, kBlocks>;
template <int kHeadDim, int kNTiles, int kTeam, int kTeams, int kBlocks>
using Int4 =
    DecodeShape<KeyKernel::kInt4, ValueKernel::kInt4, kHeadDim, kNTiles, kTeam, kTeams, kBlocks>;
template <int kHeadDim, int kNTiles, int kTeam, int kTeams, int kBlocks>
using Preset3 = DecodeShape<KeyKernel::kInt3Channel, ValueKernel::kInt4, kHeadDim, kNTiles, kTeam,
                            kTeams, kBlocks>;
}  // namespace

std::span<const DecodeVariant> integer_variants() {
  static const DecodeVariant kVariants[] = {
      variant_of<Int8<128, 1, 2, 8, 1>>(),
      variant_of<Int4<128, 1, 1, 12, 1>>(),
      variant_of<Preset3<128, 1, 1, 12, 1>>(),
  };
  return kVariants;
}

}  // namespace kvant::backend::cuda
