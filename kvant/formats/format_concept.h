// What the header of a cache format must provide. format.cc and the codecs check every type in
// formats.def against it, so that an incomplete header fails the build with a readable message.
//
// A format is a struct with static members only, all usable on host and device and in constant
// expressions. It is the oracle: SIMD and device versions are compared with it bit for bit.
//
//   static constexpr FormatInfo kInfo = {...};        // the row of facts; id = FormatId::k<Type>
//   using Code = uint8_t;                             // or uint16_t: one element, unpacked
//   // Side data of a block of n finite or non-finite values: the low scale_bytes(kInfo.scale)
//   bytes. static constexpr uint32_t block_scale(const float* x, int n, float g);
//   // One element of that block. Rounds, saturates and treats NaN and Inf as codecs.md section 2
//   says. static constexpr Code encode(float x, uint32_t scale, float g); static constexpr float
//   decode(Code code, uint32_t scale, float g);
//   // Largest magnitude that the format can hold whatever the block's scale; beyond it a finite
//   input
//   // counts as saturated.
//   static constexpr float max_magnitude(float g);
//
// `g` is the global scale of the plan, 1 without one; formats with GlobalScale::kNone ignore it.
#pragma once

#include <concepts>
#include <cstdint>
#include <type_traits>

#include "kvant/formats/format.h"

namespace kvant::formats {

template <typename F>
concept FormatHasInfo = requires {
  requires std::same_as<std::remove_cv_t<decltype(F::kInfo)>, FormatInfo>;
};
template <typename F>
concept FormatHasCode = requires {
  typename F::Code;
}
&&(std::same_as<typename F::Code, uint8_t> || std::same_as<typename F::Code, uint16_t>);
template <typename F>
concept FormatHasBlockScale = requires(const float* x, int n, float g) {
  { F::block_scale(x, n, g) } -> std::same_as<uint32_t>;
};
template <typename F>
concept FormatHasEncode = requires(float x, uint32_t scale, float g) {
  { F::encode(x, scale, g) } -> std::same_as<typename F::Code>;
};
template <typename F>
concept FormatHasDecode = requires(typename F::Code code, uint32_t scale, float g) {
  { F::decode(code, scale, g) } -> std::same_as<float>;
};
template <typename F>
concept FormatHasMaxMagnitude = requires(float g) {
  { F::max_magnitude(g) } -> std::same_as<float>;
};
// Optional: a second choice of the block's scale by error (+46).
template <typename F>
concept FormatHasFourOverSix = requires(const float* x, int n, float g) {
  { F::block_scale_four_over_six(x, n, g) } -> std::same_as<uint32_t>;
};

// Instantiating it is the check.
template <typename F>
struct CheckFormat {
  static_assert(FormatHasInfo<F>, "a format needs `static constexpr FormatInfo kInfo`");
  static_assert(FormatHasCode<F>, "a format needs `using Code = uint8_t` or uint16_t");
  static_assert(
      FormatHasBlockScale<F>,
      "a format needs `static constexpr uint32_t block_scale(const float* x, int n, float g)`");
  static_assert(FormatHasEncode<F>,
                "a format needs `static constexpr Code encode(float x, uint32_t scale, float g)`");
  static_assert(
      FormatHasDecode<F>,
      "a format needs `static constexpr float decode(Code code, uint32_t scale, float g)`");
  static_assert(FormatHasMaxMagnitude<F>,
                "a format needs `static constexpr float max_magnitude(float g)`");
  static_assert(F::kInfo.code_bits >= 1 && F::kInfo.code_bits <= 8 * int{sizeof(typename F::Code)},
                "code_bits of the format do not fit its Code");
  static_assert(F::kInfo.axis != BlockAxis::kNone || F::kInfo.scale == Scale::kNone,
                "a format without blocks cannot have block scales");
  static_assert(F::kInfo.axis == BlockAxis::kNone || F::kInfo.scale != Scale::kNone,
                "a format with blocks needs a block scale");
  static_assert(F::kInfo.block_size * F::kInfo.code_bits % 8 == 0,
                "the codes of a block must be whole bytes");
  static_assert(!F::kInfo.for_values || F::kInfo.axis != BlockAxis::kToken,
                "blocks along tokens are for keys only");
  static constexpr bool value = true;
};

}  // namespace kvant::formats
