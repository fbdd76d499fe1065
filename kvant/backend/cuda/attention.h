// Attention of the CUDA backend: decode kernels on stored pages (docs/kernels/cuda-decode.md).
//
// For steps of few new tokens per sequence (decode, speculative decoding); longer chunks work too,
// a tile of query rows at a time, and belong to prefill attention. One thread at a time.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "kvant/backend/backend.h"
#include "kvant/backend/cuda/decode/combine.h"
#include "kvant/backend/cuda/decode/kernel_params.h"
#include "kvant/backend/cuda/decode/key_rotations.h"
#include "kvant/backend/cuda/decode/transform_queries.h"
#include "kvant/backend/cuda/decode/variants.h"
#include "kvant/backend/cuda/shared/kernel_params.h"
#include "kvant/backend/cuda/upload.h"

namespace kvant::backend::cuda {

// New tokens of a sequence in a step that is planned for as decoding; longer chunks work too.
inline constexpr int kMostDecodeTokens = 8;

class CudaAttention {
 public:
  // kDeviceError without a device.
  static Result<std::unique_ptr<CudaAttention>> create();
  ~CudaAttention();

  // kUnsupported names what decode kernels lack.
  Status supports(const formats::CacheFormat& format, int head_dim, int group) const;
  // The same of a layer in a step: the size of its pages and RoPE of keys stored before it, too.
  Status supports(const AttentionArgs& args) const;

  // Device memory for partial results and tables of steps within `needs`: what set_workspace() is
  // given. Steps beyond them, or without a workspace, allocate what they lack.
  int64_t workspace_bytes(const WorkspaceNeeds& needs) const;
  // Between steps; the owner of `memory` keeps it. Null takes it away.
  void set_workspace(std::byte* memory, const WorkspaceNeeds& needs);
  bool outgrew_workspace() const {
    return owned_partials_ != nullptr || upload_.outgrew() || rotations_.outgrew();
  }

  // Makes the plan of a step and sends it to the device. Needed once per group, step, format and
  // setting of RoPE (+prerope): run() does it for a group's first layer and where these differ.
  Status prepare(const AttentionArgs& args, cudaStream_t stream);
  // Enqueues the kernels of one layer; may be captured into a graph after prepare().
  Status launch(const AttentionArgs& args, cudaStream_t stream);
  Status run(const AttentionArgs& args, cudaStream_t stream);

  // Whether pages that sequences share are read once for all of them, from the next prepare() on.
  // `blocks`: multiprocessors for such pages, to measure with; 0: what the costs in shared/plan.h
  // say.
  void set_sharing(PageSharing sharing, int blocks = 0) {
    sharing_ = sharing;
    shared_blocks_ = blocks;
  }
  // Results of a query depend on its position, its query and the pages it reads, to the bit, from
  // the next prepare() on: not on what else is in the step, nor on how many of its neighbours.
  void set_deterministic(bool deterministic) { deterministic_ = deterministic; }
  // Sequences of the prepared step whose first pages are read together with others'.
  int num_sharing_sequences() const { return num_sharing_; }

  // Natural logarithms of the softmax denominators of the next launches, device memory
  // [rows][num_query_heads]; null: not written.
  void set_lse(float* lse) { lse_ = lse; }

 private:
  explicit CudaAttention(int num_sms) : num_sms_(num_sms) {}
  Status configure(const AttentionArgs& args, int group_layer);
  Result<const DecodeVariant*> choose_variant(const AttentionArgs& args) const;
  Status prepare_rotations(const AttentionArgs& args, cudaStream_t stream);
  Status prepare_shared(const AttentionArgs& args);
  Status launch_shared(const AttentionArgs& args, const DecodeParams& decode, cudaStream_t stream);
  Status launch_part(const PlannedLaunch& part, const AttentionArgs& args,
                     const DecodeParams& of_step, cudaStream_t stream);
  // Partial results of a launch where every split leaves one: a few thousand splits.
  static constexpr int64_t kPositionPartialBytes = int64_t{48} << 20;
  static int64_t row_bytes(int head_dim);  // sums and state of a query row
  int64_t partial_bytes(const WorkspaceNeeds& needs) const;
  int64_t table_bytes(const WorkspaceNeeds& needs) const;
  static int64_t rotation_bytes(const WorkspaceNeeds& needs);
  DecodePlan make_plan(const cache::GroupView& view, PlanShape& shape);
  Status reserve_partials(int64_t bytes, cudaStream_t stream);
  int64_t add_terms(const cache::GroupView& view, bool keys,
                    const float* formats::SideParams::*term, std::vector<float>& values);
  const float* terms_of(int64_t offset, const AttentionArgs& args) const;
  Status launch_transform(const AttentionArgs& args, const DecodeParams& params,
                          cudaStream_t stream) const;
  DecodeParams params_of(const AttentionArgs& args) const;

  const int num_sms_;
  float* lse_ = nullptr;

  // Of the prepared step.
  const cache::GroupView* view_ = nullptr;
  formats::SideFormat k_format_, v_format_;
  attention::RopeParams rope_;  // where keys are stored before it
  const DecodeVariant* variant_ = nullptr;
  DecodeParams params_ = {};
  int blocks_of_sm_ = 0;
  int num_threads_ = 0;  // of a block
  int num_blocks_ = 0;
  int num_partials_ = 0;
  std::vector<PlannedLaunch> launches_;
  int smem_bytes_ = 0;
  int64_t num_rows_ = 0;  // of the step
  // Vectors of the plan, [layer][num_kv_heads][head_dim]: places in upload_, -1 without.
  std::vector<float> smooth_, key_bias_, value_bias_;
  int64_t smooth_offset_ = -1, key_bias_offset_ = -1, value_bias_offset_ = -1;
  std::vector<HeadFactors> factors_;  // [layers][num_kv_heads]
  Upload upload_;
  int64_t factors_offset_ = 0;
  KeyRotations rotations_;

  bool deterministic_ = false;
  PageSharing sharing_ = PageSharing::kWherePays;
  int shared_blocks_ = 0;
  int num_sharing_ = 0;
  SharedPlan shared_;  // empty: nothing is shared
  const SharedVariant* shared_variant_ = nullptr;
  SharedParams shared_params_ = {};
  int shared_smem_bytes_ = 0;
  uint32_t shared_kind_ = 0;  // of shared pages

  // Sums, states, then transformed queries and their products with the bias; owned_partials_ or of
  // the workspace.
  std::byte* partials_ = nullptr;
  float* stored_q_ = nullptr;
  float* q_bias_ = nullptr;
  std::byte* owned_partials_ = nullptr;
  int64_t partial_bytes_ = 0;
};

}  // namespace kvant::backend::cuda
