#include "kvant/backend/cuda/quant/close_kernels.cuh"

#include <algorithm>

#include "kvant/backend/cuda/device.h"
#include "kvant/backend/cuda/quant/close_kernel.cuh"

namespace kvant::backend::cuda::quant {
namespace {

using formats::FormatId;
using formats::SideFormat;

// Blocks on a multiprocessor: enough to keep memory busy, and registers for +46, which has two of
// all scales and sums.
constexpr int kBlocks = 6;
constexpr int kBlocksOfSearch = 4;
constexpr int kBlocksOfAny = 5;

struct Row {
  FormatId k;
  bool mean;  // of keys
  bool k_four_over_six;
  FormatId v;
  bool v_four_over_six;
  CloseKernel kernel;
};

template <template <typename, bool> typename Codec, typename F, bool kValues>
using Of = CloseByTile<Codec<F, true>, kValues>;
template <bool kSearch, bool kValues>
using Nvfp4 = CloseByTile<Nvfp4Codec<kSearch, true, true>, kValues>;
template <bool kValues>
using Fp8 = Of<Float8Codec, formats::Fp8, kValues>;
template <bool kValues>
using Mxfp8 = Of<MicroscalingCodec, formats::Mxfp8, kValues>;
template <bool kValues>
using Mxfp4 = Of<MicroscalingCodec, formats::Mxfp4, kValues>;
template <bool kValues>
using Int8 = CloseByTile<Int8Codec<true>, kValues>;
template <bool kValues>
using Int4 = CloseByTile<Int4Codec<true>, kValues>;
using Fp8LessMean = CloseLessMean<Float8Codec<formats::Fp8, false>>;
using Int8LessMean = CloseLessMean<Int8Codec<false>>;

constexpr Row kRows[] = {
    {FormatId::kNvfp4, false, false, FormatId::kNvfp4, false,
     close_kernel<Nvfp4<false, false>, Nvfp4<false, true>, kBlocks>},
    {FormatId::kNvfp4, false, true, FormatId::kNvfp4, true,
     close_kernel<Nvfp4<true, false>, Nvfp4<true, true>, kBlocksOfSearch>},
    {FormatId::kInt4Channel, false, false, FormatId::kNvfp4, true,
     close_kernel<CloseChannels, Nvfp4<true, true>, kBlocksOfSearch>},
    {FormatId::kInt4Channel, false, false, FormatId::kNvfp4, false,
     close_kernel<CloseChannels, Nvfp4<false, true>, kBlocks>},
    {FormatId::kFp8, false, false, FormatId::kFp8, false,
     close_kernel<Fp8<false>, Fp8<true>, kBlocks>},
    {FormatId::kFp8, true, false, FormatId::kNvfp4, true,
     close_kernel<Fp8LessMean, Nvfp4<true, true>, kBlocksOfSearch>},
    {FormatId::kInt8, false, false, FormatId::kInt8, false,
     close_kernel<Int8<false>, Int8<true>, kBlocks>},
    {FormatId::kInt8, true, false, FormatId::kInt8, false,
     close_kernel<Int8LessMean, Int8<true>, kBlocks>},
    {FormatId::kMxfp8, false, false, FormatId::kMxfp8, false,
     close_kernel<Mxfp8<false>, Mxfp8<true>, kBlocks>},
    {FormatId::kMxfp4, false, false, FormatId::kMxfp4, false,
     close_kernel<Mxfp4<false>, Mxfp4<true>, kBlocks>},
    {FormatId::kInt4, false, false, FormatId::kInt4, false,
     close_kernel<Int4<false>, Int4<true>, kBlocks>},
};
constexpr CloseKernel kAny = close_kernel<CloseAny<false>, CloseAny<true>, kBlocksOfAny>;

// Options that a plan brings, and NVFP4 scales that are no powers of two, are for the kernel for
// any.
bool has_row(const SideFormat& side, bool short_scales) {
  return !side.rotate && !side.smooth && !side.bias &&
         (side.base != FormatId::kNvfp4 || short_scales);
}

// fp8:head is fp8 with a scale of its own for each head.
FormatId kernel_format(const SideFormat& side) {
  return side.base == FormatId::kFp8Head ? FormatId::kFp8 : side.base;
}

}  // namespace

CloseKernel find_close_kernel(const SideFormat& k, const SideFormat& v, bool short_scales) {
  if (!has_row(k, short_scales) || !has_row(v, short_scales)) return kAny;
  for (const Row& row : kRows) {
    if (row.k == kernel_format(k) && row.mean == k.mean && row.k_four_over_six == k.four_over_six &&
        row.v == kernel_format(v) && row.v_four_over_six == v.four_over_six) {
      return row.kernel;
    }
  }
  return kAny;
}

int close_scratch_bytes(int page_tokens, int head_dim, int code_bits) {
  return page_tokens * head_dim * 2 + std::max(general_scratch_bytes(head_dim, code_bits),
                                               column_scratch_bytes(page_tokens, head_dim));
}

Status allow_shared_memory() {
  const int most =
      std::min(close_scratch_bytes(128, 512, 16), device_traits().shared_per_block - 1024);
  const auto allow = [&](CloseKernel kernel) {
    return cuda_status(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
        "raising shared memory of the close kernel");
  };
  for (const Row& row : kRows) KVANT_TRY(allow(row.kernel));
  return allow(kAny);
}

}  // namespace kvant::backend::cuda::quant
