// The load generator against a server of the test's own, which answers as vLLM does.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <set>

#include "kvant/serve/http/server.h"
#include "tools/load_client.h"
#include "tools/load_report.h"
#include "tools/load_workload.h"

namespace kvant::tools {
namespace {

using serve::http::HttpRequest;
using serve::http::ResponseWriter;
using serve::http::Server;

// Answers with the tokens that were asked for, one a piece; every `fail_each`-th request gets 429.
class FakeServer {
 public:
  explicit FakeServer(int fail_each = 0, int64_t missing_tokens = 0)
      : fail_each_(fail_each), missing_tokens_(missing_tokens) {
    auto started = Server::start({.port = 0},
                                 [this](auto request, auto writer) { answer(*request, *writer); });
    server_ = std::move(started).value();
  }
  std::string url() const { return "http://" + server_->address(); }
  const std::vector<std::vector<int32_t>>& prompts() const { return prompts_; }
  int port() const { return server_->port(); }

 private:
  void answer(const HttpRequest& request, ResponseWriter& writer) {
    if (request.path == "/v1/models") {
      return writer.send({.body = R"({"data": [{"id": "fake"}]})"});
    }
    if (fail_each_ > 0 && ++num_requests_ % fail_each_ == 0) {
      return writer.send({.status = 429, .body = "{}"});
    }
    const Json body = Json::parse(request.body);
    prompts_.push_back(body["prompt"].get<std::vector<int32_t>>());
    const auto asked = body["max_tokens"].get<int64_t>();
    writer.begin({.content_type = "text/event-stream"});
    for (int64_t i = 0; i < asked; ++i) {
      Json choice = {{"index", 0}, {"text", "x"}};
      if (body.contains("return_token_ids")) choice["token_ids"] = {7 + i};
      writer.write("data: " + Json{{"choices", {choice}}}.dump() + "\n\n");
    }
    const Json usage = {{"prompt_tokens", prompts_.back().size()},
                        {"completion_tokens", asked - missing_tokens_},
                        {"prompt_tokens_details", {{"cached_tokens", 3}}}};
    writer.write("data: " + Json{{"choices", Json::array()}, {"usage", usage}}.dump() + "\n\n");
    writer.write("data: [DONE]\n\n");
    writer.end();
  }

  const int fail_each_;
  const int64_t missing_tokens_;
  int num_requests_ = 0;  // the one I/O thread's, like prompts_
  std::vector<std::vector<int32_t>> prompts_;
  std::unique_ptr<Server> server_;
};

std::vector<LoadResult> load(const FakeServer& server, const WorkloadOptions& workload,
                             int64_t concurrency = 0, size_t* most_running = nullptr) {
  const LoadOptions options = {.server = ServerAddress::parse(server.url()).value(),
                               .model = "fake",
                               .concurrency = concurrency,
                               .timeout_seconds = 30,
                               .wants_token_ids = workload.kind == WorkloadKind::kMultiTurn};
  const auto progress = [&](size_t, size_t running) {
    if (most_running != nullptr) *most_running = std::max(*most_running, running);
    return true;
  };
  return run_load(Workload::create(workload).value(), options, progress).value();
}

TEST(Load, EveryRequestIsAnsweredAndMeasured) {
  const FakeServer server;
  const auto results = load(server, {.num_requests = 40, .input_tokens = 20, .output_tokens = 5});
  ASSERT_EQ(results.size(), 40u);
  std::set<size_t> indices;
  for (const LoadResult& result : results) {
    EXPECT_EQ(result.error, "");
    EXPECT_TRUE(result.counts_agree());
    EXPECT_EQ(result.gaps.size(), 4u);
    EXPECT_LE(result.sent, result.first_token);
    EXPECT_LE(result.last_token, result.finished);
    indices.insert(result.index);
  }
  EXPECT_EQ(indices.size(), 40u);
  const LoadReport report = make_report(results, {.e2e_seconds = 1000});
  EXPECT_EQ(report.completed, 40u);
  EXPECT_EQ(report.good, 40u);
  EXPECT_EQ(report.output_tokens, 200);
  EXPECT_EQ(report.cached_tokens, 120);
  EXPECT_EQ(report.itl.count, 160u);
  EXPECT_EQ(make_report(results, {.ttft_seconds = 1e-12}).good, 0u);
  EXPECT_EQ(report_json(report)["completed"], 40);
  EXPECT_NE(report_text(report).find("time to first token"), std::string::npos);
}

TEST(Load, ErrorsAndWrongCountsAreCounted) {
  const FakeServer refusing(4);
  const auto refused =
      load(refusing, {.num_requests = 20, .input_tokens = 4, .output_tokens = 2}, 2);
  const LoadReport report = make_report(refused, {});
  EXPECT_EQ(report.completed, 15u);
  EXPECT_EQ(report.errors, (std::map<std::string, size_t>{{"HTTP 429", 5}}));
  const FakeServer lying(0, 1);
  EXPECT_EQ(make_report(load(lying, {.num_requests = 3, .output_tokens = 2}), {}).wrong_counts, 3u);
}

TEST(Load, ConversationsRepeatWhatWasSaid) {
  const FakeServer server;
  const auto results = load(server,
                            {.kind = WorkloadKind::kMultiTurn,
                             .num_requests = 3,
                             .input_tokens = 10,
                             .output_tokens = 4,
                             .prefix_tokens = 30,
                             .num_turns = 3},
                            1);
  ASSERT_EQ(results.size(), 9u);
  std::set<size_t> lengths;
  for (const auto& prompt : server.prompts()) {
    lengths.insert(prompt.size());
    EXPECT_TRUE(std::equal(prompt.begin(), prompt.begin() + 30, server.prompts()[0].begin()));
    if (prompt.size() >= 54) {
      EXPECT_EQ(std::vector<int32_t>(prompt.begin() + 40, prompt.begin() + 44),
                (std::vector<int32_t>{7, 8, 9, 10}));
    }
  }
  EXPECT_EQ(lengths, (std::set<size_t>{40, 54, 68}));
}

TEST(Load, ConcurrencyAndArrivalTimesAreKept) {
  const FakeServer server;
  size_t most = 0;
  const auto results =
      load(server, {.num_requests = 12, .request_rate = 40, .input_tokens = 4, .output_tokens = 2},
           3, &most);
  EXPECT_LE(most, 3u);
  const Workload workload =
      Workload::create({.num_requests = 12, .request_rate = 40, .input_tokens = 4}).value();
  for (const LoadResult& result : results) {
    EXPECT_GE(result.sent, workload.arrival_seconds(result.index));
  }
}

TEST(Load, NobodyListeningIsAnErrorOfEachRequest) {
  int port = 0;
  {
    const FakeServer gone;
    port = gone.port();
  }
  LoadOptions options = {.server = ServerAddress::parse(fmt::format("127.0.0.1:{}", port)).value(),
                         .model = "m"};
  const auto results = run_load(Workload::create({.num_requests = 2}).value(), options,
                                [](size_t, size_t) { return true; });
  ASSERT_TRUE(results);
  ASSERT_EQ(results->size(), 2u);
  EXPECT_EQ((*results)[0].error.substr(0, 9), "connect: ");
  EXPECT_EQ(first_model(options).error().code(), ErrorCode::kIoError);
  const FakeServer server;
  options.server = ServerAddress::parse(server.url() + "/v1/").value();
  EXPECT_EQ(first_model(options).value(), "fake");
}

TEST(Load, AddressesAreUrls) {
  const auto address = ServerAddress::parse("http://[::1]:8080/base/v1").value();
  EXPECT_EQ(address.host, "::1");
  EXPECT_EQ(address.port, "8080");
  EXPECT_EQ(address.path, "/base");
  EXPECT_EQ(ServerAddress::parse("example.org").value().port, "80");
  for (const char* bad : {"https://a:1", "http://", "a:b", ":80"})
    EXPECT_FALSE(ServerAddress::parse(bad)) << bad;
}

TEST(Load, WorkloadsAreTheSameForTheSameSeed) {
  const WorkloadOptions options = {.kind = WorkloadKind::kSharedPrefix,
                                   .num_requests = 6,
                                   .request_rate = 2,
                                   .range_ratio = 0.5,
                                   .prefix_tokens = 16,
                                   .num_prefixes = 2};
  const Workload a = Workload::create(options).value();
  const Workload b = Workload::create(options).value();
  const auto prefix = [&](size_t index) {
    const LoadRequest request = a.arrival(index);
    return std::vector<int32_t>(request.prompt.begin(), request.prompt.begin() + 16);
  };
  std::set<size_t> lengths;
  for (size_t i = 0; i < 6; ++i) {
    EXPECT_EQ(a.arrival(i).prompt, b.arrival(i).prompt);
    EXPECT_EQ(a.arrival_seconds(i), b.arrival_seconds(i));
    EXPECT_EQ(prefix(i), prefix(i % 2));
    lengths.insert(a.arrival(i).prompt.size());
  }
  EXPECT_NE(prefix(0), prefix(1));
  EXPECT_GT(lengths.size(), 3u);
  WorkloadOptions other = options;
  other.seed = 1;
  EXPECT_NE(Workload::create(other).value().arrival(0).prompt, a.arrival(0).prompt);
}

TEST(Load, TracesShareTheirBlocks) {
  const auto path =
      std::filesystem::temp_directory_path() / fmt::format("kvant-trace-{}.jsonl", getpid());
  const auto with = [&](const char* text) {
    std::ofstream(path) << text;
    return Workload::create({.kind = WorkloadKind::kTrace, .trace = path, .trace_speed = 2});
  };
  const Workload workload = with(
                                "{\"timestamp\": 3000, \"input_length\": 700, \"output_length\": "
                                "5, \"hash_ids\": [4, 9]}\n"
                                "{\"timestamp\": 1000, \"input_length\": 520, \"output_length\": "
                                "6, \"hash_ids\": [4, 8]}\n")
                                .value();
  ASSERT_EQ(workload.num_arrivals(), 2u);
  EXPECT_EQ(workload.arrival_seconds(1), 1.5);
  const LoadRequest first = workload.arrival(0);
  const LoadRequest second = workload.arrival(1);
  EXPECT_EQ(first.prompt.size(), 520u);
  EXPECT_EQ(second.output_tokens, 5);
  EXPECT_TRUE(std::equal(first.prompt.begin(), first.prompt.begin() + 512, second.prompt.begin()));
  EXPECT_FALSE(
      std::equal(first.prompt.begin() + 512, first.prompt.end(), second.prompt.begin() + 512));
  EXPECT_NE(with("{\"timestamp\": 1}\n").error().message().find("line 1"), std::string::npos);
  EXPECT_FALSE(
      with("{\"timestamp\": 0, \"input_length\": 600, \"output_length\": 1, \"hash_ids\": [1]}\n"));
  EXPECT_FALSE(with(""));
  std::filesystem::remove(path);
  EXPECT_EQ(with("").error().code(), ErrorCode::kCorruptData);
  std::filesystem::remove(path);
}

TEST(Load, Percentiles) {
  const std::vector<double> values = {1, 2, 3, 4, 5};
  EXPECT_EQ(percentile(values, 0), 1);
  EXPECT_EQ(percentile(values, 50), 3);
  EXPECT_EQ(percentile(values, 90), 4.6);
  EXPECT_EQ(percentile(values, 100), 5);
  EXPECT_EQ(percentile({}, 50), 0);
  EXPECT_EQ(summarize({3, 1, 2}).p50, 2);
}

}  // namespace
}  // namespace kvant::tools
