#define KVANT_LEVEL avx2
#include "kvant/backend/cpu/attention_kernels-inl.h"
