// Storage types of 16, 8 and 4 bits and their exact conversions from and to fp32.
//
// Every conversion to a smaller type rounds to nearest, ties to even, keeps subnormals and the sign
// of zero. `to_bf16` and `to_f16` follow IEEE (overflow gives Inf, NaN stays a quiet NaN); the
// others saturate at the largest finite value, as codecs.md section 2 asks, and must not be given
// NaN. Sources: IEEE 754-2019; OCP 8-bit Floating Point v1.0; OCP Microscaling Formats v1.0. These
// scalar functions are the oracle for every SIMD and device version. Thread-safe (pure).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "kvant/base/host_device.h"

namespace kvant {

// ---- bf16 ----

KVANT_HD constexpr float from_bf16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

KVANT_HD constexpr uint16_t to_bf16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);  // NaN
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// ---- f16 ----

KVANT_HD constexpr float from_f16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu;
  const uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 0x1fu) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0)
    return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  // Subnormal: mantissa * 2^-24, exact in fp32.
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
}

KVANT_HD constexpr uint16_t to_f16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u)
    return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds past 65504
  if (magnitude < 0x38800000u) {
    // Subnormal or zero. Adding 0.5 leaves a ulp of 2^-24, so the addition itself rounds to even.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// Saturates at +-65504 instead of overflowing: scales and stored values (codecs.md section 2).
KVANT_HD constexpr uint16_t to_f16_saturated(float x) {
  const uint16_t h = to_f16(x);
  return (h & 0x7fffu) == 0x7c00u ? static_cast<uint16_t>((h & 0x8000u) | 0x7bffu) : h;
}

// Saturates at the largest finite value instead of overflowing: stored values.
KVANT_HD constexpr uint16_t to_bf16_saturated(float x) {
  const uint16_t b = to_bf16(x);
  return (b & 0x7fffu) == 0x7f80u ? static_cast<uint16_t>((b & 0x8000u) | 0x7f7fu) : b;
}

// ---- 8-bit and 4-bit floats ----

namespace internal {

// Encodes a finite or infinite x in a small float of `mantissa_bits`, whose smallest normal is
// 2^min_exponent, saturating at the code `max_code`. Returns the code without the sign.
KVANT_HD constexpr uint32_t encode_magnitude(float x, int mantissa_bits, int min_exponent,
                                             uint32_t max_code) {
  const uint32_t u = std::bit_cast<uint32_t>(x) & 0x7fffffffu;
  const uint32_t min_normal = static_cast<uint32_t>(min_exponent + 127) << 23;
  uint32_t code = 0;
  if (u < min_normal) {
    // Adding 1.5 * 2^(23 + log2 ulp) would do; an added power of two of which one fp32 ulp equals
    // the target's subnormal ulp rounds the same way and leaves the code in the low mantissa bits.
    const uint32_t magic = static_cast<uint32_t>(min_exponent - mantissa_bits + 23 + 127) << 23;
    code = std::bit_cast<uint32_t>(std::bit_cast<float>(u) + std::bit_cast<float>(magic)) - magic;
  } else {
    const int shift = 23 - mantissa_bits;
    const uint32_t half = (1u << (shift - 1)) - 1u;
    const uint32_t rounded = u + half + ((u >> shift) & 1u);
    code = (rounded - min_normal + (1u << 23)) >> shift;
  }
  return code < max_code ? code : max_code;
}

KVANT_HD constexpr float decode_magnitude(uint32_t code, int mantissa_bits, int min_exponent) {
  const uint32_t exponent = code >> mantissa_bits;
  const uint32_t mantissa = code & ((1u << mantissa_bits) - 1u);
  if (exponent == 0) {
    const float ulp =
        std::bit_cast<float>(static_cast<uint32_t>(min_exponent - mantissa_bits + 127) << 23);
    return static_cast<float>(mantissa) * ulp;
  }
  return std::bit_cast<float>((exponent + static_cast<uint32_t>(min_exponent + 126)) << 23 |
                              mantissa << (23 - mantissa_bits));
}

KVANT_HD constexpr uint32_t sign_bit(float x) {
  return std::bit_cast<uint32_t>(x) >> 31;
}

}  // namespace internal

// E4M3 (OCP "e4m3fn"): largest finite 448 = 0x7e, NaN 0x7f, no infinity.
KVANT_HD constexpr uint8_t to_e4m3(float x) {
  return static_cast<uint8_t>(internal::sign_bit(x) << 7 |
                              internal::encode_magnitude(x, 3, -6, 0x7eu));
}
KVANT_HD constexpr float from_e4m3(uint8_t code) {
  const float magnitude = (code & 0x7fu) == 0x7fu ? std::bit_cast<float>(0x7fc00000u)
                                                  : internal::decode_magnitude(code & 0x7fu, 3, -6);
  return (code & 0x80u) != 0 ? -magnitude : magnitude;
}

// E5M2 (OCP): largest finite 57344 = 0x7b, infinity 0x7c.
KVANT_HD constexpr uint8_t to_e5m2(float x) {
  return static_cast<uint8_t>(internal::sign_bit(x) << 7 |
                              internal::encode_magnitude(x, 2, -14, 0x7bu));
}
KVANT_HD constexpr float from_e5m2(uint8_t code) {
  return from_f16(static_cast<uint16_t>(static_cast<uint16_t>(code) << 8));
}

// E2M1: magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 for codes 0..7; bit 3 is the sign.
KVANT_HD constexpr uint8_t to_e2m1(float x) {
  return static_cast<uint8_t>(internal::sign_bit(x) << 3 | internal::encode_magnitude(x, 1, 0, 7u));
}
KVANT_HD constexpr float from_e2m1(uint8_t code) {
  const float magnitude = internal::decode_magnitude(code & 7u, 1, 0);
  return (code & 8u) != 0 ? -magnitude : magnitude;
}

// E8M0: 2^(byte - 127); 0xff is NaN and is never stored by kvant.
KVANT_HD constexpr float from_e8m0(uint8_t byte) {
  return byte == 0 ? 0x1p-127f : std::bit_cast<float>(static_cast<uint32_t>(byte) << 23);
}

}  // namespace kvant
