// The vector operations of the kernels with one lane: the definition of what they compute.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kvant/base/small_floats.h"

namespace kvant::backend::cpu::scalar {

struct Simd {
  static constexpr int kLanes = 1;
  static constexpr int kMaxPanel = 4;  // activation rows whose sums stay in registers
  static constexpr bool kDotsBytes = false;
  using F = float;
  using I = uint32_t;  // one 32-bit or two 16-bit integers

  static I load_i(const void* p) {
    uint32_t v;
    std::memcpy(&v, p, 4);
    return v;
  }
  static I load_i(const float* p) { return std::bit_cast<uint32_t>(*p); }
  // The low 16 bits of each lane, one after the other.
  static void store_low_halves(void* p, I v) { std::memcpy(p, &v, 2); }
  static int32_t max_of_lanes(I v) { return static_cast<int32_t>(v); }
  static int32_t sum_of_lanes(I v) { return static_cast<int32_t>(v); }
  static I broadcast_i(const void* p) { return load_i(p); }
  static I set1_i(uint32_t v) { return v; }
  static I bit_and(I a, I b) { return a & b; }
  static I or_masked(I a, I b, I mask) { return a | (b & mask); }
  static I max_signed(I a, I b) {
    return static_cast<int32_t>(a) > static_cast<int32_t>(b) ? a : b;
  }
  static I add_i(I a, I b) { return a + b; }
  template <int kBits>
  static I shift_left(I v) {
    return v << kBits;
  }
  // Of each 16-bit half.
  template <int kBits>
  static I shift_left_16(I v) {
    return ((v << kBits) & 0xffff0000u & (0xffffffffu << (16 + kBits))) | ((v << kBits) & 0xffffu);
  }
  template <int kBits>
  static I shift_right_16(I v) {
    return ((v >> 16) >> kBits) << 16 | ((v & 0xffffu) >> kBits);
  }
  // acc + sum over both signed halves of a * b.
  static I dot_pairs(I acc, I a, I b) {
    const auto low = [](I v) { return static_cast<int32_t>(static_cast<int16_t>(v & 0xffffu)); };
    const auto high = [](I v) { return static_cast<int32_t>(static_cast<int16_t>(v >> 16)); };
    return acc + static_cast<uint32_t>(low(a) * low(b) + high(a) * high(b));
  }

  static F to_float(I v) { return static_cast<float>(static_cast<int32_t>(v)); }
  // To nearest, ties to even; INT_MIN for what does not fit.
  static I round_to_int(F v) {
    if (!(v >= -0x1p31f && v < 0x1p31f)) return 0x80000000u;
    return static_cast<uint32_t>(static_cast<int32_t>(std::lrintf(v)));
  }
  static F as_float(I v) { return std::bit_cast<float>(v); }
  static F zero() { return 0.0f; }
  static F set1(float v) { return v; }
  static F load(const float* p) { return *p; }
  static F load_unaligned_f32(const void* p) { return std::bit_cast<float>(load_i(p)); }
  static F load_f16(const void* p) { return from_f16(load_u16(p)); }
  static F load_bf16(const void* p) { return from_bf16(load_u16(p)); }
  // E4M3 times 2^-8: the code's bits are those of an f16 whose exponent counts from 2^-8 on.
  static F load_e4m3(const uint8_t* p) {
    return from_f16(static_cast<uint16_t>((*p & 0x80) << 8 | (*p & 0x7f) << 7));
  }
  static F load_u8(const uint8_t* p) { return static_cast<float>(*p); }
  static F load_i8(const uint8_t* p) { return static_cast<float>(static_cast<int8_t>(*p)); }
  static void store(float* p, F v) { *p = v; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) { return std::fma(a, b, c); }           // a * b + c
  static F negated_fma(F a, F b, F c) { return std::fma(-a, b, c); }  // c - a * b
  // The second operand if either is NaN.
  static F min(F a, F b) { return a < b ? a : b; }
  static F max(F a, F b) { return a > b ? a : b; }

 private:
  static uint16_t load_u16(const void* p) {
    uint16_t v;
    std::memcpy(&v, p, 2);
    return v;
  }
};

}  // namespace kvant::backend::cpu::scalar
