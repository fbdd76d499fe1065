// What a model is: geometry, positions, and which optional parts its blocks have.
//
// Plain data, the same for GGUF files and for JSON configurations of random weights. An
// architecture (arch/*.cc) fills in what the file does not say. Values that no model can have are
// errors here, so that the runtime need not check them again. Thread-safe as plain values are.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/backend/backend.h"
#include "kvant/base/result.h"
#include "kvant/cache/kv_cache.h"

namespace kvant::model {

class Gguf;

enum class RopeScaling { kNone, kLinear, kYarn, kFactors };

// Rotary positions as the model declares them; `rope_tables` turns them into attention::RopeParams.
struct RopeConfig {
  int rotary_dim = 0;  // channels that rotate, even, at most head_dim
  float base = 10000.0f;
  float local_base = 0.0f;  // of layers with a window; 0: like `base`, with its scaling
  RopeScaling scaling = RopeScaling::kNone;
  float scaling_factor = 1.0f;    // kLinear, kYarn: how much longer than the original context
  int64_t original_context = 0;   // kYarn
  float attention_factor = 1.0f;  // kYarn: extra magnitude
  float beta_fast = 32.0f, beta_slow = 1.0f;  // kYarn
  std::vector<float> factors;                 // kFactors: [rotary_dim / 2], divide the frequencies
};

struct ModelConfig {
  std::string architecture;  // name of its row in arch/registry.cc
  std::string name;          // for people
  int num_layers = 0;
  int dim = 0;
  int num_query_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int ffn_dim = 0;
  int vocab_size = 0;
  int64_t context_length = 0;  // that the model was trained for
  float norm_epsilon = 1e-6f;
  RopeConfig rope;

  float embedding_scale = 1.0f;
  float attention_scale = 0.0f;    // of scores; 1/sqrt(head_dim) in most models
  float attention_softcap = 0.0f;  // 0: none
  float logit_softcap = 0.0f;      // 0: none
  backend::GateKind gate = backend::GateKind::kSilu;
  std::vector<int> layer_window;  // [num_layers]; 0: full attention

  // Optional parts of a block (blocks.h).
  bool qkv_bias = false;
  bool qk_norm = false;     // RMS norm of each head's query and key before RoPE
  bool post_norms = false;  // norms after attention and after the feed-forward part
  bool tied_head = false;   // the output matrix is the embedding table
  // Q and K rows of the file are in the order of adjacent RoPE pairs (2i, 2i + 1); they are loaded
  // in the order of Hugging Face checkpoints, pairs (i, i + rotary_dim / 2).
  bool adjacent_rope_rows = false;

  // Mixture of experts; 0 experts: a dense feed-forward part.
  int num_experts = 0;
  int num_experts_used = 0;
  int expert_dim = 0;
  bool normalize_expert_weights = true;

  int query_heads_per_kv_head() const { return num_query_heads / num_kv_heads; }
  std::vector<cache::LayerGeometry> layer_geometry() const;
  // What a quantisation plan depends on: layers, KV heads, head dimension, windows. Readable, e.g.
  // "llama-30x3x64".
  std::string geometry_id() const;
};

// kCorruptData names the key that is missing or impossible, kUnsupported an architecture or option.
Result<ModelConfig> read_config(const Gguf& gguf);

// A configuration in the manner of Hugging Face's config.json, or the name of a built-in one
// ("llama-3.1-8b"): geometry for random weights (--weights dummy).
Result<ModelConfig> parse_config_json(std::string_view text);
Result<ModelConfig> load_config(const std::string& path_or_name);
std::vector<std::string_view> builtin_config_names();

// Impossible or unsupported geometry: zero or absurd sizes, heads that do not divide, ...
Status check_config(const ModelConfig& config);

// RoPE of layers with full attention and of layers with a window. `factors` is empty or
// [rotary_dim / 2] and must be copied into the backend's memory by the caller.
struct RopeTable {
  attention::RopeParams params;  // without frequency_factors
  std::vector<float> factors;
};
RopeTable rope_table(const ModelConfig& config, bool windowed);

// Where an architecture reads its settings from: the metadata of a GGUF file (without the prefix
// "llama.") or a JSON configuration, under GGUF's names. Absent is not an error; the wrong kind is.
class ConfigSource {
 public:
  virtual ~ConfigSource() = default;
  virtual Result<std::optional<double>> number(std::string_view key) const = 0;
  virtual Result<std::optional<std::string>> text(std::string_view key) const = 0;
  // Whether the file has that tensor; nothing if there is no file.
  virtual std::optional<bool> has_tensor(std::string_view name) const = 0;

  // The value, or `fallback` where the key is absent.
  Result<double> number_or(std::string_view key, double fallback) const;
  // The same for a whole number in [min, max]; without a fallback, an absent key is an error.
  struct Range {
    int64_t min = 0;
    int64_t max = 0;
  };
  Result<int> integer(std::string_view key, Range range, std::optional<int> fallback = {}) const;
};

// One row of arch/registry.cc.
struct Architecture {
  std::string_view name;     // general.architecture of GGUF files
  std::string_view hf_type;  // model_type of config.json
  std::string_view summary;  // for people
  // Sets what differs from the defaults, once the keys common to all architectures have been read.
  Status (*configure)(const ConfigSource& source, ModelConfig& config);
};

}  // namespace kvant::model
