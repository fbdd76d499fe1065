// Configurations without a model file: Hugging Face's config.json and a table of well-known sizes.
#include <fmt/format.h>

#include <array>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numbers>
#include <sstream>

#include "kvant/model/config.h"
#include "kvant/model/config_source.h"

namespace kvant::model {
namespace {

using Json = nlohmann::json;

// Our key (GGUF's name), their keys in order of preference.
struct KeyName {
  std::string_view key;
  std::array<std::string_view, 2> names;
};
constexpr KeyName kKeyNames[] = {
    {"block_count", {"num_hidden_layers"}},
    {"embedding_length", {"hidden_size"}},
    {"feed_forward_length", {"intermediate_size"}},
    {"attention.head_count", {"num_attention_heads"}},
    {"attention.head_count_kv", {"num_key_value_heads"}},
    {"attention.key_length", {"head_dim"}},
    {"attention.value_length", {"v_head_dim"}},
    {"attention.layer_norm_rms_epsilon", {"rms_norm_eps"}},
    {"attention.sliding_window", {"sliding_window"}},
    {"attention.sliding_window_pattern", {"sliding_window_pattern"}},
    {"context_length", {"max_position_embeddings"}},
    {"vocab_size", {"vocab_size"}},
    {"rope.freq_base", {"rope_theta"}},
    {"rope.freq_base_swa", {"rope_local_base_freq"}},
    {"expert_count", {"num_experts", "num_local_experts"}},
    {"expert_used_count", {"num_experts_per_tok"}},
    {"expert_feed_forward_length", {"moe_intermediate_size"}},
    {"final_logit_softcapping", {"final_logit_softcapping"}},
};
constexpr KeyName kRopeKeyNames[] = {
    // members of rope_scaling
    {"rope.scaling.type", {"rope_type", "type"}},
    {"rope.scaling.factor", {"factor"}},
    {"rope.scaling.original_context_length", {"original_max_position_embeddings"}},
    {"rope.scaling.attn_factor", {"attention_factor"}},
    {"rope.scaling.yarn_beta_fast", {"beta_fast"}},
    {"rope.scaling.yarn_beta_slow", {"beta_slow"}},
};

class JsonConfigSource final : public ConfigSource {
 public:
  explicit JsonConfigSource(const Json& json) : json_(json) {}

  Result<std::optional<double>> number(std::string_view key) const override {
    const Json* value = find(key);
    if (value == nullptr) return std::optional<double>();
    if (value->is_boolean()) return std::optional<double>(value->get<bool>() ? 1 : 0);
    if (!value->is_number()) {
      return Error(ErrorCode::kCorruptData, fmt::format("{} is not a number", key));
    }
    return std::optional<double>(value->get<double>());
  }

  Result<std::optional<std::string>> text(std::string_view key) const override {
    const Json* value = find(key);
    if (value == nullptr) return std::optional<std::string>();
    if (!value->is_string()) {
      return Error(ErrorCode::kCorruptData, fmt::format("{} is not a string", key));
    }
    std::string text = value->get<std::string>();
    // Llama 3's rule gives frequency factors; `llama3_factors` computes them.
    if (key == "rope.scaling.type" && (text == "llama3" || text == "default")) text = "none";
    return std::optional<std::string>(std::move(text));
  }

  std::optional<bool> has_tensor(std::string_view) const override { return std::nullopt; }

 private:
  static const Json* member(const Json& object, std::string_view name) {
    const auto found = object.find(name);
    return found == object.end() || found->is_null() ? nullptr : &*found;
  }
  static const Json* member(const Json& object, const KeyName& row) {
    for (const std::string_view name : row.names) {
      if (name.empty()) continue;
      if (const Json* value = member(object, name)) return value;
    }
    return nullptr;
  }
  const Json* find(std::string_view key) const {
    if (key == "attention.sliding_window") {
      const Json* use = member(json_, "use_sliding_window");
      if (use != nullptr && use->is_boolean() && !use->get<bool>()) return nullptr;
    }
    for (const KeyName& row : kKeyNames) {
      if (row.key == key) return member(json_, row);
    }
    const Json* scaling = member(json_, "rope_scaling");
    if (scaling == nullptr || !scaling->is_object()) return nullptr;
    for (const KeyName& row : kRopeKeyNames) {
      if (row.key == key) return member(*scaling, row);
    }
    return nullptr;
  }

  const Json& json_;
};

// Llama 3.1's rule: long wavelengths are stretched by `factor`, short ones stay, a ramp between.
Status llama3_factors(const Json& scaling, RopeConfig& rope) {
  const auto value = [&](const char* name) -> Result<double> {
    const auto found = scaling.find(name);
    if (found == scaling.end() || !found->is_number() || !(found->get<double>() > 0)) {
      return Error(ErrorCode::kCorruptData,
                   fmt::format("rope_scaling.{} is absent or not a positive number", name));
    }
    return found->get<double>();
  };
  KVANT_ASSIGN(const double factor, value("factor"));
  KVANT_ASSIGN(const double low, value("low_freq_factor"));
  KVANT_ASSIGN(const double high, value("high_freq_factor"));
  KVANT_ASSIGN(const double original, value("original_max_position_embeddings"));
  if (!(high > low)) {
    return Error(ErrorCode::kCorruptData,
                 "rope_scaling.high_freq_factor is not above low_freq_factor");
  }
  rope.scaling = RopeScaling::kFactors;
  rope.scaling_factor = 1;
  for (int i = 0; i < rope.rotary_dim / 2; ++i) {
    const double wavelength =
        2 * std::numbers::pi * std::pow(static_cast<double>(rope.base), 2.0 * i / rope.rotary_dim);
    double divide = 1;
    if (wavelength > original / low) {
      divide = factor;
    } else if (wavelength >= original / high) {
      const double smooth = (original / wavelength - low) / (high - low);
      divide = 1 / ((1 - smooth) / factor + smooth);
    }
    rope.factors.push_back(static_cast<float>(divide));
  }
  return {};
}

// Geometries to measure with random weights. Facts of the published config.json files.
struct BuiltinConfig {
  std::string_view name;
  std::string_view json;
};
constexpr BuiltinConfig kBuiltinConfigs[] = {
    {"smollm2-135m", R"({"model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576,
      "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
      "vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 100000,
      "rms_norm_eps": 1e-5, "tie_word_embeddings": true})"},
    {"llama-2-7b", R"({"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096,
      "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
      "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5})"},
    {"llama-3.1-8b", R"({"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096,
      "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
      "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000,
      "rms_norm_eps": 1e-5, "rope_scaling": {"rope_type": "llama3", "factor": 8,
      "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}})"},
    {"llama-3.3-70b", R"({"model_type": "llama", "num_hidden_layers": 80, "hidden_size": 8192,
      "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
      "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000,
      "rms_norm_eps": 1e-5, "rope_scaling": {"rope_type": "llama3", "factor": 8,
      "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}})"},
    {"qwen2.5-0.5b", R"({"model_type": "qwen2", "num_hidden_layers": 24, "hidden_size": 896,
      "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2,
      "vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1000000,
      "rms_norm_eps": 1e-6, "tie_word_embeddings": true})"},
    {"qwen3-8b", R"({"model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 4096,
      "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
      "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
      "rope_theta": 1000000, "rms_norm_eps": 1e-6})"},
    {"qwen3-30b-a3b", R"({"model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048,
      "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
      "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4,
      "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
      "rope_theta": 1000000, "rms_norm_eps": 1e-6})"},
    {"gemma-3-270m", R"({"model_type": "gemma3_text", "num_hidden_layers": 18, "hidden_size": 640,
      "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 1,
      "head_dim": 256, "vocab_size": 262144, "max_position_embeddings": 32768,
      "rope_theta": 1000000, "rope_local_base_freq": 10000, "sliding_window": 512,
      "sliding_window_pattern": 6, "rms_norm_eps": 1e-6, "tie_word_embeddings": true})"},
};

// Models whose blocks are those of another type.
std::string_view canonical_type(std::string_view type) {
  if (type == "mistral" || type == "mixtral") return "llama";
  return type;
}

}  // namespace

Result<ModelConfig> parse_config_json(std::string_view text) {
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) {
    return Error(ErrorCode::kCorruptData, "the configuration is not a JSON object");
  }
  const auto type = json.find("model_type");
  if (type == json.end() || !type->is_string()) {
    return Error(ErrorCode::kCorruptData, "the configuration has no model_type");
  }
  const std::string name = type->get<std::string>();
  KVANT_ASSIGN(ModelConfig config,
               config_from_source(JsonConfigSource(json), canonical_type(name)));
  config.name = name;
  // Gemma ties its head unless the file says otherwise; the other architectures do not.
  const auto tied = json.find("tie_word_embeddings");
  config.tied_head = tied != json.end() && tied->is_boolean() ? tied->get<bool>()
                                                              : config.architecture == "gemma3";
  const auto scaling = json.find("rope_scaling");
  if (scaling != json.end() && scaling->is_object()) {
    const auto rope_type = scaling->find("rope_type");
    if (rope_type != scaling->end() && *rope_type == "llama3") {
      KVANT_TRY(llama3_factors(*scaling, config.rope));
    }
  }
  KVANT_TRY(check_config(config));
  return config;
}

std::vector<std::string_view> builtin_config_names() {
  std::vector<std::string_view> names;
  for (const BuiltinConfig& row : kBuiltinConfigs) names.push_back(row.name);
  return names;
}

Result<ModelConfig> load_config(const std::string& path_or_name) {
  for (const BuiltinConfig& row : kBuiltinConfigs) {
    if (row.name != path_or_name) continue;
    KVANT_ASSIGN(ModelConfig config, parse_config_json(row.json));
    config.name = row.name;
    return config;
  }
  std::ifstream file(path_or_name, std::ios::binary);
  if (!file) {
    return Error(ErrorCode::kNotFound,
                 fmt::format("'{}' is neither a file that can be read nor a built-in configuration "
                             "({})",
                             path_or_name, fmt::join(builtin_config_names(), ", ")));
  }
  std::ostringstream text;
  text << file.rdbuf();
  Result<ModelConfig> config = parse_config_json(text.str());
  if (!config) return config.error().with_context(path_or_name);
  return config;
}

}  // namespace kvant::model
