// The oracle: every operator as plain loops over exact fp32 weights, with sums in double.
//
// Weights are dequantised at load (4 bytes a value). Threads share out rows only, so results depend
// on nothing else. Slow on purpose; it is also the exact base that logits are compared with.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include "kvant/backend/backend.h"
#include "kvant/base/memory.h"
#include "kvant/base/thread_pool.h"

namespace kvant::backend::reference {

class ReferenceBackend final : public Backend {
 public:
  ReferenceBackend(int num_threads, int64_t memory_limit);

  const BackendInfo& info() const override { return info_; }
  MemoryResource& memory() override { return memory_; }
  Status supports(const formats::CacheFormat& format, int head_dim,
                  int query_heads_per_kv_head) const override;

  int64_t workspace_bytes(const WorkspaceNeeds&) const override { return 0; }
  Status reserve_workspace(const WorkspaceNeeds&) override { return {}; }
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

  Status append(const AppendArgs& args) override;
  Result<formats::EncodeStats> take_encode_stats() override {
    return std::exchange(encode_stats_, {});
  }
  Status attention(const AttentionArgs& args) override;

  Status download_f32(const void* activations, int64_t num_values, float* host) override;
  Status upload_f32(const float* host, int64_t num_values, void* activations) override;
  Status synchronize() override { return {}; }

 private:
  HostMemory memory_;
  ThreadPool pool_;
  formats::EncodeStats encode_stats_;  // of appends since it was taken
  BackendInfo info_;
};

}  // namespace kvant::backend::reference
