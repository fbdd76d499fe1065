#include "kvant/formats/transform.h"

#include <cmath>

#include "kvant/formats/codec_scalar.h"

namespace kvant::formats {

float rotation_scale(int block) {
  // Correctly rounded: the double is far closer to 1 / sqrt(2) * 2^k than to a midpoint of fp32.
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
}

void rotate_row(float* x, int head_dim) {
  const int block = rotation_block(head_dim);
  internal::rotate_scalar(x, 1, head_dim, block, rotation_scale(block));
}

void transform_query(const SideFormat& k, const SideParams& params, int head_dim, const float* q,
                     float* out) {
  const bool smooth = k.smooth && params.smooth != nullptr;
  for (int c = 0; c < head_dim; ++c) out[c] = smooth ? q[c] * params.smooth[c] : q[c];
  if (k.rotate) rotate_row(out, head_dim);
}

float query_offset(const SideFormat& k, const SideParams& params, int head_dim,
                   const uint16_t* mean, const float* transformed_q) {
  float sum = 0.0f;
  if (k.mean && mean != nullptr) {
    for (int c = 0; c < head_dim; ++c) sum += transformed_q[c] * from_bf16(mean[c]);
  } else if (k.bias && params.bias != nullptr) {
    for (int c = 0; c < head_dim; ++c) sum += transformed_q[c] * params.bias[c];
  }
  return sum;
}

void transform_output(const SideFormat& v, const SideParams& params, int head_dim, float weight,
                      float* out) {
  if (v.bias && params.bias != nullptr) {
    for (int c = 0; c < head_dim; ++c) out[c] += weight * params.bias[c];
  }
  if (v.rotate) rotate_row(out, head_dim);
}

}  // namespace kvant::formats
