#include "kvant/serve/monitor/metrics_json.h"

#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>

namespace kvant::serve::monitor {
namespace {

using Json = nlohmann::json;

// Labels that every series has say nothing to one page about one server.
Json labels_json(const prometheus::ClientMetric& metric) {
  Json labels = Json::object();
  for (const auto& label : metric.label) {
    if (label.name != "model_name" && label.name != "engine") labels[label.name] = label.value;
  }
  return labels;
}

Json series_json(prometheus::MetricType type, const prometheus::ClientMetric& metric) {
  Json series = {{"labels", labels_json(metric)}};
  if (type == prometheus::MetricType::Counter) {
    series["value"] = metric.counter.value;
  } else if (type == prometheus::MetricType::Gauge) {
    series["value"] = metric.gauge.value;
  } else {
    series["sum"] = metric.histogram.sample_sum;
    series["count"] = metric.histogram.sample_count;
    Json& buckets = series["buckets"] = Json::array();
    for (const auto& bucket : metric.histogram.bucket) {
      const double bound = bucket.upper_bound;
      buckets.push_back({std::isfinite(bound) ? Json(bound) : Json(), bucket.cumulative_count});
    }
  }
  return series;
}

const char* type_name(prometheus::MetricType type) {
  switch (type) {
    case prometheus::MetricType::Counter: return "counter";
    case prometheus::MetricType::Gauge: return "gauge";
    default: return "histogram";
  }
}

}  // namespace

std::string metrics_json(const std::vector<prometheus::MetricFamily>& families,
                         const MetricsConfig& config) {
  Json metrics = Json::object();
  for (const prometheus::MetricFamily& family : families) {
    Json& one =
        metrics[family.name] = {{"type", type_name(family.type)}, {"series", Json::array()}};
    for (const prometheus::ClientMetric& metric : family.metric) {
      one["series"].push_back(series_json(family.type, metric));
    }
  }
  const double now =
      std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  const Json document = {{"schema_version", 1},
                         {"time", now},
                         {"config",
                          {{"model", config.model_name},
                           {"version", config.version},
                           {"format", config.format},
                           {"page_tokens", config.page_tokens},
                           {"max_model_len", config.max_model_len},
                           {"prefix_caching", config.prefix_caching}}},
                         {"metrics", metrics}};
  return document.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace kvant::serve::monitor
