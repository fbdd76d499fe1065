// Products of few rows on the Hopper generation, whose weights are copied in bulk
// (docs/kernels/cuda-linear.md, "Few rows through bulk copies").
#pragma once

#include <cuda_runtime_api.h>

#include "kvant/backend/cuda/dense/product_args.h"
#include "kvant/base/result.h"

namespace kvant::backend::cuda {

// Whether a product can be computed here: on such a device, without RowProduct::deterministic, with
// few enough rows.
bool takes_bulk_product(const ProductArgs& args, const RowProduct& product);
// `args.prepared` is null where prepares_in_blocks(), else has the rows.
Status multiply_bulk(const ProductArgs& args, const RowProduct& product, cudaStream_t stream);

}  // namespace kvant::backend::cuda
