#include "kvant/formats/plan.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>

#include "kvant/formats/safetensors.h"

namespace kvant::formats {
namespace {

namespace fs = std::filesystem;

class PlanTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ =
        fs::temp_directory_path() / ("kvant_plan_test_" + std::to_string(::getpid()) + "_" +
                                     testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }
  std::string path(const std::string& name) const { return (folder_ / name).string(); }
  fs::path folder_;
};

constexpr int kHeads = 2, kDim = 16, kLayers = 3;

QuantPlan sample_plan() {
  QuantPlan plan;
  plan.geometry_id = "geometry";
  plan.weights_id = "weights";
  plan.corpus_sha256 = "corpus";
  plan.kv = "k=nvfp4+bias+smooth,v=fp8:head";
  for (int i = 0; i < kLayers; ++i) {
    LayerPlan layer;
    layer.num_kv_heads = kHeads;
    layer.head_dim = kDim;
    layer.k.global_scale = {0.25f};
    layer.v.global_scale = {0.5f, 2.0f};
    layer.k.bias.assign(kHeads * kDim, 0.0f);
    layer.k.smooth.assign(kHeads * kDim, 1.0f);
    for (int c = 0; c < kHeads * kDim; ++c)
      layer.k.bias[static_cast<size_t>(c)] = static_cast<float>(c - i);
    plan.layers.push_back(layer);
  }
  return plan;
}

Status check(const QuantPlan& plan) {
  return check_plan(plan, *parse_cache_format("k=nvfp4+bias+smooth,v=fp8:head"), kLayers, kHeads,
                    kDim);
}

void expect_error(const Status& status, std::initializer_list<std::string_view> parts) {
  ASSERT_FALSE(status);
  EXPECT_EQ(status.error().code(), ErrorCode::kInvalidArgument);
  for (std::string_view part : parts) {
    EXPECT_NE(status.error().message().find(part), std::string::npos) << status.error().message();
  }
}

// A safetensors file with the given header and data.
std::vector<std::byte> raw_file(std::string_view header, size_t data_bytes) {
  std::vector<std::byte> bytes(8 + header.size() + data_bytes);
  const uint64_t size = header.size();
  std::memcpy(bytes.data(), &size, 8);
  std::memcpy(bytes.data() + 8, header.data(), header.size());
  return bytes;
}

constexpr std::string_view kMetadata =
    R"("__metadata__":{"kvant_plan_version":"1","geometry_id":"g","weights_id":"w","corpus_sha256":"c","kv":"nvfp4"})";

std::string parse_error(const std::string& tensors, size_t data_bytes,
                        std::string_view metadata = kMetadata) {
  std::string header = "{" + std::string(metadata);
  if (!tensors.empty()) header += "," + tensors;
  const auto plan = QuantPlan::parse(raw_file(header + "}", data_bytes), "file");
  return plan ? "" : plan.error().message();
}

TEST_F(PlanTest, SavesAndLoads) {
  const QuantPlan plan = sample_plan();
  ASSERT_TRUE(plan.save(path("plan")));
  const Result<QuantPlan> loaded = QuantPlan::load(path("plan"));
  ASSERT_TRUE(loaded) << loaded.error().message();
  EXPECT_EQ(loaded->geometry_id, plan.geometry_id);
  EXPECT_EQ(loaded->weights_id, plan.weights_id);
  EXPECT_EQ(loaded->corpus_sha256, plan.corpus_sha256);
  EXPECT_EQ(loaded->kv, plan.kv);
  ASSERT_EQ(loaded->layers.size(), plan.layers.size());
  for (size_t i = 0; i < plan.layers.size(); ++i) {
    EXPECT_EQ(loaded->layers[i].k.global_scale, plan.layers[i].k.global_scale);
    EXPECT_EQ(loaded->layers[i].k.bias, plan.layers[i].k.bias);
    EXPECT_EQ(loaded->layers[i].k.smooth, plan.layers[i].k.smooth);
    EXPECT_EQ(loaded->layers[i].v.global_scale, plan.layers[i].v.global_scale);
    EXPECT_TRUE(loaded->layers[i].v.bias.empty());
  }
  EXPECT_TRUE(check(*loaded));
  const SideParams params = loaded->side_params(1, true, 1, kDim);
  EXPECT_EQ(params.global_scale, 0.25f);
  EXPECT_EQ(params.bias[0], static_cast<float>(kDim - 1));
  EXPECT_EQ(params.smooth[0], 1.0f);
  EXPECT_EQ(loaded->side_params(0, false, 1, kDim).global_scale, 2.0f);
  EXPECT_EQ(loaded->side_params(99, false, 1, kDim).global_scale, 1.0f);
}

TEST_F(PlanTest, SavingIsAtomicAndErrorsNameThePath) {
  const QuantPlan plan = sample_plan();
  ASSERT_TRUE(plan.save(path("plan")));
  ASSERT_TRUE(plan.save(path("plan")));
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_), fs::directory_iterator()), 1);
  const Status status = plan.save(path("no/such/folder/plan"));
  ASSERT_FALSE(status);
  EXPECT_EQ(status.error().code(), ErrorCode::kIoError);
  EXPECT_NE(status.error().message().find("no/such/folder/plan"), std::string::npos);
  EXPECT_EQ(QuantPlan::load(path("absent")).error().code(), ErrorCode::kNotFound);
}

TEST_F(PlanTest, EveryTruncationAndBitFlipIsHandled) {
  ASSERT_TRUE(sample_plan().save(path("plan")));
  std::ifstream in(path("plan"), std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  std::vector<std::byte> bytes(text.size());
  std::memcpy(bytes.data(), text.data(), text.size());
  for (size_t n = 0; n < bytes.size(); ++n) {
    const auto plan = QuantPlan::parse(std::span(bytes).first(n), "file");
    ASSERT_FALSE(plan) << n;
    ASSERT_EQ(plan.error().code(), ErrorCode::kCorruptData) << n;
  }
  for (size_t i = 0; i < std::min<size_t>(bytes.size(), 2048); ++i) {
    std::vector<std::byte> flipped = bytes;
    flipped[i] ^= std::byte{0x10};
    (void)QuantPlan::parse(flipped, "file");  // an error or another plan, never a crash
  }
}

TEST_F(PlanTest, HostileHeaders) {
  const auto has = [](const std::string& message, std::string_view part) {
    return message.find(part) != std::string::npos ? testing::AssertionSuccess()
                                                   : testing::AssertionFailure() << message;
  };
  const std::string bias =
      R"("layers.0.k.bias":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]})";
  EXPECT_EQ(parse_error(bias, 8), "");
  EXPECT_TRUE(has(parse_error(bias, 9), "belong to no tensor"));
  EXPECT_TRUE(has(parse_error(bias, 7), "data_offsets do not lie in"));
  EXPECT_TRUE(has(parse_error(bias + "," + bias, 8), "listed twice"));
  EXPECT_TRUE(has(
      parse_error(R"("layers.0.k.bias":{"dtype":"F32","shape":[1,2],"data_offsets":[4,12]})", 12),
      "hole"));
  EXPECT_TRUE(
      has(parse_error(R"("layers.0.k.bias":{"dtype":"F32","shape":[1,3],"data_offsets":[0,8]})", 8),
          "needs 12 bytes"));
  EXPECT_TRUE(has(
      parse_error(
          R"("layers.0.k.bias":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,8]})",
          8),
      "too many"));
  EXPECT_TRUE(has(
      parse_error(R"("layers.0.k.bias":{"dtype":"F32","shape":[-1,2],"data_offsets":[0,8]})", 8),
      "plausible"));
  EXPECT_TRUE(
      has(parse_error(R"("layers.0.k.bias":{"dtype":"F32","shape":[2],"data_offsets":[0,8]})", 8),
          "[KV heads, head_dim]"));
  EXPECT_TRUE(
      has(parse_error(R"("layers.0.k.bias":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]})", 8),
          "plans hold F32"));
  EXPECT_TRUE(
      has(parse_error(
              R"("layers.0.k.bias":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8],"x":1})", 8),
          "nothing else"));
  EXPECT_TRUE(
      has(parse_error(R"("layers.0.k.bais":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]})", 8),
          "layers.N.k.FIELD"));
  EXPECT_TRUE(has(
      parse_error(R"("layers.00.k.bias":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]})", 8),
      "layers.N.k.FIELD"));
  EXPECT_TRUE(
      has(parse_error(
              R"("layers.9999999.k.bias":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]})", 8),
          "at most 4096 layers"));
  EXPECT_TRUE(has(
      parse_error(R"("layers.0.k.codebook":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]})", 8),
      "codebook formats"));
  EXPECT_TRUE(has(parse_error("", 0, R"("__metadata__":{})"), "no 'kvant_plan_version'"));
  EXPECT_TRUE(
      has(parse_error("", 0, R"("__metadata__":{"kvant_plan_version":"2"})"), "reads up to 1"));
  EXPECT_TRUE(
      has(parse_error("", 0, R"("__metadata__":{"kvant_plan_version":1})"), "not a string"));
  EXPECT_TRUE(has(QuantPlan::parse(raw_file(std::string(60000, '['), 0), "file").error().message(),
                  "no JSON header"));
  EXPECT_TRUE(has(
      QuantPlan::parse(raw_file("{\"a\":" + std::string(60000, '['), 0), "file").error().message(),
      "JSON object"));
}

TEST_F(PlanTest, MissingOrImplausibleTermsAreNamed) {
  EXPECT_TRUE(check(sample_plan()));
  QuantPlan plan = sample_plan();
  plan.layers[1].k.bias.clear();
  expect_error(check(plan), {"layers.1.k.bias is missing", "+bias", "[2, 16]", "calibrate"});
  plan = sample_plan();
  plan.layers.pop_back();
  expect_error(check(plan), {"layers.2.k.bias is missing"});
  plan = sample_plan();
  plan.layers[2].k.smooth[5] = 0.0f;
  expect_error(check(plan), {"layers.2.k.smooth[5] is 0", "expected"});
  plan = sample_plan();
  plan.layers[0].k.bias[3] = std::numeric_limits<float>::quiet_NaN();
  expect_error(check(plan), {"layers.0.k.bias[3] is nan"});
  plan = sample_plan();
  plan.layers[0].k.global_scale[0] = -0.5f;
  expect_error(check(plan), {"layers.0.k.global_scale[0] is -0.5"});
  plan = sample_plan();
  plan.layers[1].v.global_scale.clear();
  expect_error(check(plan), {"layers.1.v.global_scale is missing", "other layers"});
  plan = sample_plan();
  plan.layers[1].k.global_scale = {1.0f, 1.0f};
  expect_error(check(plan), {"layers.1.k.global_scale has 2 values", "expected 1"});
  plan = sample_plan();
  plan.layers.emplace_back();
  expect_error(check(plan), {"4 layers", "model 3", "another geometry"});
  expect_error(
      check_plan(sample_plan(), *parse_cache_format("k=nvfp4+bias,v=bf16"), kLayers, 1, kDim),
      {"layers.0.k.bias", "[1, 16]", "another geometry"});
  // What the format does not declare is not looked at.
  plan = sample_plan();
  plan.layers[1].k.bias.clear();
  EXPECT_TRUE(check_plan(plan, *parse_cache_format("int8"), kLayers, kHeads, kDim));
  EXPECT_TRUE(check_plan(QuantPlan(), *parse_cache_format("nvfp4"), kLayers, kHeads, kDim));
}

TEST(Safetensors, RoundTrip) {
  const float values[3] = {1.0f, 2.0f, 3.0f};
  Safetensors file;
  file.metadata["key"] = "value";
  file.tensors.push_back({"b", "F32", {3}, std::as_bytes(std::span(values))});
  file.tensors.push_back({"a", "F32", {0, 4}, {}});
  const std::string text = serialize_safetensors(file);
  const auto parsed = parse_safetensors(std::as_bytes(std::span(text)));
  ASSERT_TRUE(parsed) << parsed.error().message();
  EXPECT_EQ(parsed->metadata.at("key"), "value");
  ASSERT_EQ(parsed->tensors.size(), 2u);
  EXPECT_EQ(parsed->tensors[0].name, "a");
  EXPECT_EQ(parsed->tensors[1].shape, (std::vector<int64_t>{3}));
  EXPECT_EQ(std::memcmp(parsed->tensors[1].bytes.data(), values, sizeof(values)), 0);
}

}  // namespace
}  // namespace kvant::formats
