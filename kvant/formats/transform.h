// What a kernel folds into the query and the output instead of decoding: rotation, factors,
// offsets.
//
// A closed page of keys stores s = R(k / smooth) - b (order of codecs.md section 3), so that
//   q . k = R(q * smooth) . s + R(q * smooth) . b
// and a page of values stores s = R(v) - b, so that sum w v = R(sum w s + b sum w). R is its own
// inverse up to rounding. BF16 pages hold plain values: none of this applies to their part. Also
// the decode tables of the element formats. Thread-safe (pure functions, constants).
#pragma once

#include <array>
#include <cstdint>

#include "kvant/base/small_floats.h"
#include "kvant/formats/codec.h"

namespace kvant::formats {

// Largest power of two that divides head_dim: the size of a Hadamard block.
constexpr int rotation_block(int head_dim) {
  return head_dim & -head_dim;
}

// fl(1 / sqrt(block)), what a rotated block is multiplied with.
float rotation_scale(int block);

// q [head_dim] to R(q * smooth), what is multiplied with stored keys; may be in place.
void transform_query(const SideFormat& k, const SideParams& params, int head_dim, const float* q,
                     float* out);

// The term of a page in all its scores of one transformed query: q . b with b the page's mean (BF16
// [head_dim], with +mean) or the plan's bias (+bias); 0 without either. fp32, in channel order.
float query_offset(const SideFormat& k, const SideParams& params, int head_dim,
                   const uint16_t* mean, const float* transformed_q);

// In place on a sum of weighted stored values, whose weights sum to `weight`: what closed pages
// contribute to the output.
void transform_output(const SideFormat& v, const SideParams& params, int head_dim, float weight,
                      float* out);

// Values of all codes; E4M3's codes 0x7f and 0xff are NaN and never stored.
inline constexpr std::array<float, 16> kE2m1Values = [] {
  std::array<float, 16> values{};
  for (int i = 0; i < 16; ++i) values[static_cast<size_t>(i)] = from_e2m1(static_cast<uint8_t>(i));
  return values;
}();
inline constexpr std::array<float, 256> kE4m3Values = [] {
  std::array<float, 256> values{};
  for (int i = 0; i < 256; ++i) values[static_cast<size_t>(i)] = from_e4m3(static_cast<uint8_t>(i));
  return values;
}();
inline constexpr std::array<float, 256> kE5m2Values = [] {
  std::array<float, 256> values{};
  for (int i = 0; i < 256; ++i) values[static_cast<size_t>(i)] = from_e5m2(static_cast<uint8_t>(i));
  return values;
}();

}  // namespace kvant::formats
