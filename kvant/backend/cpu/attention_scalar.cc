#define KVANT_LEVEL scalar
#include "kvant/backend/cpu/attention_kernels-inl.h"
