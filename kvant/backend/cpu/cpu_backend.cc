#include "kvant/backend/cpu/cpu_backend.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "kvant/backend/cpu/append.h"
#include "kvant/backend/cpu/attention.h"
#include "kvant/backend/cpu/matrix.h"
#include "kvant/backend/host.h"
#include "kvant/base/check.h"

namespace kvant::backend::cpu {
namespace {

// Values below which handing work to another thread costs more than it saves.
constexpr int64_t kParallelValues = 8192;

int64_t rows_per_task(int64_t values_per_row) {
  return std::max<int64_t>(1, kParallelValues / std::max<int64_t>(1, values_per_row));
}

struct WorkspaceParts {
  int64_t attention;
  int64_t linear;
  int64_t rope;
  int64_t moe;
  int64_t total() const { return attention + linear + rope + moe; }
};

WorkspaceParts workspace_parts(const WorkspaceNeeds& needs, int num_threads, const Linear& linear) {
  return {attention_workspace_bytes(needs, num_threads),
          linear.workspace_bytes(needs.max_rows, needs.max_cols),
          RopeTables::workspace_bytes(needs.max_rows, needs.head_dim),
          MoeRunner::workspace_bytes(needs)};
}

}  // namespace

CpuBackend::CpuBackend(const CpuOptions& options)
    : memory_(options.memory_limit),
      pool_(options.num_threads),
      level_(options.level),
      kernels_(kernels(options.level)),
      linear_(pool_, kernels_, wide_kernels(options.level)),
      moe_(pool_, kernels_, linear_) {
  info_.name = "cpu";
  info_.description = std::string(cpu_level_name(level_)) + ", " +
                      std::to_string(pool_.num_threads()) +
                      (pool_.num_threads() == 1 ? " thread" : " threads");
  info_.page_layout = cache::Layout::kCpu;
  const HostMemorySize host = host_memory_size();
  info_.memory_total = host.total;
  info_.memory_free = host.available;
}

template <typename F>
void CpuBackend::for_range(int64_t n, int64_t grain, F&& f) {
  const int64_t pieces = std::min((n + grain - 1) / grain, int64_t{pool_.num_threads()} * 4);
  if (pieces <= 1) {
    if (n > 0) f(int64_t{0}, n);
    return;
  }
  const int64_t step = (n + pieces - 1) / pieces;
  pool_.parallel_for((n + step - 1) / step,
                     [&](int64_t task, int) { f(task * step, std::min(step, n - task * step)); });
}

Status CpuBackend::supports(const formats::CacheFormat& format, int head_dim,
                            int query_heads_per_kv_head) const {
  return attention_supports(format, head_dim, query_heads_per_kv_head);
}

// ---- memory ----

int64_t CpuBackend::workspace_bytes(const WorkspaceNeeds& needs) const {
  return workspace_parts(needs, pool_.num_threads(), linear_).total();
}

Status CpuBackend::reserve_workspace(const WorkspaceNeeds& needs) {
  const WorkspaceParts parts = workspace_parts(needs, pool_.num_threads(), linear_);
  workspace_ = Buffer();  // given back first, so that the peak is the larger of the two
  linear_.set_workspace(nullptr, 0, 0);
  attention_workspace_ = AttentionWorkspace();
  if (parts.total() == 0) return {};
  KVANT_ASSIGN(workspace_, Buffer::create(memory_, parts.total(), MemoryUse::kWorkspace));
  attention_workspace_.data = workspace_.data();
  attention_workspace_.bytes = parts.attention;
  uint8_t* at = workspace_.as<uint8_t>() + parts.attention;
  linear_.set_workspace(at, needs.max_rows, needs.max_cols);
  rope_tables_.set_workspace(at + parts.linear, needs.max_rows, needs.head_dim);
  moe_.set_workspace(at + parts.linear + parts.rope, needs);
  return {};
}

int64_t CpuBackend::matrix_bytes(const MatrixSource& source) const {
  return MatrixLayout::of(source.type, source.rows, source.cols).bytes();
}

Result<std::unique_ptr<Matrix>> CpuBackend::load_matrix(const MatrixSource& source) {
  KVANT_ASSIGN(std::unique_ptr<Matrix> matrix, CpuMatrix::load(source, memory_, pool_));
  return matrix;
}

// ---- dense operators ----

Status CpuBackend::embed(const MatrixSource& table, std::span<const int32_t> ids, float scale,
                         void* out) {
  KVANT_TRY(check_embed(table, ids));
  for_range(static_cast<int64_t>(ids.size()), rows_per_task(table.cols),
            [&](int64_t first, int64_t count) {
              for (int64_t row = first; row < first + count; ++row) {
                float* target = static_cast<float*>(out) + row * table.cols;
                embed_row(table, ids[static_cast<size_t>(row)], target);
                if (scale != 1.0f) kernels_.scale(scale, target, table.cols);
              }
            });
  return {};
}

Status CpuBackend::rms_norm(const RmsNormArgs& args) {
  for_range(args.num_rows, rows_per_task(args.dim), [&](int64_t first, int64_t count) {
    for (int64_t row = first; row < first + count; ++row) {
      kernels_.rms_norm(static_cast<const float*>(args.x) + row * args.dim, args.weight, args.dim,
                        args.epsilon, static_cast<float*>(args.out) + row * args.dim);
    }
  });
  return {};
}

Status CpuBackend::linear(const void* x, int64_t num_rows, std::span<const LinearTarget> targets) {
  linear_.run({static_cast<const float*>(x), nullptr, num_rows}, targets);
  return {};
}

Status CpuBackend::rope(const RopeArgs& args) {
  const float* table = rope_tables_.get(args.rope, args.positions, args.num_rows);
  const int64_t half = args.rope.rotary_dim / 2;
  const int heads = args.num_query_heads + args.num_kv_heads;
  for_range(args.num_rows, rows_per_task(int64_t{heads} * args.head_dim),
            [&](int64_t first, int64_t count) {
              for (int64_t row = first; row < first + count; ++row) {
                const float* cos_sin = table + row * 2 * half;
                float* q = static_cast<float*>(args.q) + row * args.num_query_heads * args.head_dim;
                float* k = static_cast<float*>(args.k) + row * args.num_kv_heads * args.head_dim;
                for (int h = 0; h < args.num_query_heads; ++h) {
                  kernels_.rope(q + h * args.head_dim, cos_sin, half);
                }
                for (int h = 0; h < args.num_kv_heads; ++h) {
                  kernels_.rope(k + h * args.head_dim, cos_sin, half);
                }
              }
            });
  return {};
}

Status CpuBackend::gate(GateKind kind, const void* gate, const void* up, void* out,
                        int64_t num_values) {
  const auto activate = kind == GateKind::kSilu ? kernels_.silu_gate : kernels_.gelu_gate;
  for_range(num_values, kParallelValues, [&](int64_t first, int64_t count) {
    activate(static_cast<const float*>(gate) + first, static_cast<const float*>(up) + first,
             static_cast<float*>(out) + first, count);
  });
  return {};
}

Status CpuBackend::add(const void* x, void* y, int64_t num_values) {
  for_range(num_values, 4 * kParallelValues, [&](int64_t first, int64_t count) {
    kernels_.add(static_cast<const float*>(x) + first, static_cast<float*>(y) + first, count);
  });
  return {};
}

Status CpuBackend::moe(const MoeArgs& args) {
  moe_.run(args);
  return {};
}

Status CpuBackend::gather_rows(const void* x, std::span<const int64_t> rows, int dim, void* out) {
  for_range(static_cast<int64_t>(rows.size()), 4 * rows_per_task(dim),
            [&](int64_t first, int64_t count) {
              for (int64_t i = first; i < first + count; ++i) {
                std::memcpy(static_cast<float*>(out) + i * dim,
                            static_cast<const float*>(x) + rows[static_cast<size_t>(i)] * dim,
                            sizeof(float) * static_cast<size_t>(dim));
              }
            });
  return {};
}

Status CpuBackend::greatest_in_rows(const void* x, int64_t num_rows, int64_t num_cols,
                                    RowMaximum* maxima) {
  for_range(num_rows, 4 * rows_per_task(num_cols), [&](int64_t first, int64_t count) {
    const float* from = static_cast<const float*>(x) + first * num_cols;
    static_cast<void>(Backend::greatest_in_rows(from, count, num_cols, maxima + first));
  });
  return {};
}

// ---- cache operators ----

Status CpuBackend::append(const AppendArgs& args) {
  KVANT_ASSIGN(const formats::EncodeStats stats,
               cpu::append(args, pool_, level_, attention_workspace_));
  encode_stats_ += stats;
  return {};
}

Status CpuBackend::attention(const AttentionArgs& args) {
  return cpu::attention(args, pool_, level_, attention_workspace_);
}

// ---- host exchange ----

Status CpuBackend::download_f32(const void* activations, int64_t num_values, float* host) {
  std::memcpy(host, activations, sizeof(float) * static_cast<size_t>(num_values));
  return {};
}

Status CpuBackend::upload_f32(const float* host, int64_t num_values, void* activations) {
  std::memcpy(activations, host, sizeof(float) * static_cast<size_t>(num_values));
  return {};
}

}  // namespace kvant::backend::cpu
