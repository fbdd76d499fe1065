// Integer products of attention for processors whose 512-bit instructions take two halves (Zen 4).
// They are bound by the two pipes that multiply, which other instructions leave alone here.
#define KVANT_LEVEL avx512
#define KVANT_HALF_RATE_512
#include "kvant/backend/cpu/attention_integer_keys-inl.h"
#include "kvant/backend/cpu/attention_integer_values-inl.h"

namespace kvant::backend::cpu::avx512 {

extern const IntegerKernels kHalfRateIntegerKernels;
const IntegerKernels kHalfRateIntegerKernels = {round_queries, scores, values};

}  // namespace kvant::backend::cpu::avx512
