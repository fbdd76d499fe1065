// What decode attention takes of the device beside the cache: bounds for the plan, and the buffers.
#include <cuda_runtime.h>

#include <algorithm>

#include "kvant/backend/cuda/attention.h"
#include "kvant/backend/cuda/status.h"

namespace kvant::backend::cuda {
namespace {

// Splits of a context, by position.
int64_t num_splits(int64_t context) {
  int64_t splits = 0;
  for (int64_t position = 0; position < context; ++splits) position = split_end(position);
  return splits;
}

// Pairs of a new token and a KV head in a step that decode kernels read.
int64_t most_units(const WorkspaceNeeds& needs, bool deterministic) {
  const int64_t tokens =
      deterministic ? needs.max_rows
                    : std::min(needs.max_rows, int64_t{kMostDecodeTokens} * needs.max_sequences);
  return tokens * needs.num_kv_heads;
}

}  // namespace

int64_t CudaAttention::row_bytes(int head_dim) {
  return int64_t{head_dim} * 4 + int64_t{sizeof(float2)};
}

int64_t CudaAttention::partial_bytes(const WorkspaceNeeds& needs) const {
  const VariantLimits limits = variant_limits(needs.head_dim);
  const int group = needs.num_query_heads / needs.num_kv_heads;
  const int rows = group <= 8 ? 8 : 16;  // of a result
  int64_t all = int64_t{num_sms_} * limits.partial_rows;
  if (deterministic_) {
    const int64_t most = most_units(needs, true) * num_splits(needs.max_context);
    all += std::min(most * rows, kPositionPartialBytes / (int64_t{needs.head_dim} * 4));
  } else if (needs.max_sequences > 1) {
    // Each item of shared pages leaves results of up to kSharedRows query rows.
    all += rows * (int64_t{num_sms_} * (kSharedRows / group) +
                   int64_t{needs.max_sequences} * needs.num_kv_heads);
  }
  int64_t queries = 0;
  if (needs.transforms) {
    const int64_t units = most_units(needs, deterministic_);
    all += 2 * units * rows;  // sinks, stored pages and others apart
    queries = units * group * row_bytes(needs.head_dim);
  }
  return all * row_bytes(needs.head_dim) + queries;
}

int64_t CudaAttention::table_bytes(const WorkspaceNeeds& needs) const {
  const int64_t units = most_units(needs, deterministic_);
  const int64_t pages =
      needs.max_sequences * ((needs.max_context + needs.page_tokens - 1) / needs.page_tokens + 2) +
      needs.max_rows / needs.page_tokens;
  const int64_t workers = int64_t{num_sms_} * variant_limits(needs.head_dim).workers;
  int64_t segments = units + workers;
  int64_t launches = 1;
  if (deterministic_) {
    const int64_t splits = num_splits(needs.max_context);
    const int64_t rows = needs.num_query_heads / needs.num_kv_heads <= 8 ? 8 : 16;
    segments = units * splits;
    launches += segments / (kPositionPartialBytes / (rows * needs.head_dim * 4) - splits);
  }
  int64_t bytes = pages * 4 + segments * int64_t{sizeof(Segment)} +
                  launches * workers * int64_t{sizeof(WorkerStart)} +
                  units * int64_t{sizeof(SplitUnit)} +
                  int64_t{needs.num_layers} * needs.num_kv_heads * int64_t{sizeof(HeadFactors)};
  if (needs.transforms) {
    bytes += int64_t{3} * needs.num_layers * needs.num_kv_heads * needs.head_dim * 4;
    if (deterministic_) bytes += 2 * units * int64_t{sizeof(Segment)};
  }
  if (needs.max_sequences > 1 && !deterministic_) {
    bytes += pages * 4 + num_sms_ * int64_t{sizeof(SharedStart)} +
             (num_sms_ + units) * int64_t{sizeof(SharedItem)} +
             int64_t{needs.max_sequences} * (1 + needs.num_kv_heads) * kSharedRows * 4;
  }
  return bytes + 16 * 128;  // pieces are aligned
}

// Angles of keys before RoPE: kept from step to step.
int64_t CudaAttention::rotation_bytes(const WorkspaceNeeds& needs) {
  if (!needs.pre_rope) return 0;
  return KeyRotations::workspace_bytes(needs.head_dim, needs.page_tokens, needs.max_context);
}

int64_t CudaAttention::workspace_bytes(const WorkspaceNeeds& needs) const {
  if (needs.num_kv_heads == 0) return 0;
  return (partial_bytes(needs) + 255) / 256 * 256 + (table_bytes(needs) + 255) / 256 * 256 +
         rotation_bytes(needs);
}

void CudaAttention::set_workspace(std::byte* memory, const WorkspaceNeeds& needs) {
  cudaFree(owned_partials_);
  owned_partials_ = nullptr;
  view_ = nullptr;
  partials_ = memory;
  partial_bytes_ = memory == nullptr ? 0 : (partial_bytes(needs) + 255) / 256 * 256;
  const int64_t tables = memory == nullptr ? 0 : table_bytes(needs);
  upload_.use(memory == nullptr ? nullptr : memory + partial_bytes_, tables);
  const int64_t rotations = memory == nullptr ? 0 : rotation_bytes(needs);
  rotations_.use(rotations == 0 ? nullptr : memory + partial_bytes_ + (tables + 255) / 256 * 256,
                 rotations);
}

Status CudaAttention::reserve_partials(int64_t bytes, cudaStream_t stream) {
  if (bytes <= partial_bytes_) return {};
  KVANT_TRY(cuda_status(cudaStreamSynchronize(stream), "waiting for partial results in use"));
  cudaFree(owned_partials_);
  owned_partials_ = nullptr;
  partials_ = nullptr;
  partial_bytes_ = 0;
  KVANT_TRY(cuda_status(cudaMalloc(reinterpret_cast<void**>(&owned_partials_), bytes),
                        "allocating partial results"));
  partials_ = owned_partials_;
  partial_bytes_ = bytes;
  return {};
}

}  // namespace kvant::backend::cuda
