// `kvant inspect` on page, plan, model and broken files.
#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kvant/cache/page_object.h"
#include "kvant/formats/plan.h"
#include "tests/support/program.h"

namespace kvant {
namespace {

using testing::run_kvant;

class Inspect : public ::testing::Test {
 protected:
  std::string path(const char* name) const {
    return ::testing::TempDir() + "kvant_inspect_test_" + name;
  }
  void TearDown() override {
    for (const char* name : {"page", "plan", "other"}) std::remove(path(name).c_str());
  }
  void write(const char* name, const std::string& bytes) const {
    std::ofstream(path(name), std::ios::binary) << bytes;
  }
};

TEST_F(Inspect, SaysWhatAPageFileHolds) {
  cache::PageObjectHeader header;
  header.page_tokens = header.num_tokens = 32;
  header.layer_group = 1;
  header.num_kv_heads = 4;
  header.first_position = 96;
  header.key[0] = 0xab;
  for (uint32_t i = 0; i < 32; ++i) header.token_ids.push_back(7000 + i);
  const std::vector<std::byte> payload(2048);
  ASSERT_TRUE(cache::save_page_file(path("page"), cache::build_page_object(header, payload)));
  const auto words = run_kvant({"inspect", path("page")});
  EXPECT_EQ(words.exit_code, 0) << words.err;
  EXPECT_NE(words.out.find("32 tokens at positions 96 to 127 (page 3)"), std::string::npos);
  EXPECT_NE(words.out.find("7031"), std::string::npos);
  const auto json = run_kvant({"inspect", "--json", path("page")});
  ASSERT_EQ(json.exit_code, 0) << json.err;
  const nlohmann::json object = nlohmann::json::parse(json.out);
  EXPECT_EQ(object["schema_version"], 1);
  EXPECT_EQ(object["kind"], "page");
  EXPECT_EQ(object["payload_bytes"], 2048);
  EXPECT_EQ(object["first_position"], 96);
  EXPECT_EQ(object["token_ids"][31], 7031);
  EXPECT_EQ(object["key"].get<std::string>().substr(0, 4), "ab00");
}

TEST_F(Inspect, SaysWhatAPlanHolds) {
  formats::QuantPlan plan;
  plan.geometry_id = "llama-2x1x16";
  plan.weights_id = "w";
  plan.kv = "k=fp8:head,v=nvfp4";
  plan.layers.resize(2);
  for (formats::LayerPlan& layer : plan.layers) layer.k.global_scale = {0.5f};
  const Status saved = plan.save(path("plan"));
  ASSERT_TRUE(saved.has_value()) << saved.error().message();
  const auto words = run_kvant({"inspect", path("plan")});
  EXPECT_EQ(words.exit_code, 0) << words.err;
  EXPECT_NE(words.out.find("llama-2x1x16"), std::string::npos);
  EXPECT_NE(words.out.find("all 2 layers"), std::string::npos);
}

TEST_F(Inspect, SaysWhatAModelHolds) {
  const std::string model = testing::model_path("smollm2");
  if (model.empty()) GTEST_SKIP() << "SmolLM2 has not been fetched";
  const auto json = run_kvant({"inspect", "--json", "--metadata", "--tensors", model});
  ASSERT_EQ(json.exit_code, 0) << json.err;
  const nlohmann::json object = nlohmann::json::parse(json.out);
  EXPECT_EQ(object["kind"], "model");
  EXPECT_EQ(object["supported"], true);
  EXPECT_EQ(object["geometry"]["num_layers"], 30);
  EXPECT_EQ(object["tensors"].size(), 272u);
  EXPECT_EQ(object["tensor_types"]["Q4_1"]["count"], 210);
}

TEST_F(Inspect, BrokenAndForeignFilesAreErrors) {
  const auto code = [&](const std::string& bytes) {
    write("other", bytes);
    const auto result = run_kvant({"inspect", path("other")});
    EXPECT_NE(result.err.find(path("other")), std::string::npos) << result.err;
    return result.exit_code;
  };
  EXPECT_EQ(code("just text"), 65);
  EXPECT_EQ(code("GGUF"), 65);
  EXPECT_EQ(code("KVNTPAGE and nothing else"), 65);
  EXPECT_EQ(code(std::string("\x10\0\0\0\0\0\0\0{broken", 15)), 65);
  EXPECT_EQ(run_kvant({"inspect", path("missing")}).exit_code, 66);
  EXPECT_EQ(run_kvant({"inspect"}).exit_code, 64);
}

}  // namespace
}  // namespace kvant
