// Which SIMD level to use. Each level has its own translation units, compiled with the level's
// flags and kept in a namespace of its own (codebases.md section 9, "SIMD").
#pragma once

#include <string_view>

#include "kvant/base/result.h"

namespace kvant {

enum class CpuLevel {
  kScalar = 0,  // baseline x86-64 or any other processor
  kAvx2 = 1,    // AVX2, FMA, F16C
  kAvx512 = 2,  // AVX-512 F, BW, DQ, VL, VBMI, VBMI2, VNNI, BF16 (Zen 4 and later, Sapphire Rapids
                // and later)
  kAmx = 3,  // AVX-512 and AMX TILE, INT8, BF16 (Sapphire Rapids and later, if the system allows)
};
inline constexpr CpuLevel kCpuLevels[] = {CpuLevel::kScalar, CpuLevel::kAvx2, CpuLevel::kAvx512,
                                          CpuLevel::kAmx};

std::string_view cpu_level_name(CpuLevel level);  // "scalar", "avx2", "avx512", "amx"

// Best level of this processor. Asks Linux once for the permission to use AMX's tiles, which holds
// for all threads of the process.
CpuLevel detect_cpu_level();

// How processors of a level differ. A table, not a measurement, because the answers decide bits of
// results (docs/kernels/cpu-attention.md); what is not in the table is taken to be like Sapphire
// Rapids.
struct CpuTraits {
  // Instructions of 512 bits take twice as long as those of 256, vdpbf16ps (which levels from
  // avx512 on have) as long as FMAs.
  bool half_rate_512 = false;
};
const CpuTraits& cpu_traits();

// detect_cpu_level(), or the level named by the environment variable KVANT_CPU_LEVEL (a diagnostic:
// `scalar`, `avx2`, `avx512`, `amx`). kInvalidArgument for an unknown name, kUnsupported for a
// level that the processor lacks.
Result<CpuLevel> choose_cpu_level();

}  // namespace kvant
