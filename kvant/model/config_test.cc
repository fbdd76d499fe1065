#include "kvant/model/config.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>

#include "kvant/model/arch/registry.h"
#include "kvant/model/gguf.h"
#include "kvant/model/testing/tiny_models.h"

namespace kvant::model {
namespace {

using testing::GgufBuilder;

// A builder with what every model has, so that a test adds what it is about.
GgufBuilder base_model(const std::string& arch = "llama") {
  GgufBuilder builder;
  builder.string("general.architecture", arch)
      .u32(arch + ".block_count", 2)
      .u32(arch + ".context_length", 128)
      .u32(arch + ".embedding_length", 64)
      .u32(arch + ".feed_forward_length", 96)
      .u32(arch + ".attention.head_count", 4);
  builder.tensor("token_embd.weight", formats::WeightType::kF32, {64, 8},
                 testing::random_weights(formats::WeightType::kF32, 64 * 8, 1));
  return builder;
}

Result<ModelConfig> read(const GgufBuilder& builder) {
  const std::vector<std::byte> file = builder.build();
  Result<Gguf> gguf = Gguf::parse(file, "test");
  if (!gguf) return gguf.error();
  return read_config(*gguf);
}

TEST(Config, ReadsWhatAFileSaysAndFillsInTheRest) {
  const Result<ModelConfig> config = read(base_model());
  ASSERT_TRUE(config) << config.error().message();
  EXPECT_EQ(config->num_layers, 2);
  EXPECT_EQ(config->num_kv_heads, 4);  // like the query heads
  EXPECT_EQ(config->head_dim, 16);
  EXPECT_EQ(config->vocab_size, 8);  // the table's rows
  EXPECT_EQ(config->rope.rotary_dim, 16);
  EXPECT_FLOAT_EQ(config->attention_scale, 0.25f);
  EXPECT_TRUE(config->tied_head);
  EXPECT_TRUE(config->adjacent_rope_rows);
  EXPECT_EQ(config->geometry_id(), "llama-2x4x16");
}

TEST(Config, KnowsEveryArchitecture) {
  for (const std::string& arch : testing::tiny_architectures()) {
    const std::vector<std::byte> file = testing::tiny_model(arch);
    const Result<Gguf> gguf = Gguf::parse(file, arch);
    ASSERT_TRUE(gguf);
    const Result<ModelConfig> config = read_config(*gguf);
    ASSERT_TRUE(config) << config.error().message();
    EXPECT_EQ(config->architecture, arch);
    EXPECT_EQ(config->adjacent_rope_rows, arch == "llama");
    EXPECT_EQ(config->qkv_bias, arch == "qwen2");
    EXPECT_EQ(config->qk_norm, arch != "llama" && arch != "qwen2");
    EXPECT_EQ(config->post_norms, arch == "gemma3");
    EXPECT_EQ(config->num_experts, arch == "qwen3moe" ? 4 : 0);
    if (arch == "gemma3") {
      EXPECT_EQ(config->layer_window, (std::vector<int>{24, 24, 0}));
      EXPECT_FLOAT_EQ(config->embedding_scale, 8.0f);
      EXPECT_EQ(config->geometry_id(), "gemma3-3x2x32-w2x24");
    }
  }
}

struct BadKey {
  const char* key;
  uint32_t value;
  const char* message;  // must be part of it
};

TEST(Config, ImpossibleValuesAreErrors) {
  const BadKey cases[] = {
      {"llama.block_count", 0, "block_count"},
      {"llama.block_count", 4000000000u, "block_count"},
      {"llama.embedding_length", 0, "embedding_length"},
      {"llama.attention.head_count", 0, "head_count"},
      {"llama.attention.head_count_kv", 3, "do not divide"},
      {"llama.attention.key_length", 24, "head dimension"},
      {"llama.attention.key_length", 1024, "head dimension"},
      {"llama.attention.value_length", 32, "value_length"},
      {"llama.rope.dimension_count", 15, "rotary"},
      {"llama.rope.dimension_count", 64, "rotary"},
      {"llama.context_length", 0, "context_length"},
      {"llama.expert_count", 8, "expert_used_count"},
  };
  for (const BadKey& bad : cases) {
    GgufBuilder builder;
    builder.string("general.architecture", "llama");
    const std::pair<const char*, uint32_t> good[] = {
        {"llama.block_count", 2},          {"llama.context_length", 128},
        {"llama.embedding_length", 64},    {"llama.feed_forward_length", 96},
        {"llama.attention.head_count", 4},
    };
    for (const auto& [key, value] : good) {
      if (std::string_view(key) != bad.key) builder.u32(key, value);
    }
    builder.u32(bad.key, bad.value);
    builder.tensor("token_embd.weight", formats::WeightType::kF32, {64, 8},
                   testing::random_weights(formats::WeightType::kF32, 64 * 8, 1));
    const Result<ModelConfig> config = read(builder);
    ASSERT_FALSE(config) << bad.key << " = " << bad.value;
    EXPECT_NE(config.error().message().find(bad.message), std::string::npos)
        << config.error().message();
  }
}

TEST(Config, FloatsThatMakeNoSenseAreErrors) {
  for (const float base : {0.0f, -1.0f, std::nanf(""), INFINITY}) {
    const Result<ModelConfig> config = read(base_model().f32("llama.rope.freq_base", base));
    ASSERT_FALSE(config) << base;
  }
  for (const float epsilon : {0.0f, -1e-6f, 2.0f, std::nanf("")}) {
    EXPECT_FALSE(read(base_model().f32("llama.attention.layer_norm_rms_epsilon", epsilon)));
  }
}

TEST(Config, NamesWhatItDoesNotSupport) {
  const Result<ModelConfig> arch = read(base_model("mamba"));
  ASSERT_FALSE(arch);
  EXPECT_EQ(arch.error().code(), ErrorCode::kUnsupported);
  EXPECT_NE(arch.error().message().find("mamba"), std::string::npos);
  EXPECT_NE(arch.error().message().find("qwen3moe"), std::string::npos);

  const Result<ModelConfig> scaling =
      read(base_model().string("llama.rope.scaling.type", "longrope"));
  ASSERT_FALSE(scaling);
  EXPECT_EQ(scaling.error().code(), ErrorCode::kUnsupported);

  GgufBuilder uneven = base_model();
  uneven.array<uint32_t>("llama.attention.head_count_kv", GgufValueType::kU32, {4, 2});
  const Result<ModelConfig> heads = read(uneven);
  ASSERT_FALSE(heads);
  EXPECT_EQ(heads.error().code(), ErrorCode::kUnsupported);
}

TEST(Config, PerLayerArraysOfOneValueAreThatValue) {
  GgufBuilder builder = base_model();
  builder.array<uint32_t>("llama.attention.head_count_kv", GgufValueType::kU32, {2, 2});
  const Result<ModelConfig> config = read(builder);
  ASSERT_TRUE(config) << config.error().message();
  EXPECT_EQ(config->num_kv_heads, 2);
}

TEST(Config, BuiltinConfigurationsAreValid) {
  for (const std::string_view name : builtin_config_names()) {
    const Result<ModelConfig> config = load_config(std::string(name));
    ASSERT_TRUE(config) << name << ": " << config.error().message();
    EXPECT_EQ(config->name, name);
    EXPECT_FALSE(config->adjacent_rope_rows);
  }
  const Result<ModelConfig> gemma = load_config("gemma-3-270m");
  EXPECT_EQ(std::ranges::count(gemma->layer_window, 0), 3);
  EXPECT_TRUE(gemma->tied_head);
  const Result<ModelConfig> missing = load_config("no-such-config");
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().code(), ErrorCode::kNotFound);
}

TEST(Config, JsonOfTheWrongShapeIsAnError) {
  for (const char* text : {"", "[]", "{}", R"({"model_type": 3})", R"({"model_type": "llama"})",
                           R"({"model_type": "llama", "num_hidden_layers": "two"})"}) {
    EXPECT_FALSE(parse_config_json(text)) << text;
  }
}

TEST(RopeTable, Llama3StretchesLongWavelengthsOnly) {
  const Result<ModelConfig> config = load_config("llama-3.1-8b");
  ASSERT_TRUE(config);
  const RopeTable table = rope_table(*config, false);
  ASSERT_EQ(table.factors.size(), 64u);
  EXPECT_EQ(table.factors.front(), 1.0f);
  EXPECT_EQ(table.factors.back(), 8.0f);
  EXPECT_TRUE(std::ranges::is_sorted(table.factors));
  EXPECT_EQ(table.params.position_scale, 1.0f);
}

TEST(RopeTable, YarnKeepsFastChannelsAndScalesSlowOnes) {
  GgufBuilder builder = base_model();
  builder.string("llama.rope.scaling.type", "yarn")
      .f32("llama.rope.scaling.factor", 4.0f)
      .u32("llama.rope.scaling.original_context_length", 4096);
  const Result<ModelConfig> config = read(builder);
  ASSERT_TRUE(config) << config.error().message();
  const RopeTable table = rope_table(*config, false);
  ASSERT_EQ(table.factors.size(), 8u);
  EXPECT_EQ(table.factors.front(), 1.0f);
  EXPECT_FLOAT_EQ(table.factors.back(), 4.0f);
  EXPECT_FLOAT_EQ(table.params.attention_factor, 1.0f + 0.1f * std::log(4.0f));
}

TEST(RopeTable, LocalLayersHaveTheirOwnBaseAndNoScaling) {
  ModelConfig config = *load_config("gemma-3-270m");
  config.rope.scaling = RopeScaling::kLinear;
  config.rope.scaling_factor = 8;
  EXPECT_EQ(rope_table(config, false).params.position_scale, 0.125f);
  EXPECT_EQ(rope_table(config, false).params.base, 1e6f);
  EXPECT_EQ(rope_table(config, true).params.position_scale, 1.0f);
  EXPECT_EQ(rope_table(config, true).params.base, 1e4f);
}

TEST(Architectures, AreFoundByEitherName) {
  for (const Architecture* row : architectures()) {
    EXPECT_EQ(*find_architecture(row->name), row);
    EXPECT_EQ(*find_architecture(row->hf_type), row);
  }
}

}  // namespace
}  // namespace kvant::model
