// docs/grafana: the dashboard and the alerts ask for metrics that exist, in queries that Prometheus
// understands, and each alert fires when it should (docs/grafana/alerts_test.yml).
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "kvant/serve/monitor/metrics.h"

namespace kvant::serve {
namespace {

using Json = nlohmann::json;

const std::string kFolder = KVANT_SOURCE_DIR "/docs/grafana/";

std::string read(const std::string& name) {
  std::ostringstream text;
  text << std::ifstream(kFolder + name).rdbuf();
  return text.str();
}

// Sample names of a scrape: of histograms the three that queries use.
std::set<std::string> known_names() {
  MetricsConfig config;
  config.format = "4bit";
  Metrics metrics(config);
  const ScaleAudit audit{.source = ScaleSource::kUnit, .layers = 1};
  metrics.set_scale_audit(true, std::span(&audit, 1));
  std::set<std::string> names;
  std::istringstream lines(metrics.text());
  for (std::string line; std::getline(lines, line);) {
    if (!line.starts_with("# TYPE ")) continue;
    std::string name, type;
    std::istringstream(line.substr(7)) >> name >> type;
    names.insert(name);
    if (type != "histogram") continue;
    for (const char* suffix : {"_bucket", "_sum", "_count"}) names.insert(name + suffix);
  }
  return names;
}

void expect_known(const std::string& text) {
  static const std::set<std::string> names = known_names();
  static const std::regex pattern("(vllm|kvant):[a-zA-Z0-9_]+");
  int count = 0;
  for (std::sregex_iterator found(text.begin(), text.end(), pattern), end; found != end; ++found) {
    EXPECT_TRUE(names.contains(found->str())) << found->str();
    ++count;
  }
  EXPECT_GT(count, 10);
}

std::vector<std::string> dashboard_queries() {
  std::vector<std::string> queries;
  const Json dashboard = Json::parse(read("kvant.json"));
  for (const Json& panel : dashboard["panels"]) {
    for (const Json& target : panel.value("targets", Json::array())) {
      queries.push_back(target["expr"]);
    }
  }
  return queries;
}

void replace_all(std::string& text, const std::string& what, const std::string& by) {
  for (size_t at = 0; (at = text.find(what, at)) != std::string::npos; at += by.size()) {
    text.replace(at, what.size(), by);
  }
}

// Runs promtool; its output goes into the failure.
void expect_promtool(const std::string& arguments) {
  if (std::system("command -v promtool >/dev/null") != 0) GTEST_SKIP() << "needs promtool";
  FILE* pipe = popen(("promtool " + arguments + " 2>&1").c_str(), "r");
  ASSERT_NE(pipe, nullptr);
  std::string output;
  for (char buffer[4096]; size_t count = fread(buffer, 1, sizeof(buffer), pipe);) {
    output.append(buffer, count);
  }
  EXPECT_EQ(pclose(pipe), 0) << output;
}

TEST(Grafana, AsksForMetricsThatExist) {
  expect_known(read("kvant.json"));
  expect_known(read("alerts.yml"));
}

TEST(Grafana, AlertsFireWhenTheyShould) {
  expect_promtool("check rules " + kFolder + "alerts.yml");
  expect_promtool("test rules " + kFolder + "alerts_test.yml");
}

TEST(Grafana, PanelsHaveQueriesThatPrometheusUnderstands) {
  const std::vector<std::string> queries = dashboard_queries();
  EXPECT_GT(queries.size(), 20u);
  const std::filesystem::path path =
      std::filesystem::temp_directory_path() / "kvant_grafana_test.yml";
  {
    std::ofstream file(path);
    file << "groups:\n- name: panels\n  rules:\n";
    for (size_t i = 0; i < queries.size(); ++i) {
      std::string query = queries[i];
      replace_all(query, "$__rate_interval", "5m");
      replace_all(query, "$instance", ".*");
      file << "  - record: panel:query:" << i << "\n    expr: " << Json(query).dump() << "\n";
    }
  }
  expect_promtool("check rules " + path.string());
  std::filesystem::remove(path);
}

TEST(Grafana, PanelsDoNotOverlap) {
  std::set<std::pair<int, int>> taken;
  const Json dashboard = Json::parse(read("kvant.json"));
  for (const Json& panel : dashboard["panels"]) {
    const Json& at = panel["gridPos"];
    for (int x = at["x"]; x < at["x"].get<int>() + at["w"].get<int>(); ++x) {
      EXPECT_LT(x, 24) << panel["title"];
      for (int y = at["y"]; y < at["y"].get<int>() + at["h"].get<int>(); ++y) {
        EXPECT_TRUE(taken.emplace(x, y).second) << panel["title"];
      }
    }
  }
}

}  // namespace
}  // namespace kvant::serve
