// Activations of gates, shared by the operator and by products that end in one.
#pragma once

#include "kvant/backend/backend.h"

namespace kvant::backend::cuda {

// x / (1 + e^-t)
__device__ inline float times_sigmoid(float x, float t) {
  return x / (1.0f + expf(-t));
}

__device__ inline float activate(GateKind kind, float g) {
  float t = g;
  // GELU with tanh: x / 2 * (1 + tanh t) = x / (1 + e^-2t), t = sqrt(2 / pi) (x + 0.044715 x^3).
  if (kind == GateKind::kGeluTanh) {
    t = g * fmaf(g * g, 2.0f * 0.7978845608f * 0.044715f, 2.0f * 0.7978845608f);
  }
  return times_sigmoid(g, t);
}

}  // namespace kvant::backend::cuda
