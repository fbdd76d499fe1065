// What a scrape shows: every name that dashboards and routers expect, with type, labels and
// buckets; values that agree with one another; text that promtool accepts.
#include "kvant/serve/monitor/metrics.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <string>
#include <thread>

namespace kvant::serve {
namespace {

MetricsConfig config() {
  return {.model_name = "smollm2",
          .version = "0.1.0",
          .format = "k=int4:channel,v=nvfp4+46+sink",
          .page_tokens = 64,
          .pages_total = 100,
          .max_model_len = 4096};
}

// The text format, read strictly.
struct Scrape {
  std::map<std::string, std::string> types;
  std::map<std::string, double> samples;  // by name{labels}
  std::vector<std::string> errors;

  explicit Scrape(const std::string& text) {
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) read(line);
  }
  void read(const std::string& line) {
    if (line.starts_with("# TYPE ")) {
      std::istringstream words(line.substr(7));
      std::string name, type;
      words >> name >> type;
      if (!types.emplace(name, type).second) errors.push_back("twice: " + line);
    } else if (!line.starts_with("#") && !line.empty()) {
      const size_t space = line.rfind(' ');
      char* end = nullptr;
      const double value = std::strtod(line.c_str() + space + 1, &end);
      if (space == std::string::npos || *end != '\0') errors.push_back("no value: " + line);
      if (!samples.emplace(line.substr(0, space), value).second) errors.push_back("twice: " + line);
    }
  }
  // The one sample of that name whose labels contain `part`; NaN and an error if there is none.
  double value(const std::string& name, const std::string& part = "") {
    for (const auto& [key, found] : samples) {
      if (key.starts_with(name + "{") && key.find(part) != std::string::npos) return found;
    }
    errors.push_back("no sample " + name + " " + part);
    return std::nan("");
  }
};

FinishRecord finished() {
  FinishRecord record;
  record.reason = FinishReason::kLength;
  record.prompt_tokens = 100;
  record.cached_tokens = 64;
  record.output_tokens = 7;
  record.drafted_tokens = 5;
  record.accepted_tokens = 3;
  record.queue_seconds = 0.5;
  record.first_token_seconds = 1.5;
  record.total_seconds = 4.5;
  return record;
}

TEST(Metrics, ScrapeHasEveryNameOfVllmWithItsType) {
  Metrics metrics(config());
  Scrape scrape(metrics.text());
  const std::map<std::string, std::string> expected = {
      {"vllm:num_requests_running", "gauge"},
      {"vllm:num_requests_waiting", "gauge"},
      {"vllm:kv_cache_usage_perc", "gauge"},
      {"vllm:gpu_cache_usage_perc", "gauge"},
      {"vllm:cache_config_info", "gauge"},
      {"vllm:lora_requests_info", "gauge"},
      {"vllm:prefix_cache_queries_total", "counter"},
      {"vllm:prefix_cache_hits_total", "counter"},
      {"vllm:external_prefix_cache_queries_total", "counter"},
      {"vllm:external_prefix_cache_hits_total", "counter"},
      {"vllm:num_preemptions_total", "counter"},
      {"vllm:prompt_tokens_total", "counter"},
      {"vllm:generation_tokens_total", "counter"},
      {"vllm:request_success_total", "counter"},
      {"vllm:time_to_first_token_seconds", "histogram"},
      {"vllm:time_per_output_token_seconds", "histogram"},
      {"vllm:inter_token_latency_seconds", "histogram"},
      {"vllm:e2e_request_latency_seconds", "histogram"},
      {"vllm:request_queue_time_seconds", "histogram"},
      {"vllm:request_inference_time_seconds", "histogram"},
      {"vllm:request_prefill_time_seconds", "histogram"},
      {"vllm:request_decode_time_seconds", "histogram"},
      {"vllm:request_prompt_tokens", "histogram"},
      {"vllm:request_generation_tokens", "histogram"},
      {"vllm:request_max_num_generation_tokens", "histogram"},
      {"vllm:request_params_max_tokens", "histogram"},
      {"vllm:request_params_n", "histogram"},
      {"vllm:iteration_tokens_total", "histogram"},
  };
  for (const auto& [name, type] : expected) {
    ASSERT_TRUE(scrape.types.contains(name)) << name;
    EXPECT_EQ(scrape.types[name], type) << name;
  }
  // Present before anything happened, so that rates have a beginning.
  for (const auto& [name, type] : expected) {
    const std::string sample = type == "histogram" ? name + "_count" : name;
    scrape.value(sample, "model_name=\"smollm2\"");
    scrape.value(sample, "engine=\"0\"");
  }
  for (const char* reason : {"stop", "length", "abort", "error"}) {
    scrape.value("vllm:request_success_total", std::string("finished_reason=\"") + reason + "\"");
  }
  EXPECT_EQ(scrape.value("vllm:cache_config_info", "num_gpu_blocks=\"100\""), 1);
  EXPECT_EQ(scrape.value("vllm:cache_config_info", "block_size=\"64\""), 1);
  EXPECT_TRUE(scrape.errors.empty()) << scrape.errors.front();
}

TEST(Metrics, BucketsAreVllms) {
  Metrics metrics(config());
  const std::string text = metrics.text();
  const auto bounds = [&](const std::string& name) {
    std::vector<double> found;
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) {
      const size_t le = line.find("le=\"");
      if (line.starts_with(name + "_bucket{") && line.find("+Inf") == std::string::npos)
        found.push_back(std::stod(line.substr(le + 4)));
    }
    return found;
  };
  EXPECT_EQ(
      bounds("vllm:time_to_first_token_seconds"),
      (std::vector<double>{0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
                           1,     2.5,   5,    7.5,  10,   20,   40,   80,  160,  640, 2560}));
  EXPECT_EQ(bounds("vllm:inter_token_latency_seconds"),
            (std::vector<double>{0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1,
                                 2.5, 5, 7.5, 10, 20, 40, 80}));
  EXPECT_EQ(bounds("vllm:e2e_request_latency_seconds"),
            (std::vector<double>{0.3, 0.5, 0.8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                                 30,  40,  50,  60, 120, 240, 480, 960, 1920, 7680}));
  EXPECT_EQ(bounds("vllm:request_prompt_tokens"),
            (std::vector<double>{1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000}));
  EXPECT_EQ(bounds("vllm:request_params_n"), (std::vector<double>{1, 2, 5, 10, 20}));
  EXPECT_EQ(bounds("vllm:iteration_tokens_total"),
            (std::vector<double>{1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384}));
}

TEST(Metrics, CountsWhatItIsTold) {
  Metrics metrics(config());
  metrics.on_lookup(100, 64);
  metrics.on_lookup(50, 0);
  metrics.on_preemption();
  metrics.on_first_token(0.03);
  metrics.on_inter_token(0.02);
  metrics.on_step({.prefill_tokens = 36, .decode_tokens = 4});
  SamplingParams params;
  params.n = 2;
  params.max_tokens = 7;
  metrics.on_finish(finished(), params);
  metrics.on_written(0.001);
  metrics.observe_enqueued(0.002);
  metrics.observe_quality(
      {.keys = true, .error = 0.04, .values = 4096, .saturated = 2, .outliers = 3});
  Scrape scrape(metrics.text());
  EXPECT_EQ(scrape.value("vllm:prefix_cache_queries_total"), 150);
  EXPECT_EQ(scrape.value("vllm:prefix_cache_hits_total"), 64);
  EXPECT_EQ(scrape.value("kvant:cache_hit_tokens_total", "tier=\"device\""), 64);
  EXPECT_EQ(scrape.value("vllm:num_preemptions_total"), 1);
  EXPECT_EQ(scrape.value("vllm:time_to_first_token_seconds_count"), 1);
  EXPECT_EQ(scrape.value("vllm:inter_token_latency_seconds_sum"), 0.02);
  EXPECT_EQ(scrape.value("vllm:time_per_output_token_seconds_count"), 1);
  EXPECT_EQ(scrape.value("vllm:iteration_tokens_total_sum"), 40);
  EXPECT_EQ(scrape.value("vllm:request_success_total", "finished_reason=\"length\""), 1);
  EXPECT_EQ(scrape.value("vllm:request_success_total", "finished_reason=\"stop\""), 0);
  EXPECT_EQ(scrape.value("vllm:e2e_request_latency_seconds_sum"), 4.5);
  EXPECT_EQ(scrape.value("vllm:request_queue_time_seconds_sum"), 0.5);
  EXPECT_EQ(scrape.value("vllm:request_inference_time_seconds_sum"), 4);
  EXPECT_EQ(scrape.value("vllm:request_prefill_time_seconds_sum"), 1);
  EXPECT_EQ(scrape.value("vllm:request_decode_time_seconds_sum"), 3);
  EXPECT_EQ(scrape.value("vllm:request_prompt_tokens_sum"), 100);
  EXPECT_EQ(scrape.value("vllm:request_generation_tokens_sum"), 7);
  EXPECT_EQ(scrape.value("vllm:request_params_n_sum"), 2);
  EXPECT_EQ(scrape.value("vllm:request_params_max_tokens_sum"), 7);
  EXPECT_EQ(scrape.value("kvant:speculative_drafted_tokens_total"), 5);
  EXPECT_EQ(scrape.value("kvant:speculative_accepted_tokens_total"), 3);
  EXPECT_EQ(scrape.value("kvant:http_token_to_written_seconds_sum"), 0.001);
  EXPECT_EQ(scrape.value("kvant:http_accept_to_enqueue_seconds_sum"), 0.002);
  EXPECT_EQ(scrape.value("kvant:quantization_error_ratio_sum", "side=\"k\""), 0.04);
  EXPECT_EQ(scrape.value("kvant:quantization_saturated_values_total", "side=\"k\""), 2);
  EXPECT_EQ(scrape.value("kvant:quantization_outlier_values_total", "side=\"k\""), 3);
  EXPECT_EQ(scrape.value("kvant:quantization_sampled_values_total", "side=\"v\""), 0);
  EXPECT_TRUE(scrape.errors.empty()) << scrape.errors.front();
}

TEST(Metrics, FollowsTheSourcesThatItWatches) {
  Metrics metrics(config());
  EngineStats engine;
  engine.running = 3;
  engine.waiting = 2;
  engine.pages_total = 100;
  engine.pages_used = 25;
  engine.prompt_tokens = 1000;
  engine.generation_tokens = 50;
  engine.tree.nodes = 40;
  engine.tree.evicted[0] = 7;
  const std::string cause(cache::eviction_cause_name(cache::EvictionCause{}));
  metrics.watch_engine([&] { return engine; });
  TierStats disk;
  disk.usage.bytes = 4096;
  disk.failures = 2;
  engine.tiers = {{cache::Medium::kDisk, disk}};
  engine.prefetch.late_answers[static_cast<size_t>(cache::Medium::kDisk)] = 3;
  engine.prefetch.loaded_tokens[static_cast<size_t>(cache::Medium::kDisk)] = 128;
  metrics.watch_events([] { return EventCounts{.batches = 9, .dropped = 1}; });
  metrics.text();
  metrics.on_lookup(300, 200);
  engine.prompt_tokens = 1500;
  engine.tree.evicted[0] = 8;
  Scrape scrape(metrics.text());
  EXPECT_EQ(scrape.value("vllm:num_requests_running"), 3);
  EXPECT_EQ(scrape.value("vllm:num_requests_waiting"), 2);
  EXPECT_EQ(scrape.value("vllm:kv_cache_usage_perc"), 0.25);
  EXPECT_EQ(scrape.value("vllm:prompt_tokens_total"), 1500);
  EXPECT_EQ(scrape.value("vllm:generation_tokens_total"), 50);
  EXPECT_EQ(scrape.value("kvant:prefix_tree_pages"), 40);
  EXPECT_EQ(scrape.value("kvant:cache_evictions_total", "cause=\"" + cause + "\""), 8);
  EXPECT_EQ(scrape.value("kvant:cache_bytes", "tier=\"disk\""), 4096);
  EXPECT_EQ(scrape.value("kvant:cache_hit_tokens_total", "tier=\"disk\""), 128);
  EXPECT_EQ(scrape.value("kvant:cache_failures_total", "tier=\"disk\""), 5);
  EXPECT_EQ(scrape.value("vllm:external_prefix_cache_queries_total"), 128 + 100);
  EXPECT_EQ(scrape.value("vllm:external_prefix_cache_hits_total"), 128);
  EXPECT_EQ(scrape.value("kvant:kv_event_batches_total"), 9);
  EXPECT_EQ(scrape.value("kvant:kv_event_batches_dropped_total"), 1);
  metrics.unwatch();
  EXPECT_EQ(Scrape(metrics.text()).value("vllm:prompt_tokens_total"), 1500);
  EXPECT_TRUE(scrape.errors.empty()) << scrape.errors.front();
}

TEST(Metrics, CountsPagesOfATier) {
  Metrics metrics(config());
  const std::array<cache::PageKey, 3> keys{};
  const std::vector<uint32_t> tokens(3 * 64);
  cache::StoredPages stored{
      .medium = cache::Medium::kHost, .keys = keys, .token_ids = tokens, .salt = ""};
  metrics.pages_stored(stored);
  metrics.pages_removed({.medium = cache::Medium::kHost, .keys = std::span(keys).first(1)});
  Scrape scrape(metrics.text());
  EXPECT_EQ(scrape.value("kvant:cache_pages", "tier=\"host\""), 2);
  EXPECT_EQ(scrape.value("kvant:cache_stored_pages_total", "tier=\"host\""), 3);
  EXPECT_EQ(scrape.value("kvant:cache_removed_pages_total", "tier=\"host\""), 1);
  metrics.all_cleared(cache::Medium::kHost);
  EXPECT_EQ(Scrape(metrics.text()).value("kvant:cache_pages", "tier=\"host\""), 0);
}

// A scrape at any moment shows no more hits than queries.
TEST(Metrics, HitsNeverExceedQueries) {
  Metrics metrics(config());
  std::atomic<bool> stop = false;
  std::thread engine([&] {
    while (!stop) metrics.on_lookup(64, 64);
  });
  for (int i = 0; i < 300; ++i) {
    Scrape scrape(metrics.text());
    EXPECT_LE(scrape.value("vllm:prefix_cache_hits_total"),
              scrape.value("vllm:prefix_cache_queries_total"));
  }
  stop = true;
  engine.join();
}

TEST(Metrics, JsonHasTheSameValues) {
  Metrics metrics(config());
  metrics.on_lookup(100, 64);
  metrics.on_first_token(0.03);
  const nlohmann::json document = nlohmann::json::parse(metrics.json());
  EXPECT_EQ(document["schema_version"], 1);
  EXPECT_EQ(document["config"]["model"], "smollm2");
  const nlohmann::json& all = document["metrics"];
  EXPECT_EQ(all["vllm:prefix_cache_hits_total"]["series"][0]["value"], 64);
  const nlohmann::json& first_token = all["vllm:time_to_first_token_seconds"]["series"][0];
  EXPECT_EQ(first_token["count"], 1);
  EXPECT_EQ(first_token["buckets"].size(), 23u);
  EXPECT_TRUE(first_token["buckets"].back()[0].is_null());  // no bound
  EXPECT_EQ(first_token["buckets"].back()[1], 1);
  Scrape scrape(metrics.text());
  for (const auto& [name, type] : scrape.types) {
    ASSERT_TRUE(all.contains(name)) << name;
    EXPECT_EQ(all[name]["type"], type) << name;
  }
}

TEST(Metrics, PromtoolAcceptsTheText) {
  if (std::system("command -v promtool >/dev/null") != 0) GTEST_SKIP() << "needs promtool";
  Metrics metrics(config());
  metrics.on_lookup(100, 64);
  metrics.on_finish(finished(), {});
  metrics.on_response({.request = nullptr, .status = 200, .bytes = 1, .seconds = 0.1});
  const std::filesystem::path path =
      std::filesystem::temp_directory_path() / "kvant_metrics_test.prom";
  std::ofstream(path) << metrics.text();
  // Its lint wants no colons (vLLM's names have them) and no _total for histograms (vLLM's
  // iteration_tokens_total is one); anything else is a fault of ours.
  const std::string command = "promtool check metrics < " + path.string() +
                              " 2>&1 | grep -v \"should not contain ':'\" | " +
                              "grep -v 'vllm:iteration_tokens_total' | grep -v '_info ' ; " +
                              "promtool check metrics < " + path.string() +
                              " >/dev/null 2>&1; [ $? -ne 1 ]";
  FILE* pipe = popen(command.c_str(), "r");
  ASSERT_NE(pipe, nullptr);
  std::string output;
  for (char buffer[4096]; size_t count = fread(buffer, 1, sizeof(buffer), pipe);) {
    output.append(buffer, count);
  }
  EXPECT_EQ(pclose(pipe), 0) << "promtool cannot parse the text";
  EXPECT_EQ(output, "");
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace kvant::serve
