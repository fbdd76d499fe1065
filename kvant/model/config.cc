#include "kvant/model/config.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "kvant/formats/weight_types.h"
#include "kvant/model/arch/registry.h"
#include "kvant/model/config_source.h"
#include "kvant/model/gguf.h"

namespace kvant::model {
namespace {

constexpr int kMaxLayers = 1024;
constexpr int kMaxDim = 1 << 18;
constexpr int kMaxHeads = 1024;
constexpr int kMaxVocab = 1 << 24;
constexpr int kMaxExperts = 1024;

class GgufConfigSource final : public ConfigSource {
 public:
  GgufConfigSource(const Gguf& gguf, std::string prefix)
      : gguf_(gguf), prefix_(std::move(prefix) + ".") {}

  Result<std::optional<double>> number(std::string_view key) const override {
    const std::string full = prefix_ + std::string(key);
    const GgufValue* value = gguf_.find(full);
    if (value == nullptr) return std::optional<double>();
    if (value->type == GgufValueType::kArray) return uniform(full);
    if (value->type == GgufValueType::kBool) {
      KVANT_ASSIGN(const bool flag, gguf_.boolean(full));
      return std::optional<double>(flag ? 1 : 0);
    }
    if (value->type == GgufValueType::kF32 || value->type == GgufValueType::kF64) {
      KVANT_ASSIGN(const float real, gguf_.f32(full));
      return std::optional<double>(real);
    }
    KVANT_ASSIGN(const int64_t whole, gguf_.i64(full));
    return std::optional<double>(static_cast<double>(whole));
  }

  Result<std::optional<std::string>> text(std::string_view key) const override {
    const std::string full = prefix_ + std::string(key);
    if (!gguf_.has(full)) return std::optional<std::string>();
    KVANT_ASSIGN(const std::string_view value, gguf_.string(full));
    return std::optional<std::string>(value);
  }

  std::optional<bool> has_tensor(std::string_view name) const override {
    return gguf_.find_tensor(name) != nullptr;
  }

 private:
  // One value per layer, which must be the same for all.
  Result<std::optional<double>> uniform(const std::string& key) const {
    KVANT_ASSIGN(const std::vector<uint32_t> values, gguf_.u32_array(key));
    if (values.empty()) return Error(ErrorCode::kCorruptData, key + " is an empty array");
    for (const uint32_t value : values) {
      if (value != values.front()) {
        return Error(
            ErrorCode::kUnsupported,
            fmt::format("{} differs between layers ({} and {}); kvant needs layers of equal "
                        "geometry",
                        key, values.front(), value));
      }
    }
    return std::optional<double>(values.front());
  }

  const Gguf& gguf_;
  const std::string prefix_;
};

Status read_rope(const ConfigSource& source, ModelConfig& config) {
  RopeConfig& rope = config.rope;
  KVANT_ASSIGN(rope.rotary_dim, source.integer("rope.dimension_count", {2, 512}, config.head_dim));
  KVANT_ASSIGN(const double base, source.number_or("rope.freq_base", 10000));
  rope.base = static_cast<float>(base);
  KVANT_ASSIGN(const std::optional<std::string> kind, source.text("rope.scaling.type"));
  // Old files have only the factor.
  KVANT_ASSIGN(const double old_factor, source.number_or("rope.scale_linear", 1));
  KVANT_ASSIGN(const double factor, source.number_or("rope.scaling.factor", old_factor));
  rope.scaling_factor = static_cast<float>(factor);
  const std::string name = kind.value_or(factor != 1 ? "linear" : "none");
  if (name == "none") {
    rope.scaling = RopeScaling::kNone;
  } else if (name == "linear") {
    rope.scaling = RopeScaling::kLinear;
  } else if (name == "yarn") {
    rope.scaling = RopeScaling::kYarn;
    KVANT_ASSIGN(const double magnitude, source.number_or("rope.scaling.attn_factor", 1));
    rope.attention_factor = static_cast<float>(magnitude);
    KVANT_ASSIGN(const double fast, source.number_or("rope.scaling.yarn_beta_fast", 32));
    KVANT_ASSIGN(const double slow, source.number_or("rope.scaling.yarn_beta_slow", 1));
    rope.beta_fast = static_cast<float>(fast);
    rope.beta_slow = static_cast<float>(slow);
    KVANT_ASSIGN(rope.original_context,
                 source.integer("rope.scaling.original_context_length", {1, 1 << 30}));
  } else {
    return Error(ErrorCode::kUnsupported,
                 fmt::format("rope.scaling.type is '{}'; kvant knows none, linear, yarn and "
                             "the frequency factors of Llama 3",
                             name));
  }
  return {};
}

Status read_experts(const ConfigSource& source, ModelConfig& config) {
  KVANT_ASSIGN(config.num_experts, source.integer("expert_count", {0, kMaxExperts}, 0));
  if (config.num_experts == 0) return {};
  KVANT_ASSIGN(config.num_experts_used,
               source.integer("expert_used_count", {1, config.num_experts}));
  KVANT_ASSIGN(config.expert_dim,
               source.integer("expert_feed_forward_length", {1, kMaxDim}, config.ffn_dim));
  return {};
}

// Keys that all architectures share, in GGUF's names.
Status read_common(const ConfigSource& source, ModelConfig& config) {
  KVANT_ASSIGN(config.num_layers, source.integer("block_count", {1, kMaxLayers}));
  KVANT_ASSIGN(config.dim, source.integer("embedding_length", {1, kMaxDim}));
  KVANT_ASSIGN(config.num_query_heads, source.integer("attention.head_count", {1, kMaxHeads}));
  KVANT_ASSIGN(config.num_kv_heads,
               source.integer("attention.head_count_kv", {1, kMaxHeads}, config.num_query_heads));
  KVANT_ASSIGN(config.ffn_dim, source.integer("feed_forward_length", {1, kMaxDim}));
  KVANT_ASSIGN(config.vocab_size, source.integer("vocab_size", {1, kMaxVocab}));
  KVANT_ASSIGN(config.context_length, source.integer("context_length", {1, 1 << 30}));
  KVANT_ASSIGN(config.head_dim, source.integer("attention.key_length", {1, 4096},
                                               config.dim / config.num_query_heads));
  KVANT_ASSIGN(const int value_dim,
               source.integer("attention.value_length", {1, 4096}, config.head_dim));
  if (value_dim != config.head_dim) {
    return Error(ErrorCode::kUnsupported,
                 fmt::format("attention.key_length is {} and attention.value_length is {}; kvant "
                             "needs them to be equal",
                             config.head_dim, value_dim));
  }
  KVANT_ASSIGN(const double epsilon, source.number_or("attention.layer_norm_rms_epsilon", 1e-6));
  config.norm_epsilon = static_cast<float>(epsilon);
  KVANT_ASSIGN(const int window, source.integer("attention.sliding_window", {0, 1 << 30}, 0));
  config.layer_window.assign(config.num_layers, window);
  config.attention_scale = 1.0f / std::sqrt(static_cast<float>(config.head_dim));
  KVANT_TRY(read_rope(source, config));
  return read_experts(source, config);
}

// Llama 3's frequency factors, a tensor of the file.
Status read_rope_factors(const Gguf& gguf, RopeConfig& rope) {
  const GgufTensor* tensor = gguf.find_tensor("rope_freqs.weight");
  if (tensor == nullptr) return {};
  if (tensor->num_elements() != rope.rotary_dim / 2) {
    return Error(ErrorCode::kCorruptData,
                 fmt::format("rope_freqs.weight has {} elements; expected {}, half of the rotary "
                             "dimension",
                             tensor->num_elements(), rope.rotary_dim / 2));
  }
  rope.factors.resize(rope.rotary_dim / 2);
  formats::dequantize_row(tensor->type, tensor->bytes.data(), tensor->num_elements(),
                          rope.factors.data());
  rope.scaling = RopeScaling::kFactors;
  return {};
}

bool finite_positive(float x) {
  return std::isfinite(x) && x > 0;
}

Status check_rope(const RopeConfig& rope, int head_dim) {
  const auto bad = [](std::string text) { return Error(ErrorCode::kCorruptData, std::move(text)); };
  if (rope.rotary_dim % 2 != 0 || rope.rotary_dim > head_dim) {
    return bad(
        fmt::format("{} rotary channels with a head dimension of {}; expected an even number, "
                    "at most the head dimension",
                    rope.rotary_dim, head_dim));
  }
  for (const float value :
       {rope.base, rope.scaling_factor, rope.attention_factor, rope.beta_fast, rope.beta_slow}) {
    if (!finite_positive(value))
      return bad(fmt::format("a RoPE parameter is {}, not positive", value));
  }
  if (!(rope.local_base >= 0) || !std::isfinite(rope.local_base)) {
    return bad(fmt::format("the RoPE base of local layers is {}", rope.local_base));
  }
  for (const float factor : rope.factors) {
    if (!finite_positive(factor))
      return bad(fmt::format("a RoPE factor is {}, not positive", factor));
  }
  return {};
}

}  // namespace

Result<double> ConfigSource::number_or(std::string_view key, double fallback) const {
  KVANT_ASSIGN(const std::optional<double> value, number(key));
  return value.value_or(fallback);
}

Result<int> ConfigSource::integer(std::string_view key, Range range,
                                  std::optional<int> fallback) const {
  KVANT_ASSIGN(const std::optional<double> value, number(key));
  if (!value && fallback) return *fallback;
  if (!value) {
    return Error(ErrorCode::kCorruptData,
                 fmt::format("the model does not say its {}, which kvant needs", key));
  }
  if (!(*value >= static_cast<double>(range.min) && *value <= static_cast<double>(range.max)) ||
      *value != std::floor(*value)) {
    return Error(ErrorCode::kCorruptData,
                 fmt::format("{} is {}; expected a whole number from {} to {}", key, *value,
                             range.min, range.max));
  }
  return static_cast<int>(*value);
}

Result<ModelConfig> config_from_source(const ConfigSource& source, std::string_view architecture) {
  KVANT_ASSIGN(const Architecture* const row, find_architecture(architecture));
  ModelConfig config;
  config.architecture = row->name;
  KVANT_TRY(read_common(source, config));
  KVANT_TRY(row->configure(source, config));
  return config;
}

Result<ModelConfig> read_config(const Gguf& gguf) {
  const auto read = [&]() -> Result<ModelConfig> {
    KVANT_ASSIGN(const std::string_view architecture, gguf.string("general.architecture"));
    const GgufTensor* embedding = gguf.find_tensor("token_embd.weight");
    if (embedding == nullptr) {
      return Error(ErrorCode::kCorruptData, "the file has no tensor token_embd.weight");
    }
    const GgufConfigSource file(gguf, std::string(architecture));
    // The vocabulary is the height of the embedding table; the key for it is often absent.
    const VocabularySource source(file, static_cast<double>(embedding->num_rows()));
    KVANT_ASSIGN(ModelConfig config, config_from_source(source, architecture));
    KVANT_ASSIGN(const std::string_view name, gguf.string_or("general.name", architecture));
    config.name = name;
    config.tied_head = gguf.find_tensor("output.weight") == nullptr;
    KVANT_TRY(read_rope_factors(gguf, config.rope));
    KVANT_TRY(check_config(config));
    return config;
  };
  Result<ModelConfig> config = read();
  if (!config) return config.error().with_context(gguf.name());
  return config;
}

Status check_config(const ModelConfig& config) {
  const auto unsupported = [](std::string text) {
    return Error(ErrorCode::kUnsupported, std::move(text));
  };
  if (config.head_dim % 16 != 0 || config.head_dim < 16 || config.head_dim > 512) {
    return unsupported(
        fmt::format("a head dimension of {}; kvant supports multiples of 16 from 16 to "
                    "512",
                    config.head_dim));
  }
  if (config.num_query_heads % config.num_kv_heads != 0) {
    return Error(ErrorCode::kCorruptData,
                 fmt::format("{} query heads do not divide among {} KV heads",
                             config.num_query_heads, config.num_kv_heads));
  }
  if (config.query_heads_per_kv_head() > 16) {
    return unsupported(fmt::format("{} query heads per KV head; kvant supports 1 to 16",
                                   config.query_heads_per_kv_head()));
  }
  if (!finite_positive(config.norm_epsilon) || config.norm_epsilon >= 1) {
    return Error(ErrorCode::kCorruptData,
                 fmt::format("the norm's epsilon is {}; expected a small positive number",
                             config.norm_epsilon));
  }
  for (const float value : {config.embedding_scale, config.attention_scale}) {
    if (!finite_positive(value)) {
      return Error(ErrorCode::kCorruptData, fmt::format("a scale is {}, not positive", value));
    }
  }
  for (const float value : {config.attention_softcap, config.logit_softcap}) {
    if (!std::isfinite(value) || value < 0) {
      return Error(ErrorCode::kCorruptData, fmt::format("a soft cap is {}", value));
    }
  }
  return check_rope(config.rope, config.head_dim);
}

std::vector<cache::LayerGeometry> ModelConfig::layer_geometry() const {
  std::vector<cache::LayerGeometry> layers;
  for (int layer = 0; layer < num_layers; ++layer) {
    layers.push_back({num_kv_heads, head_dim, layer_window[layer]});
  }
  return layers;
}

std::string ModelConfig::geometry_id() const {
  std::string id = fmt::format("{}-{}x{}x{}", architecture, num_layers, num_kv_heads, head_dim);
  const int windowed =
      static_cast<int>(std::ranges::count_if(layer_window, [](int window) { return window > 0; }));
  if (windowed > 0) id += fmt::format("-w{}x{}", windowed, *std::ranges::max_element(layer_window));
  return id;
}

RopeTable rope_table(const ModelConfig& config, bool windowed) {
  const RopeConfig& rope = config.rope;
  RopeTable table;
  table.params.rotary_dim = rope.rotary_dim;
  table.params.base = rope.base;
  if (windowed && rope.local_base > 0) {  // Gemma 3: local layers keep their original positions
    table.params.base = rope.local_base;
    return table;
  }
  switch (rope.scaling) {
    case RopeScaling::kNone: break;
    case RopeScaling::kLinear: table.params.position_scale = 1.0f / rope.scaling_factor; break;
    case RopeScaling::kFactors: table.factors = rope.factors; break;
    case RopeScaling::kYarn: {
      // Peng et al., "YaRN" (2023), section 3: frequencies that turn more than beta_fast times
      // within the original context stay, those below beta_slow are interpolated, a ramp between
      // them.
      const double dims = rope.rotary_dim;
      const auto correction = [&](double turns) {
        return dims *
               std::log(static_cast<double>(rope.original_context) /
                        (turns * 2 * std::numbers::pi)) /
               (2 * std::log(static_cast<double>(rope.base)));
      };
      const double low = std::max(0.0, std::floor(correction(rope.beta_fast)));
      const double high = std::min(dims - 1, std::ceil(correction(rope.beta_slow)));
      for (int i = 0; i < rope.rotary_dim / 2; ++i) {
        const double ramp = std::clamp((i - low) / std::max(0.001, high - low), 0.0, 1.0);
        const double multiplier = ramp / rope.scaling_factor + (1 - ramp);
        table.factors.push_back(static_cast<float>(1.0 / multiplier));
      }
      table.params.attention_factor =
          rope.attention_factor * (1.0f + 0.1f * std::log(rope.scaling_factor));
      break;
    }
  }
  return table;
}

}  // namespace kvant::model
