#include "kvant/backend/reference/reference_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "kvant/attention/reference.h"
#include "kvant/backend/host.h"
#include "kvant/base/check.h"
#include "kvant/cache/scalar_append.h"

namespace kvant::backend::reference {
namespace {

class ReferenceMatrix final : public Matrix {
 public:
  ReferenceMatrix(int64_t rows, int64_t cols, Buffer values)
      : rows_(rows), cols_(cols), values_(std::move(values)) {}
  int64_t rows() const override { return rows_; }
  int64_t cols() const override { return cols_; }
  int64_t memory_bytes() const override { return values_.bytes(); }
  float* row(int64_t index) const { return values_.as<float>() + index * cols_; }

 private:
  int64_t rows_;
  int64_t cols_;
  Buffer values_;
};

// Sixteen interleaved sums, so that the compiler can use vector registers; the order is fixed.
double dot(const float* a, const float* b, int64_t n) {
  constexpr int kSums = 16;
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int j = 0; j < kSums; ++j) {
      sums[j] += static_cast<double>(a[i + j]) * static_cast<double>(b[i + j]);
    }
  }
  for (; i < n; ++i) sums[0] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  double sum = 0.0;
  for (double part : sums) sum += part;
  return sum;
}

double activate(GateKind kind, double x) {
  if (kind == GateKind::kSilu) return x / (1.0 + std::exp(-x));
  constexpr double kSqrt2OverPi = 0.79788456080286535588;
  return 0.5 * x * (1.0 + std::tanh(kSqrt2OverPi * (x + 0.044715 * x * x * x)));
}

void multiply_row(const ReferenceMatrix& matrix, const float* x, float* out) {
  for (int64_t i = 0; i < matrix.rows(); ++i) {
    out[i] = static_cast<float>(dot(matrix.row(i), x, matrix.cols()));
  }
}

void rotate_head(const attention::RopeParams& rope, int64_t position, float* x) {
  const int half = rope.rotary_dim / 2;
  for (int i = 0; i < half; ++i) {
    double frequency = std::pow(static_cast<double>(rope.base), -2.0 * i / rope.rotary_dim) *
                       static_cast<double>(rope.position_scale);
    if (rope.frequency_factors != nullptr) {
      frequency /= static_cast<double>(rope.frequency_factors[i]);
    }
    const double angle = static_cast<double>(position) * frequency;
    const double c = std::cos(angle) * static_cast<double>(rope.attention_factor);
    const double s = std::sin(angle) * static_cast<double>(rope.attention_factor);
    const double a = static_cast<double>(x[i]);
    const double b = static_cast<double>(x[i + half]);
    x[i] = static_cast<float>(a * c - b * s);
    x[i + half] = static_cast<float>(a * s + b * c);
  }
}

const ReferenceMatrix& as_reference(const Matrix* matrix) {
  return static_cast<const ReferenceMatrix&>(*matrix);
}

// One token's mixture: the router's choice, then each chosen expert in ascending order of its
// index.
void mix_row(const MoeArgs& args, const float* x, float* out) {
  const int64_t dim = args.router->cols();
  const size_t num_experts = static_cast<size_t>(args.num_experts);
  std::vector<double> probability(num_experts);
  for (size_t e = 0; e < num_experts; ++e) {
    probability[e] = dot(as_reference(args.router).row(static_cast<int64_t>(e)), x, dim);
  }
  const double max = *std::max_element(probability.begin(), probability.end());
  double sum = 0.0;
  for (double& p : probability) sum += p = std::exp(p - max);
  std::vector<size_t> order(num_experts);
  for (size_t e = 0; e < num_experts; ++e) order[e] = e;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return probability[a] > probability[b]; });
  order.resize(static_cast<size_t>(args.num_experts_used));
  double chosen_sum = 0.0;
  for (size_t e : order) chosen_sum += probability[e];
  std::sort(order.begin(), order.end());

  std::vector<double> total(static_cast<size_t>(dim));
  for (size_t e : order) {
    const int64_t expert_dim = args.gate_proj[e]->rows();
    std::vector<float> gate(static_cast<size_t>(expert_dim));
    std::vector<float> up(gate.size());
    std::vector<float> down(total.size());
    multiply_row(as_reference(args.gate_proj[e]), x, gate.data());
    multiply_row(as_reference(args.up_proj[e]), x, up.data());
    for (size_t i = 0; i < gate.size(); ++i) {
      gate[i] = static_cast<float>(activate(args.gate, static_cast<double>(gate[i])) *
                                   static_cast<double>(up[i]));
    }
    multiply_row(as_reference(args.down_proj[e]), gate.data(), down.data());
    const double weight = probability[e] / (args.normalize_weights ? chosen_sum : sum);
    for (size_t i = 0; i < total.size(); ++i) total[i] += weight * static_cast<double>(down[i]);
  }
  for (size_t i = 0; i < total.size(); ++i) out[i] = static_cast<float>(total[i]);
}

}  // namespace

ReferenceBackend::ReferenceBackend(int num_threads, int64_t memory_limit)
    : memory_(memory_limit), pool_(num_threads) {
  info_.name = "reference";
  info_.description = "plain loops, sums in double, " + std::to_string(pool_.num_threads()) +
                      (pool_.num_threads() == 1 ? " thread" : " threads");
  info_.page_layout = cache::Layout::kPlanar;
  const HostMemorySize host = host_memory_size();
  info_.memory_total = host.total;
  info_.memory_free = host.available;
}

Status ReferenceBackend::supports(const formats::CacheFormat&, int, int) const {
  return {};
}

int64_t ReferenceBackend::matrix_bytes(const MatrixSource& source) const {
  return source.rows * source.cols * 4;
}

Result<std::unique_ptr<Matrix>> ReferenceBackend::load_matrix(const MatrixSource& source) {
  KVANT_TRY(check_matrix_source(source));
  KVANT_ASSIGN(Buffer values, Buffer::create(memory_, matrix_bytes(source), MemoryUse::kWeights));
  auto matrix = std::make_unique<ReferenceMatrix>(source.rows, source.cols, std::move(values));
  pool_.parallel_for(source.rows,
                     [&](int64_t row, int) { embed_row(source, row, matrix->row(row)); });
  return std::unique_ptr<Matrix>(std::move(matrix));
}

// ---- dense operators ----

Status ReferenceBackend::embed(const MatrixSource& table, std::span<const int32_t> ids, float scale,
                               void* out) {
  KVANT_TRY(check_embed(table, ids));
  for (size_t i = 0; i < ids.size(); ++i) {
    float* row = static_cast<float*>(out) + static_cast<int64_t>(i) * table.cols;
    embed_row(table, ids[i], row);
    for (int64_t j = 0; j < table.cols; ++j) row[j] *= scale;
  }
  return {};
}

Status ReferenceBackend::rms_norm(const RmsNormArgs& args) {
  pool_.parallel_for(args.num_rows, [&](int64_t row, int) {
    const float* x = static_cast<const float*>(args.x) + row * args.dim;
    float* out = static_cast<float*>(args.out) + row * args.dim;
    const double mean = dot(x, x, args.dim) / args.dim;
    const double factor = 1.0 / std::sqrt(mean + static_cast<double>(args.epsilon));
    for (int i = 0; i < args.dim; ++i) {
      out[i] = static_cast<float>(static_cast<double>(x[i]) * factor *
                                  static_cast<double>(args.weight[i]));
    }
  });
  return {};
}

Status ReferenceBackend::linear(const void* x, int64_t num_rows,
                                std::span<const LinearTarget> targets) {
  // Threads share out rows of the matrix: each output value is one sum, whoever computes it.
  constexpr int64_t kRowsPerTask = 32;
  for (const LinearTarget& target : targets) {
    const ReferenceMatrix& matrix = as_reference(target.matrix);
    const int64_t cols = matrix.cols();
    const int64_t tasks = (matrix.rows() + kRowsPerTask - 1) / kRowsPerTask;
    pool_.parallel_for(tasks, [&](int64_t task, int) {
      const int64_t end = std::min((task + 1) * kRowsPerTask, matrix.rows());
      for (int64_t row = 0; row < num_rows; ++row) {
        float* out = static_cast<float*>(target.out) + row * matrix.rows();
        for (int64_t i = task * kRowsPerTask; i < end; ++i) {
          double sum = dot(matrix.row(i), static_cast<const float*>(x) + row * cols, cols);
          if (target.bias != nullptr) sum += static_cast<double>(target.bias[i]);
          if (target.accumulate) sum += static_cast<double>(out[i]);
          out[i] = static_cast<float>(sum);
        }
      }
    });
  }
  return {};
}

Status ReferenceBackend::rope(const RopeArgs& args) {
  pool_.parallel_for(args.num_rows, [&](int64_t row, int) {
    float* q = static_cast<float*>(args.q) + row * args.num_query_heads * args.head_dim;
    float* k = static_cast<float*>(args.k) + row * args.num_kv_heads * args.head_dim;
    for (int h = 0; h < args.num_query_heads; ++h) {
      rotate_head(args.rope, args.positions[row], q + h * args.head_dim);
    }
    for (int h = 0; h < args.num_kv_heads; ++h) {
      rotate_head(args.rope, args.positions[row], k + h * args.head_dim);
    }
  });
  return {};
}

Status ReferenceBackend::gate(GateKind kind, const void* gate, const void* up, void* out,
                              int64_t num_values) {
  for (int64_t i = 0; i < num_values; ++i) {
    static_cast<float*>(out)[i] =
        static_cast<float>(activate(kind, static_cast<double>(static_cast<const float*>(gate)[i])) *
                           static_cast<double>(static_cast<const float*>(up)[i]));
  }
  return {};
}

Status ReferenceBackend::add(const void* x, void* y, int64_t num_values) {
  for (int64_t i = 0; i < num_values; ++i) {
    static_cast<float*>(y)[i] += static_cast<const float*>(x)[i];
  }
  return {};
}

Status ReferenceBackend::moe(const MoeArgs& args) {
  KVANT_CHECK(args.x != args.out, "the experts' sum cannot replace their input");
  const int64_t dim = args.router->cols();
  pool_.parallel_for(args.num_rows, [&](int64_t row, int) {
    mix_row(args, static_cast<const float*>(args.x) + row * dim,
            static_cast<float*>(args.out) + row * dim);
  });
  return {};
}

Status ReferenceBackend::gather_rows(const void* x, std::span<const int64_t> rows, int dim,
                                     void* out) {
  for (size_t i = 0; i < rows.size(); ++i) {
    std::memcpy(static_cast<float*>(out) + static_cast<int64_t>(i) * dim,
                static_cast<const float*>(x) + rows[i] * dim,
                sizeof(float) * static_cast<size_t>(dim));
  }
  return {};
}

// ---- cache operators ----

Status ReferenceBackend::append(const AppendArgs& args) {
  KVANT_ASSIGN(const formats::EncodeStats stats,
               cache::scalar_append(*args.view, args.group_layer, static_cast<const float*>(args.k),
                                    static_cast<const float*>(args.v)));
  encode_stats_ += stats;
  return {};
}

Status ReferenceBackend::attention(const AttentionArgs& args) {
  const int num_kv_heads = args.view->num_kv_heads;
  int64_t num_rows = 0;
  for (const cache::SequenceView& sequence : args.view->sequences) {
    num_rows = std::max<int64_t>(num_rows, sequence.first_row + sequence.num_new_tokens);
  }
  const int64_t num_values = num_rows * args.params.num_query_heads * args.view->head_dim;
  std::vector<double> exact(static_cast<size_t>(num_values));
  std::vector<Status> statuses(static_cast<size_t>(num_kv_heads));
  pool_.parallel_for(num_kv_heads, [&](int64_t head, int) {
    attention::ReferenceArgs reference;
    reference.view = args.view;
    reference.group_layer = args.group_layer;
    reference.params = args.params;
    reference.q = static_cast<const float*>(args.q);
    reference.out = exact.data();
    reference.kv_head = static_cast<int>(head);
    statuses[static_cast<size_t>(head)] = attention::reference_attention(reference);
  });
  for (Status& status : statuses) KVANT_TRY(std::move(status));
  float* out = static_cast<float*>(args.out);
  for (int64_t i = 0; i < num_values; ++i) {
    out[i] = static_cast<float>(exact[static_cast<size_t>(i)]);
  }
  return {};
}

// ---- host exchange ----

Status ReferenceBackend::download_f32(const void* activations, int64_t num_values, float* host) {
  std::memcpy(host, activations, sizeof(float) * static_cast<size_t>(num_values));
  return {};
}

Status ReferenceBackend::upload_f32(const float* host, int64_t num_values, void* activations) {
  std::memcpy(activations, host, sizeof(float) * static_cast<size_t>(num_values));
  return {};
}

}  // namespace kvant::backend::reference
