// What fp8, fp8:head and fp8e5m2 share: an 8-bit float times a scale of the plan.
//
//   encode RNE(fl(x / g)), decode fl(q * g); NaN takes code 0, Inf the largest code of its sign.
// Element formats: OCP 8-bit Floating Point Specification v1.0.
#pragma once

#include "kvant/base/small_floats.h"
#include "kvant/formats/block_math.h"
#include "kvant/formats/format.h"

namespace kvant::formats {

struct E4m3Element {
  static constexpr float kMax = 448.0f;
  KVANT_HD static constexpr uint8_t to_code(float x) { return to_e4m3(x); }
  KVANT_HD static constexpr float from_code(uint8_t code) { return from_e4m3(code); }
};

struct E5m2Element {
  static constexpr float kMax = 57344.0f;
  KVANT_HD static constexpr uint8_t to_code(float x) { return to_e5m2(x); }
  KVANT_HD static constexpr float from_code(uint8_t code) { return from_e5m2(code); }
};

template <typename ElementType>
struct ScaledFloat8 {
  using Code = uint8_t;

  KVANT_HD static constexpr uint32_t block_scale(const float*, int, float) { return 0; }
  KVANT_HD static constexpr Code encode(float x, uint32_t, float g) {
    return is_nan(x) ? Code{0} : ElementType::to_code(x / g);
  }
  KVANT_HD static constexpr float decode(Code code, uint32_t, float g) {
    return ElementType::from_code(code) * g;
  }
  KVANT_HD static constexpr float max_magnitude(float g) { return ElementType::kMax * g; }
};

}  // namespace kvant::formats
