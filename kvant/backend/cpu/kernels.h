// The vector kernels of the dense operators, one table of functions per SIMD level. All levels give
// the same bits: the same fp32 operations in the same order, with FMA where the source says so.
//
// Included by sources built for a SIMD level: no containers, nothing with code.
#pragma once

#include <cstdint>

#include "kvant/backend/cpu/matrix_layout.h"

namespace kvant {
enum class CpuLevel;  // cpu_level.h includes containers, which kernels must not (architecture.md)
}

namespace kvant::backend::cpu {

// out[n][16 * tiles] (+)= panel x tiles (+ bias), for consecutive tiles of one matrix.
struct ProductArgs {
  const uint8_t* tiles = nullptr;
  int64_t tile_bytes = 0;
  int64_t scale_offset = 0;  // of the scales in a tile
  int64_t cols = 0;
  const uint8_t* panel = nullptr;
  const float* bias = nullptr;  // of the first tile's first row; or null
  float* out = nullptr;         // of the panel's first row and the first tile's first row
  int64_t out_stride = 0;       // floats between activation rows
  int64_t num_rows = 0;         // output rows: 16 per tile, the last tile may have fewer
  bool accumulate = false;
};
using ProductFunction = void (*)(const ProductArgs& args);

struct Kernels {
  // [kind][n] for panels of n rows; null where no such kernel exists.
  ProductFunction product[kNumWeightKinds][kMaxPanelRows + 1];
  // `rows` are n pointers to `cols` values; cols is a multiple of 32.
  void (*quantise_panel)(const float* const* rows, int n, int64_t cols, uint8_t* panel);
  void (*float_panel)(const float* const* rows, int n, int64_t cols, uint8_t* panel);

  // out = x / sqrt(mean(x^2) + epsilon) * weight, one row; out may be x.
  void (*rms_norm)(const float* x, const float* weight, int64_t dim, float epsilon, float* out);
  void (*silu_gate)(const float* gate, const float* up, float* out, int64_t n);
  void (*gelu_gate)(const float* gate, const float* up, float* out, int64_t n);
  void (*add)(const float* x, float* y, int64_t n);                      // y += x
  void (*add_scaled)(const float* x, float scale, float* y, int64_t n);  // y = fma(scale, x, y)
  void (*scale)(float scale, float* x, int64_t n);                       // x *= scale
  // Rotates pairs (x[i], x[i + half]); cos_sin is [2][half].
  void (*rope)(float* x, const float* cos_sin, int64_t half);
};

// Falls back to the best level that this build has.
const Kernels& kernels(CpuLevel level);

namespace scalar {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}

}  // namespace kvant::backend::cpu
