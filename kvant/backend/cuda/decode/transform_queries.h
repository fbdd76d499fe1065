// Queries for keys that are stored divided by factors, rotated, or less a bias (codecs.md section
// 3): the terms move from the keys to the queries, so that pages are read as they are.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kvant/base/result.h"

namespace kvant::backend::cuda {

struct QueryTransform {
  const float* q = nullptr;       // [rows][num_query_heads][head_dim]
  float* stored_q = nullptr;      // like q: R(q * smooth)
  float* q_bias = nullptr;        // [rows][num_query_heads]: stored_q . bias; or null
  const float* smooth = nullptr;  // [num_kv_heads][head_dim] or null
  const float* bias = nullptr;    // likewise
  int rotation_block = 0;         // 0: not rotated
  float rotation_scale = 1.0f;
  int64_t num_rows = 0;
  int num_query_heads = 0;
  int group = 1;  // query heads per KV head
  int head_dim = 0;
};

// Enqueues it; the kernel that follows waits for it by programmatic dependent launch.
Status transform_queries(const QueryTransform& transform, cudaStream_t stream);

}  // namespace kvant::backend::cuda
