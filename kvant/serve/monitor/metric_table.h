// The families of metrics and their series, made once and kept by reference: prometheus-cpp looks
// labels up in maps, which is too slow for every token. Private to metrics.cc.
#pragma once

#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kvant/serve/monitor/metrics.h"

namespace kvant::serve::monitor {

using prometheus::Counter;
using prometheus::Gauge;
using prometheus::Histogram;
using Labels = std::map<std::string, std::string>;

// A counter that follows a total which somebody else keeps.
class FollowingCounter {
 public:
  explicit FollowingCounter(Counter& counter) : counter_(&counter) {}
  // A total that went back (its owner began anew) counts from there.
  void follow(double total) {
    if (total > last_) counter_->Increment(total - last_);
    last_ = total;
  }

 private:
  Counter* counter_;
  double last_ = 0;
};

// Series of one name that differ in labels, made when first asked for.
template <typename Metric>
class Series {
 public:
  Series(prometheus::Family<Metric>& family, Labels common)
      : family_(&family), common_(std::move(common)) {}
  template <typename... Arguments>
  Metric& with(const Labels& labels, Arguments&&... arguments) {
    Labels all = common_;
    all.insert(labels.begin(), labels.end());
    return family_->Add(all, std::forward<Arguments>(arguments)...);
  }

 private:
  prometheus::Family<Metric>* family_;
  Labels common_;
};

class MetricTable {
 public:
  explicit MetricTable(Labels common) : common_(std::move(common)) {}

  prometheus::Registry& registry() { return registry_; }
  const prometheus::Registry& registry() const { return registry_; }

  Gauge& gauge(const char* name, const char* help) { return gauges(name, help).with({}); }
  Counter& counter(const char* name, const char* help) { return counters(name, help).with({}); }
  Histogram& histogram(const char* name, const char* help, const std::vector<double>& bounds) {
    return histograms(name, help).with({}, bounds);
  }
  Series<Gauge> gauges(const char* name, const char* help) {
    return {prometheus::BuildGauge().Name(name).Help(help).Register(registry_), common_};
  }
  Series<Counter> counters(const char* name, const char* help) {
    return {prometheus::BuildCounter().Name(name).Help(help).Register(registry_), common_};
  }
  Series<Histogram> histograms(const char* name, const char* help) {
    return {prometheus::BuildHistogram().Name(name).Help(help).Register(registry_), common_};
  }

 private:
  Labels common_;
  prometheus::Registry registry_;
};

// 1, 2, 5, 10, 20, 50, ... up to `largest`, as vLLM's histograms of counts.
std::vector<double> one_two_five(int64_t largest);

inline const std::vector<double> kFirstTokenBounds = {
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1,  0.25,  0.5,   0.75,
    1.0,   2.5,   5.0,  7.5,  10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0};
inline const std::vector<double> kInterTokenBounds = {0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2,
                                                      0.3,  0.4,   0.5,  0.75,  1.0, 2.5,  5.0,
                                                      7.5,  10.0,  20.0, 40.0,  80.0};
inline const std::vector<double> kRequestBounds = {
    0.3,  0.5,  0.8,  1.0,  1.5,   2.0,   2.5,   5.0,   10.0,   15.0,  20.0,
    30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0};
inline const std::vector<double> kIterationBounds = {1,   8,    16,   32,   64,   128,  256,
                                                     512, 1024, 2048, 4096, 8192, 16384};
inline const std::vector<double> kChoiceBounds = {1, 2, 5, 10, 20};
// Of the HTTP layer, which aims at less than five milliseconds.
inline const std::vector<double> kHttpBounds = {
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0};
inline const std::vector<double> kErrorBounds = {0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05,
                                                 0.075, 0.1,    0.15,  0.2,  0.3,  0.5,  1.0};

}  // namespace kvant::serve::monitor
