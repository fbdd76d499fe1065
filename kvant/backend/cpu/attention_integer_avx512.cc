// Integer products of attention with AVX-512 VNNI and VBMI. See attention_integer.h for the
// rounding and docs/kernels/cpu-attention.md for the counts behind the order of the loops.
#define KVANT_LEVEL avx512
#include "kvant/backend/cpu/attention_integer_keys-inl.h"
#include "kvant/backend/cpu/attention_integer_values-inl.h"

namespace kvant::backend::cpu::avx512 {

extern const IntegerKernels kIntegerKernels;
const IntegerKernels kIntegerKernels = {round_queries, scores, values};

}  // namespace kvant::backend::cpu::avx512
