// Exact attention, slow: what every kernel is measured against.
//
// Decodes pages with the scalar codec and computes scores, softmax and the weighted sum in float64,
// for any page layout, format and mask. Keys and values are those that closed pages define
// (codecs.md section 1): BF16 near the query, as stored elsewhere. Allocates freely; thread-safe.
#pragma once

#include <span>

#include "kvant/attention/problem.h"
#include "kvant/base/result.h"
#include "kvant/cache/view.h"

namespace kvant::attention {

struct ReferenceArgs {
  const cache::GroupView* view = nullptr;
  int group_layer = 0;
  AttentionParams params;
  const float* q = nullptr;  // [num_rows][num_query_heads][head_dim]
  double* out = nullptr;     // like q
  int kv_head = -1;          // only the query heads of this KV head; -1: all
};

// kUnsupported or kInvalidArgument if a format of the view has no codec.
Status reference_attention(const ReferenceArgs& args);

// |x - exact| / |exact| in the Euclidean norm, in float64; NaN if a value of x is not finite. 0 for
// two zero vectors, infinity if only `exact` is zero.
double relative_l2(std::span<const float> x, std::span<const double> exact);

}  // namespace kvant::attention
