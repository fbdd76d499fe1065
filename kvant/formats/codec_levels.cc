#include "kvant/formats/codec_levels.h"

#include "kvant/formats/codec_scalar.h"
#include "kvant/formats/transform.h"

namespace kvant::formats::internal {
namespace {

const LevelKernels* level_kernels(CpuLevel level) {
#if defined(__x86_64__)
  if (level >= CpuLevel::kAvx512) return &avx512_kernels();
  if (level == CpuLevel::kAvx2) return &avx2_kernels();
#else
  (void)level;
#endif
  return nullptr;
}

// Formats that have SIMD versions.
struct Row {
  FormatId id;
  FormatKernels LevelKernels::*kernels;
};
constexpr Row kRows[] = {
    {FormatId::kBf16, &LevelKernels::bf16},
    {FormatId::kF16, &LevelKernels::f16},
    {FormatId::kFp8, &LevelKernels::fp8},
    {FormatId::kFp8Head, &LevelKernels::fp8},
    {FormatId::kFp8Token, &LevelKernels::fp8_token},
    {FormatId::kFp8E5m2, &LevelKernels::fp8e5m2},
    {FormatId::kMxfp8, &LevelKernels::mxfp8},
    {FormatId::kInt8, &LevelKernels::int8},
    {FormatId::kInt4, &LevelKernels::int4},
    {FormatId::kInt4Channel, &LevelKernels::int4_channel},
    {FormatId::kInt3Channel, &LevelKernels::int3_channel},
    {FormatId::kInt2Channel, &LevelKernels::int2_channel},
    {FormatId::kNvfp4, &LevelKernels::nvfp4},
    {FormatId::kMxfp4, &LevelKernels::mxfp4},
};

}  // namespace

const FormatKernels& format_kernels(FormatId id, CpuLevel level) {
  if (const LevelKernels* kernels = level_kernels(level)) {
    for (const Row& row : kRows) {
      if (row.id == id) return kernels->*row.kernels;
    }
  }
  return scalar_kernels(id);
}

const PageKernels& page_kernels(int dim, CpuLevel level) {
  const LevelKernels* kernels = level_kernels(level);
  return kernels != nullptr && dim % 16 == 0 ? kernels->page : scalar_page_kernels();
}

}  // namespace kvant::formats::internal
