// nvfp4: E2M1 in blocks of 16 with an E4M3 scale and the plan's global scale g; +46 chooses the
// scale.
//
//   s = E4M3(fl(amax / fl(6 g))); d = fl(s g); code E2M1(fl(x / d)), all +0 where d = 0; NaN takes
//   code 0; decode fl(fl(q s) g). +46: also s4 = E4M3(fl(amax / fl(4 g))), taken if fl(amax / fl(4
//   g)) <= 448 and the sum of squared errors is smaller (arXiv 2512.02010, with this project's
//   exact order of operations).
#pragma once

#include "kvant/base/small_floats.h"
#include "kvant/formats/block_math.h"
#include "kvant/formats/format.h"

namespace kvant::formats {

struct Nvfp4 {
  static constexpr FormatInfo kInfo = {
      .id = FormatId::kNvfp4,
      .name = "nvfp4",
      .element = Element::kE2m1,
      .code_bits = 4,
      .axis = BlockAxis::kHeadDim,
      .block_size = 16,
      .scale = Scale::kE4m3,
      .global_scale = GlobalScale::kPerTensor,
      .for_keys = true,
      .for_values = true,
      .summary = "4-bit float E2M1, E4M3 scale per 16 (NVFP4)",
  };
  using Code = uint8_t;

  KVANT_HD static constexpr uint32_t block_scale(const float* x, int n, float g) {
    return to_e4m3(finite_amax(x, n) / (6.0f * g));
  }

  KVANT_HD static constexpr uint32_t block_scale_four_over_six(const float* x, int n, float g) {
    const uint32_t s6 = block_scale(x, n, g);
    const float ratio = finite_amax(x, n) / (4.0f * g);
    if (!(ratio <= 448.0f)) return s6;
    const uint32_t s4 = to_e4m3(ratio);
    return squared_error(x, n, s4, g) < squared_error(x, n, s6, g) ? s4 : s6;
  }

  KVANT_HD static constexpr Code encode(float x, uint32_t scale, float g) {
    const float d = from_e4m3(static_cast<uint8_t>(scale)) * g;
    return d == 0.0f || is_nan(x) ? Code{0} : to_e2m1(x / d);
  }
  KVANT_HD static constexpr float decode(Code code, uint32_t scale, float g) {
    const float product = from_e2m1(code) * from_e4m3(static_cast<uint8_t>(scale));
    return product * g;
  }
  KVANT_HD static constexpr float max_magnitude(float g) { return 2688.0f * g; }

 private:
  // Sum of squares of fl(x - decode) as a binary tree over 16 (missing elements are 0): i with i +
  // 8, then + 4, + 2, + 1. A non-finite x makes it Inf or NaN, which is never smaller.
  KVANT_HD static constexpr float squared_error(const float* x, int n, uint32_t scale, float g) {
    float squares[16] = {};
    for (int i = 0; i < n; ++i) {
      const float error = x[i] - decode(encode(x[i], scale, g), scale, g);
      squares[i] = error * error;
    }
    for (int half = 8; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) squares[i] = squares[i] + squares[i + half];
    }
    return squares[0];
  }
};

}  // namespace kvant::formats
