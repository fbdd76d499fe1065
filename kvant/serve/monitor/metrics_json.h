// Metrics as JSON for the dashboard. Private to metrics.cc.
#pragma once

#include <prometheus/metric_family.h>

#include <string>
#include <vector>

#include "kvant/serve/monitor/metrics.h"

namespace kvant::serve::monitor {

std::string metrics_json(const std::vector<prometheus::MetricFamily>& families,
                         const MetricsConfig& config);

}  // namespace kvant::serve::monitor
