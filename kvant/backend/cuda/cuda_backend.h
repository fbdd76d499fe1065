// The CUDA backend: every operator of backend.h on one GPU, in the order of one stream.
// Activations are fp32. Made for the Hopper generation; others from compute capability 8.0 on run
// the kernels that do not need it (device.h).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kvant/backend/backend.h"
#include "kvant/backend/cuda/append.h"
#include "kvant/backend/cuda/attention.h"
#include "kvant/backend/cuda/dense/linear.h"
#include "kvant/backend/cuda/dense/moe.h"
#include "kvant/backend/cuda/dense/rope_tables.h"
#include "kvant/backend/cuda/device_memory.h"
#include "kvant/backend/cuda/kept_graphs.h"
#include "kvant/backend/cuda/prefill/prefill_attention.h"
#include "kvant/base/memory.h"

namespace kvant::backend::cuda {

class CudaBackend final : public Backend {
 public:
  // kUnsupported without a device that the kernels run on, with what was found.
  static Result<std::unique_ptr<Backend>> create(const BackendOptions& options);
  ~CudaBackend() override;

  const BackendInfo& info() const override { return info_; }
  MemoryResource& memory() override { return *memory_; }
  Status supports(const formats::CacheFormat& format, int head_dim,
                  int query_heads_per_kv_head) const override;

  int64_t workspace_bytes(const WorkspaceNeeds& needs) const override;
  Status reserve_workspace(const WorkspaceNeeds& needs) override;
  int64_t matrix_bytes(const MatrixSource& source) const override;
  Result<std::unique_ptr<Matrix>> load_matrix(const MatrixSource& source) override;

  Status embed(const MatrixSource& table, std::span<const int32_t> ids, float scale,
               void* out) override;
  Status rms_norm(const RmsNormArgs& args) override;
  Status linear(const void* x, int64_t num_rows, std::span<const LinearTarget> targets) override;
  Status norm_linear(const RmsNormArgs& norm, std::span<const LinearTarget> targets) override;
  Status norm_gated(const GatedArgs& args) override;
  Status rope(const RopeArgs& args) override;
  Status gate(GateKind kind, const void* gate, const void* up, void* out,
              int64_t num_values) override;
  Status add(const void* x, void* y, int64_t num_values) override;
  Status moe(const MoeArgs& args) override;
  Status gather_rows(const void* x, std::span<const int64_t> rows, int dim, void* out) override;
  Status greatest_in_rows(const void* x, int64_t num_rows, int64_t num_cols,
                          RowMaximum* maxima) override;
  Status answer_queries(const void* x, int64_t num_rows, int64_t num_cols, const RowQuery* queries,
                        const RowAnswers& answers) override;
  Status repeat(const RepeatKey& key, const std::function<Status()>& enqueue) override;

  Status append(const AppendArgs& args) override;
  Status rope_append(const RopeArgs& rope, const AppendArgs& args) override;
  Result<formats::EncodeStats> take_encode_stats() override;
  Status attention(const AttentionArgs& args) override;

  Status download_f32(const void* activations, int64_t num_values, float* host) override;
  Status upload_f32(const float* host, int64_t num_values, void* activations) override;
  Status synchronize() override;

 private:
  CudaBackend() = default;
  Status start(const BackendOptions& options);
  void update_free_memory();
  // Of the workspace, in this order; the last is memory that the driver takes for kept graphs.
  struct WorkspaceParts {
    int64_t linear;
    int64_t rope;
    int64_t moe;
    int64_t rows;
    int64_t decode;
    int64_t prefill;
    int64_t graphs;
    int64_t allocated() const { return linear + rope + moe + rows + decode + prefill; }
    int64_t total() const { return allocated() + graphs; }
  };
  WorkspaceParts parts_of(const WorkspaceNeeds& needs) const;
  int64_t most_graphs(const WorkspaceNeeds& needs) const;
  Result<const float*> rope_table_for(const RopeArgs& args);  // of the step, made once

  cudaStream_t stream_ = nullptr;
  int num_sms_ = 0;
  int64_t free_at_start_ = 0;
  int64_t prefill_workspace_ = 0;  // BackendOptions
  ImageType images_ = ImageType::kF16;
  bool deterministic_ = false;  // likewise
  // Before what lies in them.
  std::unique_ptr<DeviceMemory> memory_;
  std::unique_ptr<DeviceMemory> own_memory_;  // of a size that no model changes
  UploadRing ring_;
  Buffer staging_;  // file bytes on their way, in own_memory_
  Buffer workspace_;
  CudaLinear linear_;
  CudaMoe moe_;
  RopeTables rope_tables_;
  KeptGraphs graphs_;
  int64_t graph_bytes_ = 0;                         // counted in memory_
  Repetition repetition_ = Repetition::kWherePays;  // BackendOptions
  std::unique_ptr<CacheAppend> append_;
  std::unique_ptr<CudaAttention> decode_;
  std::unique_ptr<PrefillAttention> prefill_;  // lies in workspace_
  bool prefilled_ = false;                     // since take_encode_stats()
  int64_t* row_indices_ = nullptr;             // [max_rows], part of workspace_
  int64_t max_rows_ = 0;
  BackendInfo info_;
};

}  // namespace kvant::backend::cuda
