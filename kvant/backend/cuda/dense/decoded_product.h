// Products of many rows with weights as they are stored, on Hopper: tiles are decoded to FP16 in
// registers, as left operands of wgmma, so that weights are read once and nothing is written but
// the result. docs/kernels/cuda-linear.md.
//
// Activations are rounded to FP16 after a power of two for each row that brings its largest
// magnitude to [2^14, 2^15); weights to FP16 (numbers below 2^-14 lose bits). Sums are fp32.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "kvant/backend/cuda/dense/product.h"
#include "kvant/base/result.h"

namespace kvant::backend::cuda {

// Whether this device has such products for weights of a type.
bool has_decoded_product(formats::WeightType type);

// What such a product's time depends on.
struct DecodedWork {
  int64_t num_rows = 0;
  int64_t num_strips = 0;  // of all matrices; with a gate, of one of the two
  int64_t num_tiles = 0;   // of a strip
  int64_t strip_bytes = 0;
  bool gated = false;
  int num_sms = 1;
};
// An estimate, for comparison with other ways to multiply.
int64_t decoded_product_nanoseconds(const DecodedWork& work);

// Bytes of `rows` rows of activations as they are multiplied.
int64_t half_rows_bytes(int64_t rows, int64_t padded_cols);

// Rows of `product.x` of `cols` values, normed where product.norm says so, to product.workspace.
Status prepare_half_rows(const RowProduct& product, int64_t cols, cudaStream_t stream);

// Of rows that have been prepared: product.num_rows, gated and gate count. At most
// kMaxProductTargets targets with the same type and number of columns.
Status multiply_decoded(const RowProduct& product, std::span<const ProductTarget> targets,
                        cudaStream_t stream);

}  // namespace kvant::backend::cuda
