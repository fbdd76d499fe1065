// The dashboard in headless Chromium, against a server with real metrics of an engine that is only
// told of.
#include "kvant/serve/monitor/dashboard.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>

#include "kvant/serve/http/server.h"
#include "kvant/serve/monitor/metrics.h"

namespace kvant::serve {
namespace {

using Json = nlohmann::json;

std::string output_of(const std::string& command) {
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return "";
  std::string output;
  for (char buffer[4096]; size_t count = fread(buffer, 1, sizeof(buffer), pipe);) {
    output.append(buffer, count);
  }
  pclose(pipe);
  return output;
}

TEST(Dashboard, AsksNobodyElse) {
  const std::string page(dashboard_page());
  EXPECT_TRUE(page.starts_with("<!doctype html>"));
  EXPECT_TRUE(page.ends_with("</html>\n"));
  for (const char* outside : {"https://", "src=\"http", "@import", "cdn"}) {
    EXPECT_EQ(page.find(outside), std::string::npos) << outside;
  }
  EXPECT_NE(page.find("default-src 'none'"), std::string::npos);
}

class DashboardInBrowser : public ::testing::Test {
 protected:
  void SetUp() override {
    if (std::system("command -v chromium >/dev/null && command -v python3 >/dev/null") != 0) {
      GTEST_SKIP() << "needs chromium and python3";
    }
    metrics_ = std::make_unique<Metrics>(MetricsConfig{.model_name = "tiny",
                                                       .version = "0.1.0",
                                                       .format = "k=int4:channel,v=nvfp4+46+sink",
                                                       .pages_total = 100,
                                                       .max_model_len = 4096});
    metrics_->watch_engine([this] {
      const std::lock_guard lock(mutex_);
      return stats_;
    });
    auto server = http::Server::start(
        {.port = 0}, [this](auto request, auto writer) { answer(*request, *writer); });
    ASSERT_TRUE(server.has_value()) << server.error().message();
    server_ = std::move(*server);
    load_ = std::thread([this] { serve_load(); });
  }
  void TearDown() override {
    stop_ = true;
    if (load_.joinable()) load_.join();
    server_.reset();
  }

  // An engine's life, told ten times a second: half of the prompt tokens are hits.
  void serve_load() {
    for (int i = 0; !stop_; ++i) {
      metrics_->on_lookup(1000, 500);
      metrics_->on_first_token(0.2 + 0.1 * (i % 3));
      for (int j = 0; j < 20; ++j) metrics_->on_inter_token(0.02);
      metrics_->on_step({.prefill_tokens = 500, .decode_tokens = 20});
      metrics_->observe_quality(
          {.keys = i % 2 == 0, .error = 0.04, .values = 4096, .saturated = 0, .outliers = 3});
      {
        const std::lock_guard lock(mutex_);
        stats_.running = 3;
        stats_.waiting = 1 + i % 2;
        stats_.pages_total = 100;
        stats_.pages_used = 42;
        stats_.prompt_tokens += 1000;
        stats_.generation_tokens += 20;
        stats_.cache.stored_pages_now = 64 << 20;
        stats_.cache.stored_pages_reserved = 128 << 20;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
  }

  void answer(const http::HttpRequest& request, http::ResponseWriter& writer) {
    if (request.path == "/") {
      writer.send(
          {.content_type = std::string(kDashboardType), .body = std::string(dashboard_page())});
    } else if (request.path == "/dashboard/data") {
      writer.send({.body = metrics_->json()});
    } else if (request.path == "/v1/chat/completions") {
      asked_ = request.body;
      writer.begin({.content_type = "text/event-stream"});
      for (const char* piece : {"Quanta ", "are ", "<b>small</b>."}) {
        const Json chunk = {{"choices", {{{"delta", {{"content", piece}}}}}}, {"usage", nullptr}};
        writer.write("data: " + chunk.dump() + "\n\n");
      }
      writer.write(
          "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":40,\"completion_tokens\":3,"
          "\"prompt_tokens_details\":{\"cached_tokens\":32}}}\n\ndata: [DONE]\n\n");
      writer.end();
    } else {
      writer.send({.status = 404, .body = "{}"});
    }
  }

  Json browse(const std::string& arguments) {
    const char* folder = std::getenv("KVANT_SCREENSHOTS");
    const std::string command = std::string("timeout 120 python3 ") + KVANT_SOURCE_DIR +
                                "/kvant/serve/monitor/testing/browse_dashboard.py http://" +
                                server_->address() + "/ " + arguments +
                                (folder ? std::string(" --screenshots ") + folder : "");
    return Json::parse(output_of(command), nullptr, false);
  }

  std::unique_ptr<Metrics> metrics_;
  std::unique_ptr<http::Server> server_;
  std::mutex mutex_;
  EngineStats stats_;
  std::string asked_;
  std::atomic<bool> stop_ = false;
  std::thread load_;
};

TEST_F(DashboardInBrowser, ShowsLiveNumbersAndChats) {
  const Json page = browse("--question 'What is a quantum?' --seconds 3");
  ASSERT_TRUE(page.is_object()) << page;
  EXPECT_EQ(page["alive"], true);
  EXPECT_EQ(page["state"], "live");
  EXPECT_GE(page["samples"], 3);
  EXPECT_EQ(page["tiles"]["Prefix hit rate"], "50 %");
  EXPECT_EQ(page["tiles"]["Device cache"].get<std::string>().substr(0, 4), "42 %");
  EXPECT_EQ(page["tiles"]["Requests"], "3 running");
  const std::string first_token = page["tiles"]["Time to first token"];
  EXPECT_TRUE(first_token.ends_with(" ms")) << first_token;
  // 200 tokens a second, told every tenth.
  const double generated = std::stod(page["tiles"]["Generated"].get<std::string>());
  EXPECT_GT(generated, 100);
  EXPECT_LT(generated, 210);
  for (const char* title : {"Prefix hit rate: ", "Cache by tier: device 64.0 MiB",
                            "Inter-token latency: median ", "Requests: running 3"}) {
    bool found = false;
    for (const Json& chart : page["charts"]) {
      found |= chart.get<std::string>().starts_with(title);
    }
    EXPECT_TRUE(found) << title << " in " << page["charts"];
  }
  EXPECT_EQ(page["table"][0][1], "k=int4:channel,v=nvfp4+46+sink");

  // Text of the model is text, whatever it looks like.
  EXPECT_EQ(page["chat"][0], Json({"user", "What is a quantum?"}));
  EXPECT_EQ(page["chat"][1], Json({"assistant", "Quanta are <b>small</b>."}));
  EXPECT_NE(page["chat"][2][1].get<std::string>().find("32 of 40 prompt tokens from the cache"),
            std::string::npos);
  const Json asked = Json::parse(asked_);
  EXPECT_EQ(asked["model"], "tiny");
  EXPECT_EQ(asked["stream"], true);

  EXPECT_EQ(page["errors"], Json::array());
  EXPECT_LE(page["phone_overflow"], 0);
  EXPECT_EQ(page["small_targets"], Json::array());
  EXPECT_EQ(page["nameless"], Json::array());
  for (const Json& url : page["asked"]) {
    const std::string text = url;
    EXPECT_TRUE(text.starts_with("http://" + server_->address()) || text.starts_with("data:") ||
                text.starts_with("about:"))
        << text;
  }
}

}  // namespace
}  // namespace kvant::serve
