// Hopper's instructions that prefill attention, shared prefixes and products use: bulk copies and
// wgmma on FP16.
//
// PTX ISA 8.0 and later, target sm_90a. Addresses of shared memory are 32-bit, as in ptx.cuh.
#pragma once

#include <cstdint>

#include "kvant/backend/cuda/matrices.cuh"

namespace kvant::backend::cuda {

// ---- copies ----

// Global to shared, 16-byte aligned; counts on `barrier`.
__device__ __forceinline__ void bulk_copy(uint32_t target, const void* source, int bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(
          target),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}
// Global memory to L2, 16-byte aligned; nobody waits for it.
__device__ __forceinline__ void prefetch_l2(const void* source, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0],%1;" ::"l"(source), "r"(bytes) : "memory");
}
// Makes ordinary writes to shared memory visible to wgmma and bulk copies.
__device__ __forceinline__ void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- wgmma: m64nNk16, FP16 operands, fp32 accumulators ----

// 128-byte swizzle. `stride` is the distance of groups of 8 rows, `leading` that of 64-element
// parts (operands whose rows run along k only).
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, int leading, int stride) {
  return (uint64_t{1} << 62) | (static_cast<uint64_t>(stride >> 4) << 32) |
         (static_cast<uint64_t>(leading >> 4) << 16) | ((address & 0x3ffff) >> 4);
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of accumulators before a wait.
template <int n>
__device__ __forceinline__ void hold(float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d = (accumulate ? d : 0) + A B with A [64][16] and B [N][16] in shared memory, k contiguous.
template <int kN>
struct WgmmaShared;
// d += A B with A in registers (the accumulator layout of 16 columns, as FP16 pairs) and B [16][N]
// in shared memory, N contiguous.
template <int kN>
struct WgmmaRegisters;
// The same with B [N][16], k contiguous.
template <int kN>
struct WgmmaRows;

#define KVANT_ACC8(d, i)                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define KVANT_ACC32(d, i) \
  KVANT_ACC8(d, i), KVANT_ACC8(d, i + 8), KVANT_ACC8(d, i + 16), KVANT_ACC8(d, i + 24)
#define KVANT_ACC64(d, i) KVANT_ACC32(d, i), KVANT_ACC32(d, i + 32)

#define KVANT_REGS_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define KVANT_REGS_16 KVANT_REGS_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define KVANT_REGS0_31                                                                     \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23," \
  "%24,%25,%26,%27,%28,%29,%30,%31"
#define KVANT_REGS32_39 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define KVANT_REGS40_47 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define KVANT_REGS48_63 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define KVANT_REGS64_95                                                                   \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84," \
  "%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define KVANT_REGS96_127                                                                    \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113," \
  "%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define KVANT_REGS_32 KVANT_REGS0_31
#define KVANT_REGS_40 KVANT_REGS_32 KVANT_REGS32_39
#define KVANT_REGS_48 KVANT_REGS_40 KVANT_REGS40_47
#define KVANT_REGS_64 KVANT_REGS_48 KVANT_REGS48_63
#define KVANT_REGS_96 KVANT_REGS_64 KVANT_REGS64_95
#define KVANT_REGS_128 KVANT_REGS_96 KVANT_REGS96_127

// n: columns; regs: n / 2 accumulators; a, b, c: numbers of the operands after them.
#define KVANT_WGMMA_SHARED(n, regs, a, b, c, ...)                                                  \
  template <>                                                                                      \
  struct WgmmaShared<n> {                                                                          \
    __device__ __forceinline__ static void run(float (&d)[regs], uint64_t desc_a, uint64_t desc_b, \
                                               int accumulate) {                                   \
      asm volatile("{.reg .pred p;\nsetp.ne.b32 p,%" #c                                            \
                   ",0;\nwgmma.mma_async.sync.aligned.m64n" #n                                     \
                   "k16.f32.f16.f16 {" KVANT_REGS_##regs "},%" #a ",%" #b ",p,1,1,0,0;\n}"         \
                   : __VA_ARGS__                                                                   \
                   : "l"(desc_a), "l"(desc_b), "r"(accumulate));                                   \
    }                                                                                              \
  };
#define KVANT_WGMMA_REGISTERS(name, transposed, n, regs, a0, a1, a2, a3, b, ...)                \
  template <>                                                                                   \
  struct name<n> {                                                                              \
    __device__ __forceinline__ static void run(float (&d)[regs], const uint32_t* a,             \
                                               uint64_t desc_b) {                               \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {" KVANT_REGS_##regs \
                   "},{%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "},%" #b ",1,1,1," #transposed ";\n"   \
                   : __VA_ARGS__                                                                \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc_b));                  \
    }                                                                                           \
  };

KVANT_WGMMA_SHARED(64, 32, 32, 33, 34, KVANT_ACC32(d, 0))
KVANT_WGMMA_SHARED(128, 64, 64, 65, 66, KVANT_ACC64(d, 0))
KVANT_WGMMA_REGISTERS(WgmmaRegisters, 1, 64, 32, 32, 33, 34, 35, 36, KVANT_ACC32(d, 0))
KVANT_WGMMA_REGISTERS(WgmmaRegisters, 1, 80, 40, 40, 41, 42, 43, 44, KVANT_ACC32(d, 0),
                      KVANT_ACC8(d, 32))
KVANT_WGMMA_REGISTERS(WgmmaRegisters, 1, 96, 48, 48, 49, 50, 51, 52, KVANT_ACC32(d, 0),
                      KVANT_ACC8(d, 32), KVANT_ACC8(d, 40))
KVANT_WGMMA_REGISTERS(WgmmaRegisters, 1, 128, 64, 64, 65, 66, 67, 68, KVANT_ACC64(d, 0))
KVANT_WGMMA_REGISTERS(WgmmaRegisters, 1, 192, 96, 96, 97, 98, 99, 100, KVANT_ACC64(d, 0),
                      KVANT_ACC32(d, 64))
KVANT_WGMMA_REGISTERS(WgmmaRegisters, 1, 256, 128, 128, 129, 130, 131, 132, KVANT_ACC64(d, 0),
                      KVANT_ACC64(d, 64))
KVANT_WGMMA_REGISTERS(WgmmaRows, 0, 16, 8, 8, 9, 10, 11, 12, KVANT_ACC8(d, 0))
KVANT_WGMMA_REGISTERS(WgmmaRows, 0, 32, 16, 16, 17, 18, 19, 20, KVANT_ACC8(d, 0), KVANT_ACC8(d, 8))
KVANT_WGMMA_REGISTERS(WgmmaRows, 0, 64, 32, 32, 33, 34, 35, 36, KVANT_ACC32(d, 0))
KVANT_WGMMA_REGISTERS(WgmmaRows, 0, 128, 64, 64, 65, 66, 67, 68, KVANT_ACC64(d, 0))

}  // namespace kvant::backend::cuda
