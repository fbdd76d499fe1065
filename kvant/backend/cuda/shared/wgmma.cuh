// Products of the shared-prefix kernel: wgmma.m64nNk16 with A (64 rows) in registers, fp32 sums,
// operands FP16 or BF16.
#pragma once

#include "kvant/backend/cuda/hopper.cuh"

namespace kvant::backend::cuda {

// s = (accumulate ? s : 0) + A B^T: B [64][16] in shared memory, k contiguous.
template <bool kBf16>
__device__ __forceinline__ void wgmma_rows(float (&s)[32], const uint32_t (&a)[4], uint64_t desc_b,
                                           int accumulate);
// s += A B^T with both in shared memory, BF16.
__device__ __forceinline__ void wgmma_shared_bf16(float (&s)[32], uint64_t desc_a,
                                                  uint64_t desc_b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" KVANT_REGS_32
               "},%32,%33,1,1,1,0,0;\n"
               : KVANT_ACC32(s, 0)
               : "l"(desc_a), "l"(desc_b));
}
// o += A B: B [16][channels] in shared memory, channels contiguous.
template <bool kBf16>
__device__ __forceinline__ void wgmma_columns(float (&o)[32], const uint32_t* a, uint64_t desc_b);
template <bool kBf16>
__device__ __forceinline__ void wgmma_columns(float (&o)[64], const uint32_t* a, uint64_t desc_b);

#define KVANT_SHARED_WGMMA(kBf16, types)                                                          \
  template <>                                                                                     \
  __device__ __forceinline__ void wgmma_rows<kBf16>(float(&s)[32], const uint32_t(&a)[4],         \
                                                    uint64_t desc_b, int accumulate) {            \
    asm volatile(                                                                                 \
        "{.reg .pred p;\nsetp.ne.b32 p,%37,0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." types \
        " {" KVANT_REGS_32 "},{%32,%33,%34,%35},%36,p,1,1,0;\n}"                                  \
        : KVANT_ACC32(s, 0)                                                                       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc_b), "r"(accumulate));              \
  }                                                                                               \
  template <>                                                                                     \
  __device__ __forceinline__ void wgmma_columns<kBf16>(float(&o)[32], const uint32_t* a,          \
                                                       uint64_t desc_b) {                         \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." types " {" KVANT_REGS_32           \
                 "},{%32,%33,%34,%35},%36,1,1,1,1;\n"                                             \
                 : KVANT_ACC32(o, 0)                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc_b));                      \
  }                                                                                               \
  template <>                                                                                     \
  __device__ __forceinline__ void wgmma_columns<kBf16>(float(&o)[64], const uint32_t* a,          \
                                                       uint64_t desc_b) {                         \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." types " {" KVANT_REGS_64          \
                 "},{%64,%65,%66,%67},%68,1,1,1,1;\n"                                             \
                 : KVANT_ACC64(o, 0)                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc_b));                      \
  }

KVANT_SHARED_WGMMA(false, "f16.f16")
KVANT_SHARED_WGMMA(true, "bf16.bf16")

}  // namespace kvant::backend::cuda
