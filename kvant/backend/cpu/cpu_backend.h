// The CPU backend: every operator of backend.h over a thread pool and one SIMD level.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include "kvant/backend/backend.h"
#include "kvant/backend/cpu/attention_workspace.h"
#include "kvant/backend/cpu/kernels.h"
#include "kvant/backend/cpu/linear.h"
#include "kvant/backend/cpu/moe.h"
#include "kvant/backend/cpu/rope_table.h"
#include "kvant/base/cpu_level.h"
#include "kvant/base/memory.h"
#include "kvant/base/thread_pool.h"

namespace kvant::backend::cpu {

struct CpuOptions {
  int num_threads = 0;       // 0: one per processor
  int64_t memory_limit = 0;  // bytes; 0: none
  CpuLevel level = CpuLevel::kScalar;
};

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const CpuOptions& options);

  const BackendInfo& info() const override { return info_; }
  MemoryResource& memory() override { return memory_; }
  CpuLevel level() const { return level_; }
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
  Status rope(const RopeArgs& args) override;
  Status gate(GateKind kind, const void* gate, const void* up, void* out,
              int64_t num_values) override;
  Status add(const void* x, void* y, int64_t num_values) override;
  Status moe(const MoeArgs& args) override;
  Status gather_rows(const void* x, std::span<const int64_t> rows, int dim, void* out) override;

  Status greatest_in_rows(const void* x, int64_t num_rows, int64_t num_cols,
                          RowMaximum* maxima) override;

  Status append(const AppendArgs& args) override;
  Result<formats::EncodeStats> take_encode_stats() override {
    return std::exchange(encode_stats_, {});
  }
  Status attention(const AttentionArgs& args) override;

  Status download_f32(const void* activations, int64_t num_values, float* host) override;
  Status upload_f32(const float* host, int64_t num_values, void* activations) override;
  Status synchronize() override { return {}; }

 private:
  // f(first, count) over [0, n) in pieces of at least `grain`, on the pool if that pays.
  template <typename F>
  void for_range(int64_t n, int64_t grain, F&& f);

  HostMemory memory_;  // first: everything below may hold buffers of it
  ThreadPool pool_;
  CpuLevel level_;
  const Kernels& kernels_;
  Linear linear_;
  MoeRunner moe_;
  RopeTables rope_tables_;
  Buffer workspace_;
  AttentionWorkspace attention_workspace_;  // part of workspace_
  formats::EncodeStats encode_stats_;       // of appends since it was taken
  BackendInfo info_;
};

}  // namespace kvant::backend::cpu
