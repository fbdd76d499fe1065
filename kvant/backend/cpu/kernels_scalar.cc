#include <cstdint>
#include <cstring>
#include <utility>

#include "kvant/backend/cpu/kernels.h"
#include "kvant/backend/cpu/simd_scalar.h"

namespace kvant::backend::cpu::scalar {
namespace {
#include "kvant/backend/cpu/vector_kernels-inl.h"
// After the above:
#include "kvant/backend/cpu/product_kernels-inl.h"
}  // namespace

constinit const Kernels kKernels = make_kernels();

}  // namespace kvant::backend::cpu::scalar
