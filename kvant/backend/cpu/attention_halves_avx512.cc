// The attention kernels for processors whose 512-bit instructions take two halves (Zen 4,
// CpuTraits::half_rate_512).
#define KVANT_LEVEL avx512
#define KVANT_HALF_RATE_512
#include "kvant/backend/cpu/attention_kernels-inl.h"
