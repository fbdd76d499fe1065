// Small random models of every architecture as GGUF bytes, for tests only. Each has what makes its
// architecture special: permuted rows and experts are in the loader, windows, norms and biases in
// the blocks.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/model/testing/gguf_builder.h"

namespace kvant::model::testing {

struct TinyShape {
  int layers = 3;
  int dim = 64;
  int heads = 4;
  int kv_heads = 2;
  int head_dim = 32;
  int ffn = 96;
  int vocab = 64;
  int context = 1024;
  int window = 24;  // of gemma3, with full attention in every third layer
  int experts = 4;  // of qwen3moe
  formats::WeightType type = formats::WeightType::kQ8_0;
  uint32_t seed = 1;
  bool tokenizer = false;  // one token a printable ASCII character; `vocab` is 100 or more then
};

inline std::vector<std::string> tiny_architectures() {
  return {"llama", "qwen2", "qwen3", "gemma3", "qwen3moe"};
}

class TinyModelWriter {
 public:
  TinyModelWriter(std::string architecture, const TinyShape& shape)
      : arch_(std::move(architecture)), shape_(shape) {}

  std::vector<std::byte> write() {
    builder_.string("general.architecture", arch_).string("general.name", "tiny " + arch_);
    u32("block_count", shape_.layers);
    u32("context_length", shape_.context);
    u32("embedding_length", shape_.dim);
    u32("feed_forward_length", shape_.ffn);
    u32("attention.head_count", shape_.heads);
    u32("attention.head_count_kv", shape_.kv_heads);
    u32("attention.key_length", shape_.head_dim);
    u32("attention.value_length", shape_.head_dim);
    builder_.f32(arch_ + ".attention.layer_norm_rms_epsilon", 1e-6f);
    builder_.f32(arch_ + ".rope.freq_base", 10000.0f);
    if (arch_ == "gemma3") {
      u32("attention.sliding_window", shape_.window);
      u32("attention.sliding_window_pattern", 3);
    }
    if (is_moe()) {
      u32("expert_count", shape_.experts);
      u32("expert_used_count", 2);
      u32("expert_feed_forward_length", 32);
    }
    if (shape_.tokenizer) vocabulary();
    matrix("token_embd.weight", shape_.vocab, shape_.dim);
    for (int i = 0; i < shape_.layers; ++i) layer("blk." + std::to_string(i) + ".");
    norm("output_norm.weight", shape_.dim);
    if (arch_ != "gemma3") matrix("output.weight", shape_.vocab, shape_.dim);
    return builder_.build();
  }

 private:
  void vocabulary() {
    std::vector<std::string> tokens = {"<s>", "</s>", "\u0120", "\u010A"};  // space and newline
    for (char c = '!'; c <= '~'; ++c) tokens.emplace_back(1, c);
    tokens.emplace_back("th");  // a byte-level vocabulary has at least one merge
    while (static_cast<int>(tokens.size()) < shape_.vocab) {
      tokens.push_back("<unused" + std::to_string(tokens.size()) + ">");
    }
    std::vector<int32_t> types(tokens.size(), 1);
    types[0] = types[1] = 3;  // control tokens
    builder_.string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", "gpt-2")
        .strings("tokenizer.ggml.tokens", tokens)
        .array("tokenizer.ggml.token_type", GgufValueType::kI32, types)
        .strings("tokenizer.ggml.merges", {"t h"})
        .u32("tokenizer.ggml.bos_token_id", 0)
        .u32("tokenizer.ggml.eos_token_id", 1);
  }
  bool is_moe() const { return arch_ == "qwen3moe"; }
  void u32(const std::string& key, int value) {
    builder_.u32(arch_ + "." + key, static_cast<uint32_t>(value));
  }
  void matrix(const std::string& name, int64_t rows, int64_t cols, int64_t stacked = 1) {
    std::vector<int64_t> dims = {cols, rows};
    if (stacked > 1) dims.push_back(stacked);
    // Uniform weights of this bound have the standard deviation 1.5 / sqrt(cols).
    const float bound = 2.6f / std::sqrt(static_cast<float>(cols));
    builder_.tensor(name, shape_.type, dims,
                    random_weights(shape_.type, rows * cols * stacked, next_seed(), bound));
  }
  void floats(const std::string& name, int64_t size, float middle, float spread) {
    std::mt19937 random(next_seed());
    std::vector<float> values(size);
    for (float& value : values) {
      value = middle + spread * (static_cast<float>(random() >> 8) * 0x1p-23f - 1.0f);
    }
    builder_.tensor(name, formats::WeightType::kF32, {size},
                    plain_weights(formats::WeightType::kF32, values));
  }
  void norm(const std::string& name, int64_t size) { floats(name, size, 1.0f, 0.3f); }

  void layer(const std::string& prefix) {
    const int64_t dim = shape_.dim;
    const int64_t q_rows = static_cast<int64_t>(shape_.heads) * shape_.head_dim;
    const int64_t kv_rows = static_cast<int64_t>(shape_.kv_heads) * shape_.head_dim;
    norm(prefix + "attn_norm.weight", dim);
    matrix(prefix + "attn_q.weight", q_rows, dim);
    matrix(prefix + "attn_k.weight", kv_rows, dim);
    matrix(prefix + "attn_v.weight", kv_rows, dim);
    matrix(prefix + "attn_output.weight", dim, q_rows);
    if (arch_ == "qwen2") {
      floats(prefix + "attn_q.bias", q_rows, 0.0f, 1.0f);
      floats(prefix + "attn_k.bias", kv_rows, 0.5f, 3.0f);
      floats(prefix + "attn_v.bias", kv_rows, 0.0f, 1.0f);
    }
    if (arch_ == "qwen3" || arch_ == "gemma3" || is_moe()) {
      norm(prefix + "attn_q_norm.weight", shape_.head_dim);
      norm(prefix + "attn_k_norm.weight", shape_.head_dim);
    }
    norm(prefix + "ffn_norm.weight", dim);
    if (arch_ == "gemma3") {
      norm(prefix + "post_attention_norm.weight", dim);
      norm(prefix + "post_ffw_norm.weight", dim);
    }
    if (is_moe()) {
      matrix(prefix + "ffn_gate_inp.weight", shape_.experts, dim);
      matrix(prefix + "ffn_gate_exps.weight", 32, dim, shape_.experts);
      matrix(prefix + "ffn_up_exps.weight", 32, dim, shape_.experts);
      matrix(prefix + "ffn_down_exps.weight", dim, 32, shape_.experts);
    } else {
      matrix(prefix + "ffn_gate.weight", shape_.ffn, dim);
      matrix(prefix + "ffn_up.weight", shape_.ffn, dim);
      matrix(prefix + "ffn_down.weight", dim, shape_.ffn);
    }
  }

  uint32_t next_seed() { return shape_.seed * 1000003u + ++tensor_; }

  const std::string arch_;
  const TinyShape shape_;
  GgufBuilder builder_;
  uint32_t tensor_ = 0;
};

inline std::vector<std::byte> tiny_model(std::string_view architecture,
                                         const TinyShape& shape = {}) {
  return TinyModelWriter(std::string(architecture), shape).write();
}

}  // namespace kvant::model::testing
