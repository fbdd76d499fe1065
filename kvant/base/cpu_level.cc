#include "kvant/base/cpu_level.h"

#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kvant {

std::string_view cpu_level_name(CpuLevel level) {
  switch (level) {
    case CpuLevel::kScalar: return "scalar";
    case CpuLevel::kAvx2: return "avx2";
    case CpuLevel::kAvx512: return "avx512";
    case CpuLevel::kAmx: return "amx";
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

#if defined(__x86_64__)
// Family of an AMD processor: the base, which is 15 from Zen on, and the extension.
unsigned amd_family() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) return 0;
  return (eax >> 8 & 15) + (eax >> 20 & 255);
}
#endif

// Tiles are a part of a thread's state that Linux grants on request only (Linux documentation,
// arch/x86/xstate).
bool may_use_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBf16Bit = 22, kFp16Bit = 23, kTileBit = 24, kInt8Bit = 25;
  constexpr unsigned kNeeded = 1u << kBf16Bit | 1u << kFp16Bit | 1u << kTileBit | 1u << kInt8Bit;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((edx & kNeeded) != kNeeded) return false;
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM, since Linux 5.16
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

CpuLevel ask_processor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vbmi") &&
                      __builtin_cpu_supports("avx512vbmi2") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  if (avx2 && avx512) return may_use_amx() ? CpuLevel::kAmx : CpuLevel::kAvx512;
  if (avx2) return CpuLevel::kAvx2;
#endif
  return CpuLevel::kScalar;
}

CpuTraits ask_for_traits() {
  CpuTraits traits;
#if defined(__x86_64__)
  // Measured, instructions of 512 bits a cycle:   vdpbf16ps   vpdpbusd, FMA   additions
  //   AMD family 19h (Zen 4)                           1             1              2
  //   Intel Sapphire Rapids                            0.45          1.8            2
  __builtin_cpu_init();
  const bool zen4 =
      __builtin_cpu_is("amd") && amd_family() == 0x19 && __builtin_cpu_supports("avx512bf16");
  traits.half_rate_512 = zen4;
#endif
  return traits;
}

}  // namespace

const CpuTraits& cpu_traits() {
  static const CpuTraits traits = ask_for_traits();
  return traits;
}

CpuLevel detect_cpu_level() {
  // Once: under a hypervisor each CPUID instruction is a trap of many microseconds.
  static const CpuLevel level = ask_processor();
  return level;
}

Result<CpuLevel> choose_cpu_level() {
  const CpuLevel best = detect_cpu_level();
  const char* wanted = std::getenv("KVANT_CPU_LEVEL");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (CpuLevel level : kCpuLevels) {
    if (cpu_level_name(level) != wanted) continue;
    if (level > best) {
      return Error(ErrorCode::kUnsupported, std::string("KVANT_CPU_LEVEL=") + wanted +
                                                ": this processor supports at most " +
                                                std::string(cpu_level_name(best)));
    }
    return level;
  }
  return Error(ErrorCode::kInvalidArgument,
               std::string("KVANT_CPU_LEVEL=") + wanted + ": expected scalar, avx2, avx512 or amx");
}

}  // namespace kvant
