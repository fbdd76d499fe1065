// The attention problem, stated once for every backend, and the merge rule of partial results.
//
//   scores_j = softcap(scale * q . k_j)        for the keys j that the query may read
//   out      = sum_j softmax(scores)_j * v_j
//
// A query at position i reads key j if j <= i and (window == 0 or j > i - window or j <
// sink_tokens).
#pragma once

#include <cstdint>

#include "kvant/cache/view.h"

namespace kvant::attention {

// RoPE as the model applies it; kernels need it only for keys stored before RoPE (+prerope).
struct RopeParams {
  int rotary_dim = 0;  // channels that rotate; pairs (i, i + rotary_dim / 2)
  float base = 10000.0f;
  float position_scale = 1.0f;               // linear scaling: position * position_scale
  const float* frequency_factors = nullptr;  // [rotary_dim / 2], divides the frequency; may be null
  float attention_factor = 1.0f;             // YaRN magnitude
};

struct AttentionParams {
  int num_query_heads = 0;  // G = num_query_heads / num_kv_heads, 1 to 16
  float scale = 1.0f;
  float softcap = 0.0f;  // 0: none; else softcap * tanh(x / softcap)
  // The first tokens stay visible beyond the window. A group with a window frees their pages, so
  // the cache must hold such layers as full attention and only the view's window be set.
  int sink_tokens = 0;
  const float* sink_logits =
      nullptr;  // [num_query_heads]: joins the softmax's denominator; may be null
  RopeParams rope;
};

// Tokens of one split: partial results cover [n * kSplitTokens, (n + 1) * kSplitTokens) of absolute
// positions, whatever the batch, the chunk or the number of threads, and are merged in order of n.
// That is what makes results independent of all three.
inline constexpr int kSplitTokens = 512;

// A partial result of one query head: sum of exp(score - max) * v, that sum of weights, and max.
//   merge(a, b): m = max(a.max, b.max); sum = a.sum * exp(a.max - m) + b.sum * exp(b.max - m); acc
//   alike.
struct Partial {
  float max;
  float sum;
};

}  // namespace kvant::attention
