// The PTX instructions that kernels here use and CUDA C++ has no name for.
//
// One function per instruction; names follow the PTX manual. Addresses of shared memory are 32-bit.
// What GPUs before Hopper (sm_90) or Ada (sm_89) lack is made of what they have, so that kernels
// are written once.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

// Code for the host sees what Hopper has.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define KVANT_HAS_SM90 1
#else
#define KVANT_HAS_SM90 0
#endif
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
#define KVANT_HAS_SM89 1
#else
#define KVANT_HAS_SM89 0
#endif
// Registers move between warpgroups in code for sm_90a only.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define KVANT_MOVES_REGISTERS 1
#else
#define KVANT_MOVES_REGISTERS 0
#endif

namespace kvant::backend::cuda::ptx {

// Threads of a multiprocessor: 2048, but for compute capability 8.6 to 8.9 and 12.x.
#if defined(__CUDA_ARCH__) && \
    ((__CUDA_ARCH__ > 800 && __CUDA_ARCH__ < 900) || __CUDA_ARCH__ >= 1200)
inline constexpr int kThreadsOfSm = 1536;
#else
inline constexpr int kThreadsOfSm = 2048;
#endif

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- mbarrier: completion of bulk copies, hand-over of ring slots ----

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_mbarrier_init() {
#if KVANT_HAS_SM90
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ bool mbarrier_test_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#if !KVANT_HAS_SM90
  while (!mbarrier_test_wait(barrier, parity)) {
  }
#else
  asm volatile(
      "{\n.reg .pred p;\nWAIT%=:\nmbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n"
      "@p bra DONE%=;\nbra WAIT%=;\nDONE%=:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

// Once the thread's copies of 16 bytes so far are complete it arrives at `barrier`, which counts
// it.
__device__ __forceinline__ void copies_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// ---- copies of one thread that complete on an mbarrier ----
//
// begin_copies(), bulk_copy() once or several times, end_copies(). The barrier is initialised with
// kCopyArrivals, and nobody else arrives. Before Hopper a bulk copy is many small ones.

#if KVANT_HAS_SM90
inline constexpr int kCopyArrivals = 1;
#else
inline constexpr int kCopyArrivals = 2;  // what the thread wrote before, and the copies
#endif

// `bytes` of all copies together.
__device__ __forceinline__ void begin_copies(uint32_t barrier, uint32_t bytes) {
#if KVANT_HAS_SM90
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
#else
  static_cast<void>(bytes);
  mbarrier_arrive(barrier);
#endif
}
__device__ __forceinline__ void end_copies(uint32_t barrier) {
#if !KVANT_HAS_SM90
  copies_arrive(barrier);
#else
  static_cast<void>(barrier);
#endif
}
__device__ __forceinline__ uint64_t policy_evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t policy_evict_last() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// Global to shared memory, 16-byte aligned, `bytes` a multiple of 16; completes on `barrier`.
__device__ __forceinline__ void bulk_copy(uint32_t target, const void* source, uint32_t bytes,
                                          uint32_t barrier, uint64_t policy) {
#if KVANT_HAS_SM90
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], %2, [%3], %4;" ::"r"(target),
      "l"(source), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
#else
  static_cast<void>(barrier);
  for (uint32_t at = 0; at < bytes; at += 16) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(target + at),
                 "l"(static_cast<const char*>(source) + at), "l"(policy)
                 : "memory");
  }
#endif
}

// 16 bytes that other caches need not keep, by one thread; completes as a group.
__device__ __forceinline__ void copy_16(uint32_t target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}
__device__ __forceinline__ void copies_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// All but the last kPending groups of the thread are complete.
template <int kPending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- loads and stores without a branch ----

// Of global memory that nobody writes meanwhile; the load stays where it is.
__device__ __forceinline__ float4 load_float4(const float* source) {
  float4 x;
  asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(source));
  return x;
}
__device__ __forceinline__ void store_if(bool condition, float* target, float x) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %0, 0;\n@p st.global.f32 [%1], %2;\n}" ::"r"(
                   static_cast<int>(condition)),
               "l"(target), "f"(x)
               : "memory");
}
// ---- programmatic dependent launch ----

__device__ __forceinline__ void launch_dependents() {
#if KVANT_HAS_SM90
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_prerequisites() {
#if KVANT_HAS_SM90
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- registers: a warpgroup gives some up, another takes them ----

template <int kRegisters>
__device__ __forceinline__ void decrease_registers() {
#if KVANT_MOVES_REGISTERS
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void increase_registers() {
#if KVANT_MOVES_REGISTERS
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// ---- barriers of a part of the block ----

__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- tensor cores: m16n8k16, A and B 16-bit, C and D fp32 ----

__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// A and B 8-bit, exact: A 16 x 32 or 16 x 16, without (u8) or with sign, B with sign; d += a b.
template <bool kSigned>
__device__ __forceinline__ void mma_bytes(int (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  if constexpr (kSigned) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}
template <bool kSigned>
__device__ __forceinline__ void mma_bytes(int (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  static_assert(kSigned, "16 inputs are those of a scale of Q6_K");
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}
// Transposes an 8x8 matrix of 16-bit values held by the warp.
__device__ __forceinline__ uint32_t movmatrix(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// ---- arithmetic ----

// The largest of a warp's numbers, known to all lanes; NaN counts as large.
__device__ __forceinline__ float warp_max(float x) {
  const auto ordered = [](int bits) { return bits ^ (bits >> 31 & 0x7fffffff); };
  return __int_as_float(ordered(__reduce_max_sync(~0u, ordered(__float_as_int(x)))));
}
// The lowest `count` bits, all from 32 on.
__device__ __forceinline__ uint32_t low_bits(uint32_t count) {
  uint32_t y;
  asm("bmsk.clamp.b32 %0, 0, %1;" : "=r"(y) : "r"(count));
  return y;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// NaN if one of them is.
__device__ __forceinline__ float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Two fp16 whose upper bytes are E4M3 codes, but no NaN; the lower ones do not count. Exponent and
// mantissa in their places are the number times 2^-8.
__device__ __forceinline__ uint32_t f16x2_of_e4m3_bytes(uint32_t codes) {
  uint32_t y;
  asm("mul.rn.f16x2 %0, %1, %2;"
      : "=r"(y)
      : "r"((codes & 0x80008000u) | (codes & 0x7f007f00u) >> 1), "r"(0x5c005c00u));
  return y;
}
// Two bytes to two fp16: byte 0 to the low half.
__device__ __forceinline__ uint32_t f16x2_of_e4m3x2(uint32_t pair) {
#if KVANT_HAS_SM89
  uint32_t y;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"(static_cast<uint16_t>(pair)));
  return y;
#else
  return f16x2_of_e4m3_bytes(__byte_perm(pair, 0, 0x1404));
#endif
}
// Two finite numbers to two codes, the first in the low byte; beyond 448 in magnitude they become
// 448.
__device__ __forceinline__ uint32_t e4m3x2_of_f32(float low, float high) {
#if KVANT_HAS_SM89
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
#endif
}
__device__ __forceinline__ uint32_t f16x2_of_f32(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
__device__ __forceinline__ uint32_t bf16x2_of_f32(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
// The same in E5M2, where the largest is 57344.
__device__ __forceinline__ uint32_t e5m2x2_of_f32(float low, float high) {
#if KVANT_HAS_SM89
  uint16_t pair;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E5M2);
#endif
}
// Four in E4M3, in the order of bytes.
__device__ __forceinline__ uint32_t e4m3x4_of_f32(float a, float b, float c, float d) {
#if KVANT_HAS_SM89
  uint32_t bytes;
  asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\nmov.b32 %0, {low, high};\n}"
      : "=r"(bytes)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return bytes;
#else
  return e4m3x2_of_f32(a, b) | e4m3x2_of_f32(c, d) << 16;
#endif
}
// f16x2_of_e4m3x2 of the lower or upper half of a word, without an instruction to take it out.
__device__ __forceinline__ uint32_t f16x2_of_e4m3x2_low(uint32_t word) {
#if KVANT_HAS_SM89
  uint32_t y;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.rn.f16x2.e4m3x2 %0, l;}" : "=r"(y) : "r"(word));
  return y;
#else
  return f16x2_of_e4m3_bytes(__byte_perm(word, 0, 0x1404));
#endif
}
__device__ __forceinline__ uint32_t f16x2_of_e4m3x2_high(uint32_t word) {
#if KVANT_HAS_SM89
  uint32_t y;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.rn.f16x2.e4m3x2 %0, h;}" : "=r"(y) : "r"(word));
  return y;
#else
  return f16x2_of_e4m3_bytes(__byte_perm(word, 0, 0x3424));
#endif
}
__device__ __forceinline__ uint32_t hmul2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
// Both halves of a times the lower or upper half of b.
__device__ __forceinline__ uint32_t hmul2_low(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("{.reg .b16 l, h; .reg .b32 t; mov.b32 {l, h}, %2; mov.b32 t, {l, l}; mul.rn.f16x2 %0, %1, "
      "t;}"
      : "=r"(y)
      : "r"(a), "r"(b));
  return y;
}
__device__ __forceinline__ uint32_t hmul2_high(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("{.reg .b16 l, h; .reg .b32 t; mov.b32 {l, h}, %2; mov.b32 t, {h, h}; mul.rn.f16x2 %0, %1, "
      "t;}"
      : "=r"(y)
      : "r"(a), "r"(b));
  return y;
}
// Both halves of a times the lower half of b, plus its upper half.
__device__ __forceinline__ uint32_t hfma2_halves(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("{.reg .b16 l, h; .reg .b32 s, o; mov.b32 {l, h}, %2; mov.b32 s, {l, l}; mov.b32 o, {h, h}; "
      "fma.rn.f16x2 %0, %1, s, o;}"
      : "=r"(y)
      : "r"(a), "r"(b));
  return y;
}
__device__ __forceinline__ uint32_t hadd2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
__device__ __forceinline__ uint32_t hfma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t y;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}
__device__ __forceinline__ float2 f32_of_f16x2(uint32_t x) {
  return __half22float2(*reinterpret_cast<const __half2*>(&x));
}
// Bytes of a and b picked by the nibbles of `selector` (0-3: a, 4-7: b).
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

}  // namespace kvant::backend::cuda::ptx
