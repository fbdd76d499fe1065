#include "kvant/base/cpu_level.h"

#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace kvant {

std::string_view cpu_level_name(CpuLevel level) {
  switch (level) {
    case CpuLevel::kScalar: return "scalar";
    case CpuLevel::kAvx2: return "avx2";
    case CpuLevel::kAvx512: return "avx512";
  }
  return "scalar";
}

namespace {

#if defined(__x86_64__)
// clang 14 does not know "f16c" as a name for __builtin_cpu_supports.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

CpuLevel ask_processor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vbmi") &&
                      __builtin_cpu_supports("avx512vbmi2") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  if (avx2 && avx512) return CpuLevel::kAvx512;
  if (avx2) return CpuLevel::kAvx2;
#endif
  return CpuLevel::kScalar;
}

}  // namespace

CpuLevel detect_cpu_level() {
  // Once: under a hypervisor each CPUID instruction is a trap of many microseconds.
  static const CpuLevel level = ask_processor();
  return level;
}

Result<CpuLevel> choose_cpu_level() {
  const CpuLevel best = detect_cpu_level();
  const char* wanted = std::getenv("KVANT_CPU_LEVEL");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (CpuLevel level : {CpuLevel::kScalar, CpuLevel::kAvx2, CpuLevel::kAvx512}) {
    if (cpu_level_name(level) != wanted) continue;
    if (level > best) {
      return Error(ErrorCode::kUnsupported, std::string("KVANT_CPU_LEVEL=") + wanted +
                                                ": this processor supports at most " +
                                                std::string(cpu_level_name(best)));
    }
    return level;
  }
  return Error(ErrorCode::kInvalidArgument,
               std::string("KVANT_CPU_LEVEL=") + wanted + ": expected scalar, avx2 or avx512");
}

}  // namespace kvant
