// `kvant calibrate` on SmolLM2, and what other commands do with its plans.
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kvant/formats/plan.h"
#include "tests/e2e/model_fixture.h"

namespace kvant::testing {
namespace {

using nlohmann::json;

class Calibrate : public ModelCommands {
 protected:
  // A plan of two short chunks.
  json calibrate(const std::string& kv, const std::string& file, const std::string& threads = "2") {
    std::vector<std::string> arguments = {"--text", text_,           "--ctx", "128", "--chunks",
                                          "2",      "--page-tokens", "16",    "-t",  threads,
                                          "-o",     path(file)};
    if (!kv.empty()) arguments.insert(arguments.end(), {"--kv", kv});
    return run_json("calibrate", arguments);
  }
  // Mean KL divergence to bf16 of one format read with a plan.
  double kl(const std::string& kv, const std::string& plan) {
    std::vector<std::string> arguments = {"eval", model_,     "--json", "--kv",          "bf16",
                                          "--kv", kv,         "--text", text_,           "--ctx",
                                          "128",  "--chunks", "1",      "--page-tokens", "16"};
    if (!plan.empty()) arguments.insert(arguments.end(), {"--plan", path(plan)});
    const ProgramResult result = run_kvant(arguments);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    warnings_ = result.err.find("warning") != std::string::npos ? result.err : std::string();
    const json object = json::parse(result.out, nullptr, false);
    return object["results"][1]["kl_mean"].get<double>();
  }
  std::string bytes(const std::string& file) const {
    std::ifstream in(path(file), std::ios::binary);
    return std::string((std::istreambuf_iterator<char>(in)), {});
  }
  std::string warnings_;
};

TEST_F(Calibrate, WritesAPlanThatOtherCommandsRead) {
  const json result = calibrate("", "plan");
  EXPECT_EQ(result["chunks"], 2);
  EXPECT_EQ(result["tokens"], 256);
  EXPECT_EQ(result["output_bytes"], bytes("plan").size());
  EXPECT_EQ(result["corpus_sha256"].get<std::string>().size(), 64u);
  std::vector<std::string> names;
  for (const json& tensor : result["tensors"]) {
    names.push_back(tensor["name"]);
    EXPECT_EQ(tensor["layers"], 30);
  }
  EXPECT_EQ(names,
            (std::vector<std::string>{"k.global_scale", "k.bias", "k.smooth", "v.global_scale"}));
  const ProgramResult words = run_kvant({"inspect", path("plan")});
  EXPECT_EQ(words.exit_code, 0) << words.err;
  EXPECT_NE(words.out.find(result["kv_resolved"].get<std::string>()), std::string::npos);
  EXPECT_NE(words.out.find("all 30 layers"), std::string::npos);

  // Formats with other options than the plan was made for.
  const double plain = kl("k=nvfp4,v=bf16+sink", "plan");
  EXPECT_NE(warnings_.find("--kv k=nvfp4,v=bf16+sink"), std::string::npos) << warnings_;
  EXPECT_EQ(plain, kl("k=nvfp4,v=bf16+sink", ""));
  EXPECT_LT(kl("k=nvfp4+bias+smooth,v=bf16+sink", "plan"), 0.9 * plain);
  EXPECT_EQ(warnings_, "");
  EXPECT_GT(kl("k=nvfp4+smooth,v=bf16+sink", "plan"), 0);
  EXPECT_LT(kl("k=int8+bias,v=int8+sink", "plan"), 0.002);
  EXPECT_EQ(warnings_, "");
  EXPECT_GT(kl("4bit", "plan"), 0);
  EXPECT_EQ(warnings_, "");
}

TEST_F(Calibrate, ScalesReachTheCodec) {
  calibrate("fp8", "fp8");
  const double with_plan = kl("fp8", "fp8");
  EXPECT_EQ(warnings_, "");
  const double without = kl("fp8", "");
  EXPECT_NE(with_plan, without);
  EXPECT_LT(with_plan, 0.05);
  // A scale of 2^-10 of what it should be saturates everything.
  auto plan = formats::QuantPlan::load(path("fp8"));
  ASSERT_TRUE(plan);
  for (formats::LayerPlan& layer : plan->layers) layer.k.global_scale[0] /= 1024;
  ASSERT_TRUE(plan->save(path("small")));
  EXPECT_GT(kl("fp8", "small"), 10 * with_plan);
}

TEST_F(Calibrate, ThreadsDoNotChangeAByte) {
  const json one = calibrate("k=nvfp4+bias+smooth+rot,v=fp8:head+bias+sink", "one", "1");
  calibrate("k=nvfp4+bias+smooth+rot,v=fp8:head+bias+sink", "three", "3");
  EXPECT_FALSE(bytes("one").empty());
  EXPECT_EQ(bytes("one"), bytes("three"));
}

TEST_F(Calibrate, OtherGeometryIsAnErrorOtherWeightsAWarning) {
  calibrate("fp8", "plan");
  auto plan = formats::QuantPlan::load(path("plan"));
  ASSERT_TRUE(plan);
  plan->weights_id[0] = plan->weights_id[0] == '0' ? '1' : '0';
  ASSERT_TRUE(plan->save(path("weights")));
  EXPECT_LT(kl("fp8", "weights"), 0.05);
  EXPECT_NE(warnings_.find("other weights"), std::string::npos) << warnings_;
  plan->geometry_id = "llama-2x1x16";
  ASSERT_TRUE(plan->save(path("geometry")));
  expect_error({"eval", model_, "--text", text_, "--plan", path("geometry")}, 64,
               {path("geometry"), "llama-2x1x16", "calibrate"});
  expect_error({"run", model_, "-p", "x", "--kv", "nvfp4+bias", "--plan", path("plan")}, 64,
               {"layers.0.k.bias is missing", "calibrate"});
}

TEST_F(Calibrate, RejectsWhatCannotBe) {
  const std::string out = path("plan");
  expect_error({"calibrate", model_, "--text", text_}, 64, {"--output"});
  expect_error({"calibrate", model_, "-o", out, "--kv", "int8"}, 64, {"int8 needs no plan"});
  expect_error({"calibrate", model_, "-o", out, "--kv", "fp8,nvfp4"}, 64, {"one cache format"});
  expect_error({"calibrate", model_, "-o", out, "--kv", "nvfp5"}, 64, {"nvfp5"});
  expect_error({"calibrate", model_, "-o", out, "--smooth-alpha", "2"}, 64, {"smooth-alpha"});
  expect_error({"calibrate", model_, "-o", out, "--text", path("none.txt")}, 66, {"none.txt"});
  expect_error({"calibrate", model_, "-o", out, "--text", write("short.txt", "too short")}, 64,
               {"fewer than one chunk"});
  expect_error({"calibrate", model_, "-o", out, "--ctx", "64", "--chunks", "1"}, 64,
               {"beside the first one"});
  expect_error({"calibrate", model_, "-o", out, "--ctx", "8200"}, 64, {"8192"});
  expect_error({"calibrate", model_, "-o", path("no/such/folder"), "--ctx", "128", "--chunks", "1"},
               74, {"no/such/folder"});
  EXPECT_FALSE(std::filesystem::exists(out));
}

TEST_F(Calibrate, InterruptedItSavesNothing) {
  ProgramOptions options;
  options.interrupt_after_ms = 1500;
  const ProgramResult result = run_kvant({"calibrate", model_, "-o", path("plan")}, options);
  EXPECT_EQ(result.exit_code, 130) << result.err;
  EXPECT_TRUE(std::filesystem::is_empty(folder_));
}

}  // namespace
}  // namespace kvant::testing
