// wgmma m64nNk32 on E4M3, fp32 accumulators. Both operands run along k: 16 bytes of a row of a
// core matrix (8 rows), without swizzle. Accumulators keep about 14 bits while products are added
// (attention_e4m3_kernel.cuh moves them to fp32 after every key tile).
#pragma once

#include "kvant/backend/cuda/hopper.cuh"

namespace kvant::backend::cuda {

// Core matrices that follow along k are `along_k` bytes apart, along rows `along_rows`.
__device__ __forceinline__ uint64_t core_descriptor(uint32_t address, int along_k, int along_rows) {
  return (static_cast<uint64_t>(along_rows >> 4) << 32) |
         (static_cast<uint64_t>(along_k >> 4) << 16) | ((address & 0x3ffff) >> 4);
}

// d = (accumulate ? d : 0) + A B, A [64][32] and B [N][32] in shared memory.
template <int kN>
struct WgmmaSharedE4m3;
// A in registers: bytes k = 4 t + i of row g, then of row g + 8, then both 16 further; t = lane %
// 4, g = lane / 4.
template <int kN>
struct WgmmaRegistersE4m3;

#define KVANT_WGMMA_SHARED_E4M3(n, regs, a, b, c, ...)                                             \
  template <>                                                                                      \
  struct WgmmaSharedE4m3<n> {                                                                      \
    __device__ __forceinline__ static void run(float (&d)[regs], uint64_t desc_a, uint64_t desc_b, \
                                               int accumulate) {                                   \
      asm volatile("{.reg .pred p;\nsetp.ne.b32 p,%" #c                                            \
                   ",0;\nwgmma.mma_async.sync.aligned.m64n" #n                                     \
                   "k32.f32.e4m3.e4m3 {" KVANT_REGS_##regs "},%" #a ",%" #b ",p,1,1;\n}"           \
                   : __VA_ARGS__                                                                   \
                   : "l"(desc_a), "l"(desc_b), "r"(accumulate));                                   \
    }                                                                                              \
  };
#define KVANT_WGMMA_REGISTERS_E4M3(n, regs, a0, a1, a2, a3, b, c, ...)                           \
  template <>                                                                                    \
  struct WgmmaRegistersE4m3<n> {                                                                 \
    __device__ __forceinline__ static void run(float (&d)[regs], const uint32_t* a,              \
                                               uint64_t desc_b, int accumulate) {                \
      asm volatile("{.reg .pred p;\nsetp.ne.b32 p,%" #c                                          \
                   ",0;\nwgmma.mma_async.sync.aligned.m64n" #n                                   \
                   "k32.f32.e4m3.e4m3 {" KVANT_REGS_##regs "},{%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 \
                                                           "},%" #b ",p,1,1;\n}"                 \
                   : __VA_ARGS__                                                                 \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc_b), "r"(accumulate));  \
    }                                                                                            \
  };

KVANT_WGMMA_SHARED_E4M3(64, 32, 32, 33, 34, KVANT_ACC32(d, 0))
KVANT_WGMMA_SHARED_E4M3(128, 64, 64, 65, 66, KVANT_ACC64(d, 0))
#define KVANT_REGS_4 "%0,%1,%2,%3"
KVANT_WGMMA_REGISTERS_E4M3(8, 4, 4, 5, 6, 7, 8, 9, "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]))
KVANT_WGMMA_REGISTERS_E4M3(64, 32, 32, 33, 34, 35, 36, 37, KVANT_ACC32(d, 0))
KVANT_WGMMA_REGISTERS_E4M3(80, 40, 40, 41, 42, 43, 44, 45, KVANT_ACC32(d, 0), KVANT_ACC8(d, 32))
KVANT_WGMMA_REGISTERS_E4M3(96, 48, 48, 49, 50, 51, 52, 53, KVANT_ACC32(d, 0), KVANT_ACC8(d, 32),
                           KVANT_ACC8(d, 40))
KVANT_WGMMA_REGISTERS_E4M3(128, 64, 64, 65, 66, 67, 68, 69, KVANT_ACC64(d, 0))

}  // namespace kvant::backend::cuda
