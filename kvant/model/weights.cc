#include "kvant/model/weights.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "kvant/base/check.h"

namespace kvant::model {
namespace {

using backend::MatrixSource;

// Which order a matrix's rows have in the file.
enum class Rows { kPlain, kQuery, kKey };

// Walks over all weights of a model in loading order. Slots are null when only planning.
class WeightVisitor {
 public:
  virtual ~WeightVisitor() = default;
  virtual Status table(const std::string& name, int64_t rows, int64_t cols, MatrixSource& slot) = 0;
  virtual Status matrix(const std::string& name, int64_t rows, int64_t cols, Rows order,
                        MatrixPtr& slot) = 0;
  virtual Status experts(const std::string& name, int64_t rows, int64_t cols,
                         std::vector<MatrixPtr>& slots) = 0;
  virtual Status vector(const std::string& name, int64_t size, Rows order, const float*& slot) = 0;
};

Status visit_attention(const ModelConfig& config, const std::string& prefix, LayerWeights& layer,
                       WeightVisitor& visitor) {
  const int64_t dim = config.dim;
  const int64_t q_rows = static_cast<int64_t>(config.num_query_heads) * config.head_dim;
  const int64_t kv_rows = static_cast<int64_t>(config.num_kv_heads) * config.head_dim;
  KVANT_TRY(visitor.vector(prefix + "attn_norm.weight", dim, Rows::kPlain, layer.attention_norm));
  KVANT_TRY(visitor.matrix(prefix + "attn_q.weight", q_rows, dim, Rows::kQuery, layer.q));
  KVANT_TRY(visitor.matrix(prefix + "attn_k.weight", kv_rows, dim, Rows::kKey, layer.k));
  KVANT_TRY(visitor.matrix(prefix + "attn_v.weight", kv_rows, dim, Rows::kPlain, layer.v));
  KVANT_TRY(visitor.matrix(prefix + "attn_output.weight", dim, q_rows, Rows::kPlain,
                           layer.attention_out));
  if (config.qkv_bias) {
    KVANT_TRY(visitor.vector(prefix + "attn_q.bias", q_rows, Rows::kQuery, layer.q_bias));
    KVANT_TRY(visitor.vector(prefix + "attn_k.bias", kv_rows, Rows::kKey, layer.k_bias));
    KVANT_TRY(visitor.vector(prefix + "attn_v.bias", kv_rows, Rows::kPlain, layer.v_bias));
  }
  if (config.qk_norm) {
    const int64_t head_dim = config.head_dim;
    KVANT_TRY(visitor.vector(prefix + "attn_q_norm.weight", head_dim, Rows::kPlain, layer.q_norm));
    KVANT_TRY(visitor.vector(prefix + "attn_k_norm.weight", head_dim, Rows::kPlain, layer.k_norm));
  }
  if (config.post_norms) {
    KVANT_TRY(visitor.vector(prefix + "post_attention_norm.weight", dim, Rows::kPlain,
                             layer.post_attention_norm));
  }
  return {};
}

Status visit_ffn(const ModelConfig& config, const std::string& prefix, LayerWeights& layer,
                 WeightVisitor& visitor) {
  const int64_t dim = config.dim;
  KVANT_TRY(visitor.vector(prefix + "ffn_norm.weight", dim, Rows::kPlain, layer.ffn_norm));
  if (config.num_experts > 0) {
    const int64_t width = config.expert_dim;
    KVANT_TRY(visitor.matrix(prefix + "ffn_gate_inp.weight", config.num_experts, dim, Rows::kPlain,
                             layer.router));
    KVANT_TRY(visitor.experts(prefix + "ffn_gate_exps.weight", width, dim, layer.expert_gate));
    KVANT_TRY(visitor.experts(prefix + "ffn_up_exps.weight", width, dim, layer.expert_up));
    KVANT_TRY(visitor.experts(prefix + "ffn_down_exps.weight", dim, width, layer.expert_down));
  } else {
    const int64_t width = config.ffn_dim;
    KVANT_TRY(visitor.matrix(prefix + "ffn_gate.weight", width, dim, Rows::kPlain, layer.gate));
    KVANT_TRY(visitor.matrix(prefix + "ffn_up.weight", width, dim, Rows::kPlain, layer.up));
    KVANT_TRY(visitor.matrix(prefix + "ffn_down.weight", dim, width, Rows::kPlain, layer.down));
  }
  if (config.post_norms) {
    KVANT_TRY(
        visitor.vector(prefix + "post_ffw_norm.weight", dim, Rows::kPlain, layer.post_ffn_norm));
  }
  return {};
}

Status visit_weights(const ModelConfig& config, ModelWeights& weights, WeightVisitor& visitor) {
  KVANT_TRY(visitor.table("token_embd.weight", config.vocab_size, config.dim, weights.embedding));
  weights.layers.resize(config.num_layers);
  for (int i = 0; i < config.num_layers; ++i) {
    const std::string prefix = fmt::format("blk.{}.", i);
    KVANT_TRY(visit_attention(config, prefix, weights.layers[i], visitor));
    KVANT_TRY(visit_ffn(config, prefix, weights.layers[i], visitor));
  }
  KVANT_TRY(visitor.vector("output_norm.weight", config.dim, Rows::kPlain, weights.output_norm));
  return visitor.matrix(config.tied_head ? "token_embd.weight" : "output.weight", config.vocab_size,
                        config.dim, Rows::kPlain, weights.head);
}

// Row of the file for each row in the order of Hugging Face checkpoints: within a head, channel
// i + j * rotary_dim / 2 is the file's 2 * i + j. Empty if the file has that order.
std::vector<int32_t> row_order(const ModelConfig& config, Rows rows) {
  if (rows == Rows::kPlain || !config.adjacent_rope_rows) return {};
  const int num_heads = rows == Rows::kQuery ? config.num_query_heads : config.num_kv_heads;
  const int half = config.rope.rotary_dim / 2;
  std::vector<int32_t> order(static_cast<size_t>(num_heads) * config.head_dim);
  for (int head = 0; head < num_heads; ++head) {
    int32_t* of_head = order.data() + static_cast<size_t>(head) * config.head_dim;
    const int32_t first = head * config.head_dim;
    for (int i = 0; i < config.head_dim; ++i) of_head[i] = first + i;
    for (int i = 0; i < half; ++i) {
      of_head[i] = first + 2 * i;
      of_head[half + i] = first + 2 * i + 1;
    }
  }
  return order;
}

// Floats are padded so that each vector starts on a cache line.
int64_t padded_floats(int64_t size) {
  return (size + 15) / 16 * 16;
}

int64_t rope_factor_floats(const ModelConfig& config) {
  return padded_floats(static_cast<int64_t>(rope_table(config, false).factors.size()));
}

// Adds up what loading will take.
class Planner final : public WeightVisitor {
 public:
  Planner(const ModelSource& source, const backend::Backend& backend)
      : source_(source), backend_(backend) {}

  Status table(const std::string& name, int64_t rows, int64_t cols, MatrixSource&) override {
    KVANT_ASSIGN(const MatrixSource described, source_.describe(name, rows, cols));
    const int64_t made = made_bytes(described);
    bytes.matrices += made;
    if (source_.made_bytes(described) == 0 && backend_.info().host_memory) {
      bytes.in_place += file_bytes(described);
    }
    file_total += file_bytes(described);
    return {};
  }
  Status matrix(const std::string& name, int64_t rows, int64_t cols, Rows, MatrixPtr&) override {
    KVANT_ASSIGN(const MatrixSource described, source_.describe(name, rows, cols));
    const bool is_table = name == "token_embd.weight";
    add(std::span(&described, 1), is_table);
    return {};
  }
  Status experts(const std::string& name, int64_t rows, int64_t cols,
                 std::vector<MatrixPtr>&) override {
    KVANT_ASSIGN(const std::vector<MatrixSource> described,
                 source_.describe_experts(name, source_.config().num_experts, rows, cols));
    add(described, /*is_table=*/false);
    return {};
  }
  Status vector(const std::string& name, int64_t size, Rows, const float*&) override {
    KVANT_TRY(source_.vector(name, size));  // it exists and has that size
    bytes.parameters += 4 * padded_floats(size);
    return {};
  }

  WeightBytes bytes;
  int64_t file_total = 0;

 private:
  static int64_t file_bytes(const MatrixSource& matrix) {
    return formats::weight_bytes(matrix.type, matrix.rows, matrix.cols);
  }
  // Of the backend's memory; what is made for a device lies in the host's.
  int64_t made_bytes(const MatrixSource& matrix) const {
    return backend_.info().host_memory ? source_.made_bytes(matrix) : 0;
  }
  void add(std::span<const MatrixSource> matrices, bool is_table) {
    int64_t repacked = 0;
    int64_t made = 0;
    int64_t in_file = 0;
    for (const MatrixSource& matrix : matrices) {
      repacked += backend_.matrix_bytes(matrix);
      if (!is_table) made += made_bytes(matrix);
      in_file += file_bytes(matrix);
    }
    file_total += in_file;
    bytes.loading_peak = std::max(bytes.loading_peak, bytes.matrices + made + repacked);
    bytes.matrices += repacked;
    if (repacked == 0) bytes.matrices += made;
    const bool in_place = repacked == 0 && source_.made_bytes(matrices.front()) == 0;
    if (in_place && !is_table) bytes.in_place += in_file;
  }

  const ModelSource& source_;
  const backend::Backend& backend_;
};

class Loader final : public WeightVisitor {
 public:
  Loader(ModelSource& source, backend::Backend& backend, const LoadProgress& progress,
         int64_t total_bytes, float* parameters)
      : source_(source),
        backend_(backend),
        memory_(backend.info().host_memory ? backend.memory() : source.host_memory()),
        progress_(progress),
        total_bytes_(total_bytes),
        next_parameter_(parameters) {}

  Status table(const std::string& name, int64_t rows, int64_t cols, MatrixSource& slot) override {
    KVANT_ASSIGN(slot, source_.matrix(name, rows, cols, memory_));
    return advance(slot);
  }
  Status matrix(const std::string& name, int64_t rows, int64_t cols, Rows order,
                MatrixPtr& slot) override {
    KVANT_ASSIGN(MatrixSource source, source_.matrix(name, rows, cols, memory_));
    const std::vector<int32_t> rows_of_file = row_order(source_.config(), order);
    source.row_order = rows_of_file;
    KVANT_ASSIGN(slot, backend_.load_matrix(source));
    const bool still_read = name == "token_embd.weight";  // by embed
    if (slot->memory_bytes() > 0) source_.release(name, still_read);
    return advance(source);
  }
  Status experts(const std::string& name, int64_t rows, int64_t cols,
                 std::vector<MatrixPtr>& slots) override {
    KVANT_ASSIGN(const std::vector<MatrixSource> sources,
                 source_.experts(name, source_.config().num_experts, rows, cols, memory_));
    for (const MatrixSource& source : sources) {
      KVANT_ASSIGN(MatrixPtr loaded, backend_.load_matrix(source));
      slots.push_back(std::move(loaded));
      KVANT_TRY(advance(source));
    }
    if (slots.front()->memory_bytes() > 0) source_.release(name, false);
    return {};
  }
  Status vector(const std::string& name, int64_t size, Rows order, const float*& slot) override {
    KVANT_ASSIGN(std::vector<float> values, source_.vector(name, size));
    const std::vector<int32_t> rows_of_file = row_order(source_.config(), order);
    if (!rows_of_file.empty()) {
      const std::vector<float> as_in_file = values;
      for (int64_t i = 0; i < size; ++i) values[i] = as_in_file[rows_of_file[i]];
    }
    slot = place(values);
    return {};
  }
  const float* place(const std::vector<float>& values) {
    if (values.empty()) return nullptr;
    const int64_t size = static_cast<int64_t>(values.size());
    backend_.memory().copy(next_parameter_, values.data(), 4 * size);
    const float* placed = next_parameter_;
    next_parameter_ += padded_floats(size);
    return placed;
  }

 private:
  Status advance(const MatrixSource& source) {
    done_bytes_ += formats::weight_bytes(source.type, source.rows, source.cols);
    if (progress_ && !progress_(done_bytes_, total_bytes_)) {
      return Error(ErrorCode::kCancelled, "loading the model was cancelled");
    }
    return {};
  }

  ModelSource& source_;
  backend::Backend& backend_;
  MemoryResource& memory_;  // for weights that are made, which the host writes
  const LoadProgress& progress_;
  const int64_t total_bytes_;
  int64_t done_bytes_ = 0;
  float* next_parameter_;
};

std::vector<const backend::Matrix*> list_of(const std::vector<MatrixPtr>& matrices) {
  std::vector<const backend::Matrix*> list;
  for (const MatrixPtr& matrix : matrices) list.push_back(matrix.get());
  return list;
}

Result<Planner> run_planner(const ModelSource& source, const backend::Backend& backend) {
  Planner planner(source, backend);
  ModelWeights unused;
  KVANT_TRY(visit_weights(source.config(), unused, planner));
  planner.bytes.parameters += 4 * rope_factor_floats(source.config());
  planner.bytes.loading_peak =
      std::max(planner.bytes.loading_peak, planner.bytes.matrices) + planner.bytes.parameters;
  return planner;
}

}  // namespace

Result<WeightBytes> plan_weights(const ModelSource& source, const backend::Backend& backend) {
  KVANT_ASSIGN(const Planner planner, run_planner(source, backend));
  return planner.bytes;
}

Result<ModelWeights> load_weights(ModelSource& source, backend::Backend& backend,
                                  const LoadProgress& progress) {
  const ModelConfig& config = source.config();
  KVANT_ASSIGN(const Planner planner, run_planner(source, backend));
  ModelWeights weights;
  KVANT_ASSIGN(weights.parameters,
               Buffer::create(backend.memory(), planner.bytes.parameters, MemoryUse::kWeights));
  Loader loader(source, backend, progress, planner.file_total, weights.parameters.as<float>());
  KVANT_TRY(visit_weights(config, weights, loader));
  for (LayerWeights& layer : weights.layers) {
    layer.expert_gate_list = list_of(layer.expert_gate);
    layer.expert_up_list = list_of(layer.expert_up);
    layer.expert_down_list = list_of(layer.expert_down);
  }
  const RopeTable rope = rope_table(config, /*windowed=*/false);
  weights.rope = rope.params;
  weights.rope.frequency_factors = loader.place(rope.factors);
  const RopeTable local_rope = rope_table(config, /*windowed=*/true);
  weights.local_rope = local_rope.params;
  // Local layers have either no factors or those of the others.
  KVANT_CHECK(local_rope.factors.empty() || local_rope.factors == rope.factors,
              "local RoPE factors are the global ones");
  if (!local_rope.factors.empty()) {
    weights.local_rope.frequency_factors = weights.rope.frequency_factors;
  }
  return weights;
}

}  // namespace kvant::model
