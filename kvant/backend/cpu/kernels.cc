#include "kvant/backend/cpu/kernels.h"

#include "kvant/backend/cpu/wide_kernels.h"
#include "kvant/base/cpu_level.h"

namespace kvant::backend::cpu {

const Kernels& kernels(CpuLevel level) {
#if defined(__x86_64__)
  switch (level) {
    case CpuLevel::kScalar: break;
    case CpuLevel::kAvx2: return avx2::kKernels;
    case CpuLevel::kAvx512:
    case CpuLevel::kAmx: return avx512::kKernels;
  }
#else
  (void)level;
#endif
  return scalar::kKernels;
}

const WideKernels* wide_kernels(CpuLevel level) {
#if defined(__x86_64__)
  if (level == CpuLevel::kAmx) return &amx::kWideKernels;
#else
  (void)level;
#endif
  return nullptr;
}

}  // namespace kvant::backend::cpu
