#define KVANT_LEVEL avx512
#include "kvant/backend/cpu/attention_kernels-inl.h"
