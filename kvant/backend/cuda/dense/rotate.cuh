// Rotary position embedding of one pair of elements, shared by the operator and by appending.
#pragma once

namespace kvant::backend::cuda {

// Elements i and i + half of a head. `angles`: `half` cosines, then as many sines (rope_table()).
__device__ inline void rotate_pair(float* x, const float* angles, int half, int i) {
  const float c = angles[i];
  const float s = angles[half + i];
  const float a = x[i];
  const float b = x[i + half];
  x[i] = fmaf(-b, s, a * c);
  x[i + half] = fmaf(a, s, b * c);
}

}  // namespace kvant::backend::cuda
