// What the commands that run a model promise, on SmolLM2: results, JSON fields, exit codes.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "tests/e2e/model_fixture.h"

namespace kvant::testing {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

// ---- run: what run_test.cc does not cover ----

TEST_F(ModelCommands, RunAnswersAndTokenizeAgrees) {
  const std::string prompt = "The capital of France is";
  const json first = run_json("run", {"-p", prompt, "--raw", "-n", "8", "--temp", "0"});
  EXPECT_NE(first["text"].get<std::string>().find("Paris"), std::string::npos) << first["text"];
  EXPECT_EQ(first["token_ids"].size(), 8u);
  EXPECT_TRUE(first["stats"].is_object());

  ProgramOptions with_prompt;
  with_prompt.input = prompt;
  const ProgramResult ids = run_kvant({"tokenize", model_}, with_prompt);
  EXPECT_EQ(json::parse(ids.out), first["prompt_ids"]);
  ProgramOptions with_ids;
  with_ids.input = first["token_ids"].dump();
  EXPECT_EQ(run_kvant({"tokenize", model_, "--decode"}, with_ids).out, first["text"]);
}

TEST_F(ModelCommands, RunRejectsImpossibleContexts) {
  expect_error({"run", model_, "-p", "x", "-c", "0"}, 64);
  expect_error({"run", model_, "-p", "x", "-c", "100000000"}, 64, {"8192"});
  expect_error({"run", model_, "-p", "x", "-n", "1", "--memory-limit", "1MiB"}, 75);
  // A context nobody asked for is as long as the limit allows; one asked for is refused.
  run_json("run", {"-p", "x", "-n", "1", "--kv", "bf16", "--memory-limit", "180M"});
  expect_error(
      {"run", model_, "-p", "x", "-n", "1", "--kv", "bf16", "-c", "8192", "--memory-limit", "180M"},
      75, {"--memory-limit", "8192"});
  expect_error({"run", model_, "-p", "x", "--page-tokens", "7"}, 64);
  expect_error({"run", model_, "-p", "x", "--prefill-workspace", "much"}, 64, {"much"});
  expect_error({"run", model_, "-p", "x", "--attn", "int4"}, 64, {"16bit", "fp8"});
  expect_error({"run", model_, "-p", "x", "--weights", "fp16"}, 64, {"fp16", "fp8", "F8_E4M3"});
  expect_error({"run", model_, "-p", "x", "--weights", "dummy:F8"}, 64, {"F8", "F8_E4M3"});
  expect_error({"run", model_, "-p", "x", "--attn", "fp8"}, 69, {"--device cuda", "--attn 16bit"});
}

// Without a GPU, or in a build without CUDA, the error says what to do.
TEST_F(ModelCommands, DevicesThatAreMissingAreNamed) {
  expect_error({"run", model_, "-p", "x", "--device", "gpu"}, 69, {"gpu", "cpu"});
  const ProgramResult result = run_kvant({"run", model_, "-p", "x", "-n", "1", "--device", "cuda"});
  if (result.exit_code == 0) return;  // a GPU host
  EXPECT_EQ(result.exit_code, 69) << result.err;
  EXPECT_NE(result.err.find("cpu"), std::string::npos) << result.err;
}

TEST_F(ModelCommands, RunEndsCleanlyOnFullDisksAndClosedPipes) {
  ProgramOptions full;
  full.stdout_to = "/dev/full";
  expect_error({"run", model_, "-p", "x", "-n", "2"}, 74, {"No space left"}, full);
  ProgramOptions closed;
  closed.close_stdout_after = 1;
  const ProgramResult result = run_kvant(
      {"run", model_, "-p", "Tell me a long story.", "-n", "400", "--temp", "0", "--quiet"},
      closed);
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(result.err, "");
}

TEST_F(ModelCommands, RunRejectsDamagedModels) {
  const std::string text = write("text.gguf", "this is no model");
  expect_error({"run", text, "-p", "x", "-n", "1"}, 65, {text});
  expect_error({"run", path("none.gguf"), "-p", "x"}, 66, {"none.gguf"});
}

// ---- eval ----

TEST_F(ModelCommands, EvalComparesFormats) {
  const json result = run_json("eval", {"--kv", "bf16,8bit,k=int4:channel,v=nvfp4+46+sink", "--kv",
                                        "nvfp4", "--text", text_, "--ctx", "256", "--chunks", "2"});
  EXPECT_EQ(result["chunks"], 2);
  EXPECT_EQ(result["tokens_scored"], 2 * 127);
  const json& rows = result["results"];
  ASSERT_EQ(rows.size(), 4u);
  const std::vector<std::string> asked = {"bf16", "8bit", "k=int4:channel,v=nvfp4+46+sink",
                                          "nvfp4"};
  for (size_t i = 0; i < asked.size(); ++i) {
    EXPECT_EQ(rows[i]["kv"], asked[i]);
    for (const char* field : {"kv_resolved", "bits_per_value", "bits_per_value_asymptotic", "ppl",
                              "nll", "kl_mean", "kl_median", "kl_p99", "top1"}) {
      EXPECT_TRUE(rows[i].contains(field)) << field;
    }
    const double ppl = rows[i]["ppl"];
    EXPECT_GT(ppl, 2);
    EXPECT_LT(ppl, 100);
  }
  EXPECT_EQ(rows[0]["kl_mean"], 0);
  EXPECT_EQ(rows[0]["top1"], 1);
  EXPECT_EQ(rows[0]["bits_per_value"], 16);
  EXPECT_EQ(rows[1]["kv_resolved"], "k=int8+mean,v=int8+sink");
  const auto kl = [&](size_t i) { return rows[i]["kl_mean"].get<double>(); };
  EXPECT_LT(kl(1), 0.001);
  EXPECT_LT(kl(1), kl(2));
  EXPECT_LT(kl(2), kl(3));
  EXPECT_LT(kl(3), 0.5);
  EXPECT_NEAR(rows[2]["bits_per_value_asymptotic"].get<double>(), 4.5, 0.1);
  EXPECT_GT(rows[2]["bits_per_value"], rows[2]["bits_per_value_asymptotic"]);
}

TEST_F(ModelCommands, EvalComparesWithASavedBase) {
  const std::string base = path("base.kld");
  const std::vector<std::string> chunks = {"--text",   text_, "--ctx",         "128",
                                           "--chunks", "2",   "--page-tokens", "16"};
  auto saving = chunks;
  saving.insert(saving.end(), {"--kv", "bf16", "--save-logits", base});
  const json saved = run_json("eval", saving);
  const json same =
      run_json("eval", {"--kv", "bf16,4bit", "--kl-base", base, "--page-tokens", "16"});
  EXPECT_NEAR(same["results"][0]["kl_mean"].get<double>(), 0, 1e-5);
  EXPECT_NEAR(same["results"][0]["ppl"].get<double>(), saved["results"][0]["ppl"].get<double>(),
              1e-6);
  EXPECT_EQ(same["results"][0]["top1"], 1);
  EXPECT_GT(same["results"][1]["kl_mean"], 1e-5);
  auto both = chunks;
  both.insert(both.end(), {"--kv", "bf16,4bit"});
  const json direct = run_json("eval", both);
  // The file's steps of 16 / 65,535 are off by up to 1.2e-4, 7e-5 rms: 6e-6 in the mean of 126.
  EXPECT_NEAR(direct["results"][1]["kl_mean"].get<double>(),
              same["results"][1]["kl_mean"].get<double>(), 4e-5);

  std::ifstream in(base, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(in)), {});
  const std::string cut = write("cut.kld", bytes.substr(0, bytes.size() / 2));
  expect_error({"eval", model_, "--kl-base", cut}, 65, {"cut short"});
  expect_error({"eval", model_, "--kl-base", text_}, 65, {"not a logits file"});
  expect_error({"eval", model_, "--kl-base", base, "--ctx", "64"}, 64, {"--ctx 64"});
  const std::string other =
      write("other.txt", std::string(5000, 'x') + " y z " + std::string(5000, 'q'));
  expect_error({"eval", model_, "--kl-base", base, "--text", other}, 64, {"another text"});
}

TEST_F(ModelCommands, EvalHasATextOfItsOwn) {
  const json own = run_json("eval", {"--ctx", "64", "--chunks", "1", "--kv", "bf16"});
  EXPECT_EQ(own["text"], "bundled");
  const std::string file = std::string(KVANT_SOURCE_DIR) + "/examples/data/registers.txt";
  const json named =
      run_json("eval", {"--ctx", "64", "--chunks", "1", "--kv", "bf16", "--text", file});
  EXPECT_EQ(named["text"], file);
  EXPECT_EQ(named["results"], own["results"]);
}

// Quantising at append reads the own page through the codec too, where a page is closed later.
TEST_F(ModelCommands, EvalQuantisesAtAppend) {
  const json result = run_json("eval", {"--ctx", "128", "--chunks", "2", "--kv",
                                        "bf16,nvfp4,nvfp4+strict,k=fp8:token,v=int4+strict"});
  const json& rows = result["results"];
  EXPECT_EQ(rows[2]["kv_resolved"], "k=nvfp4,v=nvfp4+strict");
  EXPECT_GT(rows[2]["kl_mean"].get<double>(), 1.3 * rows[1]["kl_mean"].get<double>());
  EXPECT_GT(rows[3]["kl_mean"], 1e-4);
  expect_error({"eval", model_, "--kv", "4bit+strict"}, 64, {"+strict", "int4:channel"});
  expect_error({"eval", model_, "--kv", "8bit+strict"}, 64, {"+strict", "one token", "+mean"});
}

TEST_F(ModelCommands, EvalWritesAReport) {
  const std::string folder = path("out/report");
  const json result =
      run_json("eval", {"--kv", "bf16,8bit,4bit", "--ctx", "64", "--chunks", "2", "--page-tokens",
                        "16", "--by-layer", "1", "--report", folder});
  const json& row = result["results"][2];
  ASSERT_EQ(row["by_layer"].size(), 30u);
  for (const json& layer : row["by_layer"]) {
    EXPECT_GT(layer["kl_mean"], 0);
    EXPECT_LT(layer["kl_mean"], 0.05);
  }
  EXPECT_EQ(row["by_position"].front()["first"], 32);
  EXPECT_EQ(row["by_position"].back()["last"], 62);
  EXPECT_LT(row["kl_low"], row["kl_mean"]);
  EXPECT_GT(row["kl_high"], row["kl_mean"]);
  EXPECT_EQ(result["paired"].size(), 1u);
  std::ifstream in(folder + "/report.json");
  EXPECT_EQ(json::parse(in), result);
  for (const char* name : {"report.md", "report.html", "kl-by-bits.svg", "kl-by-layer.svg"}) {
    EXPECT_TRUE(fs::exists(folder + "/" + name)) << name;
  }
  expect_error({"eval", model_, "--report", text_}, 74, {text_});
}

TEST_F(ModelCommands, EvalRejectsWhatCannotBe) {
  expect_error({"eval", model_, "--text", path("none.txt")}, 66, {"none.txt"});
  expect_error({"eval", model_, "--text", write("short.txt", "too short")}, 64,
               {"fewer than one chunk"});
  expect_error({"eval", model_, "--text", text_, "--ctx", "1000000"}, 64);
  expect_error({"eval", model_, "--text", text_, "--kv", "nvfp5"}, 64, {"nvfp5", "nvfp4"});
  expect_error({"eval", model_, "--text", text_, "--kv", "nvfp4+mean+mean"}, 64, {"mean"});
  expect_error({"eval", model_, "--text", text_, "--ctx", "64", "--chunks", "1", "--save-logits",
                "/dev/full"},
               74, {"No space left"});
  expect_error({"eval", model_, "--text", text_, "--ctx", "64", "--chunks", "1", "--save-logits",
                "/nonexistent/base.kld"},
               74, {"/nonexistent/base.kld"});
}

TEST_F(ModelCommands, InterruptedEvalSavesNothing) {
  const std::string base = path("base.kld");
  ProgramOptions options;
  options.interrupt_after_ms = 1500;
  const ProgramResult result = run_kvant({"eval", model_, "--kv", "bf16,8bit,4bit", "--text", text_,
                                          "--ctx", "512", "--save-logits", base},
                                         options);
  EXPECT_EQ(result.exit_code, 130) << result.err;
  EXPECT_EQ(result.out, "");
  EXPECT_TRUE(fs::is_empty(folder_));
}

// ---- compare ----

TEST_F(ModelCommands, CompareShowsOneRowAFormat) {
  const json result = run_json("compare", {"--kv", "bf16", "--kv", "8bit,4bit", "--text", text_,
                                           "--max-tokens", "512", "-n", "4"});
  EXPECT_EQ(result["tokens"], 512);
  const json& rows = result["results"];
  ASSERT_EQ(rows.size(), 3u);
  for (const json& row : rows) {
    EXPECT_GT(row["prefill_tokens_per_second"], 0);
    EXPECT_GT(row["decode_tokens_per_second"], 0);
  }
  // 30 layers, 3 KV heads of 64, keys and values of 2 bytes.
  EXPECT_EQ(rows[0]["cache_bytes_per_token"], 30 * 3 * 64 * 2 * 2);
  EXPECT_LT(rows[2]["cache_bytes_per_token"], 0.3 * rows[0]["cache_bytes_per_token"].get<double>());
  EXPECT_LT(rows[2]["cache_bytes_now"], rows[1]["cache_bytes_now"]);
  EXPECT_LT(rows[1]["cache_bytes_now"], rows[0]["cache_bytes_now"]);
  EXPECT_EQ(rows[0]["kl_mean"], 0);
  EXPECT_LT(rows[1]["kl_mean"], rows[2]["kl_mean"]);
}

// ---- plan ----

int64_t sum_of_parts(const json& row) {
  int64_t sum = 0;
  for (const char* part : {"weights_in_file_bytes", "weights_bytes", "parameters_bytes",
                           "closed_pages_bytes", "bf16_pages_bytes", "staging_bytes",
                           "tables_bytes", "activations_bytes", "workspace_bytes"}) {
    sum += row[part].get<int64_t>();
  }
  return sum;
}

int64_t sum_of_pages(const json& row, const std::string& kind) {
  int64_t sum = 0;
  for (const json& group : row["groups"]) {
    sum += group[kind + "_pages"].get<int64_t>() * group[kind + "_page_bytes"].get<int64_t>();
  }
  return sum;
}

TEST_F(ModelCommands, PlanAccountsForEveryByte) {
  const json result =
      run_json("plan", {"-c", "2048", "--kv", "bf16,8bit,4bit", "--sequences", "2"});
  ASSERT_EQ(result["results"].size(), 3u);
  for (const json& row : result["results"]) {
    EXPECT_EQ(row["context_tokens"], 2048);
    EXPECT_EQ(sum_of_parts(row), row["total_bytes"]) << row;
    EXPECT_EQ(sum_of_pages(row, "closed"), row["closed_pages_bytes"]);
    EXPECT_EQ(sum_of_pages(row, "bf16"), row["bf16_pages_bytes"]);
    for (const json& group : row["groups"]) {
      const int64_t parts = group["closed_page_code_bytes"].get<int64_t>() +
                            group["closed_page_scale_bytes"].get<int64_t>() +
                            group["closed_page_mean_bytes"].get<int64_t>() +
                            group["closed_page_padding_bytes"].get<int64_t>();
      EXPECT_EQ(parts, group["closed_page_bytes"]);
      EXPECT_GE(group["closed_page_padding_bytes"], 0);
    }
  }
}

TEST_F(ModelCommands, PlanFindsWhatFits) {
  const json at_2048 = run_json("plan", {"-c", "2048", "--kv", "bf16"});
  const int64_t budget = at_2048["results"][0]["total_bytes"];
  const std::string memory = std::to_string(budget);
  const json fitting = run_json("plan", {"--memory", memory, "--kv", "bf16,4bit"});
  const json& rows = fitting["results"];
  EXPECT_GE(rows[0]["context_tokens"], 2048);
  EXPECT_LT(rows[0]["context_tokens"], 2048 + 64);
  EXPECT_GT(rows[1]["context_tokens"], rows[0]["context_tokens"]);
  for (const json& row : rows) EXPECT_LE(row["total_bytes"], budget);
  const json many = run_json("plan", {"--memory", memory, "-c", "256", "--kv", "bf16,4bit"});
  EXPECT_GT(many["results"][1]["sequences"], many["results"][0]["sequences"]);
  expect_error({"plan", model_, "--memory", "1MiB"}, 75, {"1.00 MiB"});
  expect_error({"plan", model_, "--memory", "lots"}, 64, {"lots"});
  expect_error({"plan", model_, "-c", "0"}, 64);
  // Plans beyond what the model was trained for are made, and say so.
  const ProgramResult beyond = run_kvant({"plan", model_, "-c", "1000000", "--json"});
  EXPECT_EQ(beyond.exit_code, 0) << beyond.err;
  EXPECT_NE(beyond.err.find("8192"), std::string::npos) << beyond.err;
  EXPECT_EQ(json::parse(beyond.out)["results"][0]["context_tokens"], 1000000);
}

// A byte a weight and four a row of what is re-quantised; the rest as it was.
TEST_F(ModelCommands, PlanCountsRequantisedWeights) {
  const json file = run_json("plan", {"--kv", "bf16", "-c", "512"})["results"][0];
  const json fp8 =
      run_json("plan", {"--weights", "fp8", "--kv", "bf16", "-c", "512"})["results"][0];
  EXPECT_NE(fp8["weights_bytes"], file["weights_bytes"]);
  EXPECT_EQ(fp8["total_bytes"].get<int64_t>() - file["total_bytes"].get<int64_t>(),
            fp8["weights_bytes"].get<int64_t>() - file["weights_bytes"].get<int64_t>());
  const json answer = run_json("run", {"-p", "The sky is", "-n", "4", "--weights", "fp8"});
  EXPECT_FALSE(answer["text"].get<std::string>().empty());
}

TEST_F(ModelCommands, PlanNeedsNoWeights) {
  const ProgramResult result =
      run_kvant({"plan", "llama-3.1-8b", "--weights", "dummy", "-c", "32768", "--json"});
  EXPECT_EQ(result.exit_code, 0) << result.err;
  const json rows = json::parse(result.out)["results"];
  // 32 layers, 8 KV heads of 128: 128 KiB a token in 16 bits.
  const int64_t pages =
      rows[0]["closed_pages_bytes"].get<int64_t>() + rows[0]["bf16_pages_bytes"].get<int64_t>();
  EXPECT_GE(pages, int64_t{32768} * 131072);
  EXPECT_LT(pages, int64_t{32768 + 1024} * 131072);
}

// ---- bench ----

TEST_F(ModelCommands, BenchPrintsOneObjectALine) {
  for (const bool named : {true, false}) {
    std::vector<std::string> arguments = {"bench"};
    if (named) arguments.push_back("model");
    for (const std::string& argument :
         {model_, std::string("-p"), std::string("32"), std::string("-n"), std::string("4"),
          std::string("-d"), std::string("0,96"), std::string("-r"), std::string("2"),
          std::string("--kv"), std::string("bf16,4bit"), std::string("--json")}) {
      arguments.push_back(argument);
    }
    const ProgramResult result = run_kvant(arguments);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    std::istringstream lines(result.out);
    std::vector<json> objects;
    for (std::string line; std::getline(lines, line);) objects.push_back(json::parse(line));
    ASSERT_EQ(objects.size(), 4u);
    for (const json& object : objects) {
      EXPECT_EQ(object["schema_version"], 1);
      EXPECT_EQ(object["bench"], "model");
      for (const char* phase : {"prefill_tokens_per_second", "decode_tokens_per_second"}) {
        EXPECT_GT(object[phase]["min"], 0);
        EXPECT_LE(object[phase]["min"], object[phase]["median"]);
        EXPECT_LE(object[phase]["median"], object[phase]["max"]);
      }
    }
    EXPECT_EQ(objects[3]["kv"], "4bit");
    EXPECT_EQ(objects[3]["depth"], 96);
  }
  expect_error({"bench"}, 64);
  expect_error({"bench", model_, "-p", "0", "-n", "0"}, 64, {"nothing to measure"});
}

TEST_F(ModelCommands, BenchOfTheEngineAnswersEveryTurn) {
  const ProgramResult result = run_kvant(
      {"bench", "engine",          model_, "--workload",      "multi-turn", "-n",
       "3",     "--turns",         "2",    "--prefix-tokens", "64",         "--input-tokens",
       "10",    "--output-tokens", "5",    "--vocab-size",    "200",        "--concurrency",
       "2",     "--json"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const json object = json::parse(result.out);
  EXPECT_EQ(object["bench"], "engine");
  EXPECT_EQ(object["completed"], 6);
  EXPECT_EQ(object["wrong_token_counts"], 0);
  EXPECT_EQ(object["output_tokens"], 30);
  EXPECT_EQ(object["prompt_tokens"], 3 * (74 + 89));
  EXPECT_GE(object["cached_tokens"], 4 * 64);  // all but what the first two begin with
  EXPECT_GT(object["ttft_ms"]["p50"], 0);
  EXPECT_GT(object["engine"]["steps"], 0);
  expect_error({"bench", "engine", model_, "--workload", "trace"}, 64, {"--trace"});
}

TEST_F(ModelCommands, BenchFillsCachesWithRandomContexts) {
  const auto bench = [&](std::vector<std::string> more) {
    std::vector<std::string> arguments = {"bench", "model", model_, "-n", "2",
                                          "-r",    "2",     "-p",   "0",  "--json"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const ProgramResult result = run_kvant(arguments);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return json::parse(result.out);
  };
  const std::vector<std::string> sizes = {"-d", "150", "--batch", "2", "--kv", "4bit"};
  std::vector<std::string> random = sizes;
  random.insert(random.end(), {"--fill", "random"});
  const json read = bench(sizes);
  const json filled = bench(random);
  EXPECT_EQ(read["fill"], "prefill");
  EXPECT_EQ(filled["fill"], "random");
  // As much of a cache as text makes.
  EXPECT_EQ(filled["cache"], read["cache"]);
  EXPECT_EQ(filled["cache"]["tokens"], 300);
  for (const json& object : {read, filled}) {
    EXPECT_EQ(object["batch"], 2);
    EXPECT_GT(object["decode_tokens_per_second"]["min"], 0);
    EXPECT_EQ(object["memory"]["allocated_bytes"], object["memory"]["planned_bytes"]);
  }

  // The largest batch is the most that the plan allows.
  const std::vector<std::string> full = {"-d",  "1000", "--fill", "random",         "--batch",
                                         "max", "--kv", "4bit",   "--memory-limit", "256M"};
  const json most = bench(full);
  const int64_t limit = int64_t{256} << 20;
  const int64_t planned = most["memory"]["planned_bytes"];
  EXPECT_GT(most["batch"], 1);
  EXPECT_LE(planned, limit);
  EXPECT_GT(planned + planned / most["batch"].get<int64_t>(), limit);

  const json shallow = bench({"-d", "0", "--fill", "random"});
  EXPECT_EQ(shallow["cache"]["tokens"], 2);
  expect_error({"bench", model_, "--fill", "zeros"}, 64, {"--fill", "random"});
  expect_error({"bench", model_, "--batch", "0"}, 64, {"--batch", "max"});
}

// ---- files and pipes ----

TEST_F(ModelCommands, DamagedModelsAreErrors) {
  std::ifstream in(model_, std::ios::binary);
  std::string head(3 << 20, '\0');
  in.read(head.data(), static_cast<std::streamsize>(head.size()));
  const std::string cut = write("cut.gguf", head);
  const std::string text = write("text.gguf", "this is no model");
  const std::string empty = write("empty.gguf", "");
  for (const std::string& bad : {cut, text, empty}) {
    expect_error({"eval", bad, "--text", text_}, 65, {bad});
    expect_error({"plan", bad}, 65, {bad});
    expect_error({"bench", bad}, 65, {bad});
    expect_error({"inspect", bad}, 65, {bad});
  }
  for (const char* command : {"eval", "plan", "bench", "inspect", "compare"}) {
    std::vector<std::string> arguments = {command, path("none.gguf")};
    if (std::string(command) == "compare" || std::string(command) == "eval") {
      arguments.insert(arguments.end(), {"--text", text_});
    }
    expect_error(arguments, 66, {"none.gguf"});
  }
}

TEST_F(ModelCommands, FullDisksAreErrors) {
  ProgramOptions full;
  full.stdout_to = "/dev/full";
  expect_error({"plan", model_, "-c", "512"}, 74, {"No space left"}, full);
}

TEST_F(ModelCommands, InspectDescribesTheModel) {
  const json result = run_json("inspect", {});
  EXPECT_NE(result.dump().find("llama"), std::string::npos);
  EXPECT_NE(result.dump().find("8192"), std::string::npos);
}

}  // namespace
}  // namespace kvant::testing
