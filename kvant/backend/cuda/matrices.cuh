// Rows and 8 x 8 matrices of 16-bit elements in shared memory. Addresses are 32-bit, as in ptx.cuh.
#pragma once

#include <cstdint>

#include "kvant/backend/cuda/ptx.cuh"

namespace kvant::backend::cuda {

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}
__device__ __forceinline__ void store_shared(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0],{%1,%2,%3,%4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
// Four 8 x 8 matrices of 16-bit elements; lane 8 m + r holds the address of row r of matrix m.
template <bool kTranspose>
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&r)[4]) {
#if !KVANT_HAS_SM90
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const uint32_t row = __shfl_sync(~0u, address, 8 * m + lane / 4);
    asm volatile("st.shared.u32 [%0],%1;" ::"r"(row + lane % 4 * 4),
                 "r"(kTranspose ? ptx::movmatrix(r[m]) : r[m])
                 : "memory");
  }
#else
  if constexpr (kTranspose) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0],{%1,%2,%3,%4};" ::"r"(address),
        "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
        : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0],{%1,%2,%3,%4};" ::"r"(address),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
  }
#endif
}
// As store_matrices; element pairs of lane i are those of row i / 4 and columns 2 (i % 4) and the
// next of each matrix, or of its transpose.
template <bool kTranspose>
__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t (&r)[4]) {
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}

}  // namespace kvant::backend::cuda
