// Products of many activation rows at once, on matrix units; one table per level that has one. The
// same bits as the kernels of kernels.h. docs/kernels/cpu-linear.md, "AMX", says why and how.
//
// Included by sources built for a SIMD level: no containers, nothing with code.
#pragma once

#include <cstdint>

#include "kvant/backend/cpu/kernels.h"

namespace kvant::backend::cpu {

// As ProductFunction, for `num_panels` wide panels that follow each other at args.panel, of which
// `num_x_rows` activation rows are real: the last panel may have fewer than kWidePanelRows.
using WideProductFunction = void (*)(const ProductArgs& args, int num_panels, int64_t num_x_rows);

struct WideKernels {
  WideProductFunction product[kNumWeightKinds];  // null where panels of kernels.h serve
  // Prepares one wide panel; `rows` are n <= kWidePanelRows pointers to `cols` values.
  void (*quantise_panel)(const float* const* rows, int n, int64_t cols, uint8_t* panel);
};

// Null for levels without matrix units.
const WideKernels* wide_kernels(CpuLevel level);

namespace amx {
extern const WideKernels kWideKernels;
}

}  // namespace kvant::backend::cpu
