#include "kvant/calib/calibrate.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "kvant/base/check.h"
#include "kvant/calib/statistics.h"
#include "kvant/model/identity.h"

namespace kvant::calib {
namespace {

using formats::SideFormat;
using formats::SidePlan;
using model::LayerRows;
using model::ModelConfig;

// Steps of whole pages of every size, so that each page lies within one step.
constexpr int kStepTokens = 512;
constexpr float kLargestE4m3 = 448.0f;
constexpr float kSmallestScale = 1e-8f;  // that check_plan accepts

bool has_scale(const SideFormat& side) {
  return formats::format_info(side.base).global_scale != formats::GlobalScale::kNone;
}
bool needs_channels(const formats::CacheFormat& format) {
  return format.k.bias || format.k.smooth || format.v.bias;
}
bool needs_scales(const formats::CacheFormat& format) {
  return has_scale(format.k) || has_scale(format.v);
}

Error invalid(std::string message) {
  return Error(ErrorCode::kInvalidArgument, std::move(message));
}

Error no_pages(const CalibrationConfig& config) {
  return invalid("no sequence fills a page of " + std::to_string(config.page_tokens) + " tokens" +
                 (config.format.sink ? " beside the first one, which stays BF16" : "") +
                 ": run longer ones");
}

Status check_config(const CalibrationConfig& config) {
  KVANT_TRY(formats::check_cache_format(config.format));
  if (calibration_passes(config.format) == 0) {
    return invalid(formats::canonical_name(config.format) +
                   " reads nothing from a plan: a plan holds biases (+bias), factors (+smooth) and "
                   "the scales of fp8 and nvfp4");
  }
  if (!(config.smooth_alpha >= 0 && config.smooth_alpha <= 1)) {
    return invalid("alpha of +smooth must be from 0 to 1; found " +
                   std::to_string(config.smooth_alpha));
  }
  return {};
}

// Calls visit(head, page of K, page of V) for each page of a step that the format encodes.
template <typename Visit>
void visit_pages(const CalibrationConfig& config, const ModelConfig& model, const LayerRows& rows,
                 Visit visit) {
  const int64_t page = config.page_tokens;
  const int64_t count = static_cast<int64_t>(rows.positions.size());
  KVANT_CHECK(count == 0 || rows.positions[0] % page == 0, "steps of whole pages");
  const bool sink = config.format.sink && model.layer_window[rows.layer] == 0;
  const int64_t stride = static_cast<int64_t>(model.num_kv_heads) * model.head_dim;
  for (int64_t first = 0; first + page <= count; first += page) {
    if (sink && rows.positions[first] == 0) continue;
    for (int head = 0; head < model.num_kv_heads; ++head) {
      const int64_t offset = first * stride + static_cast<int64_t>(head) * model.head_dim;
      const HeadPage k = {rows.k.data() + offset, stride, config.page_tokens, model.head_dim};
      const HeadPage v = {rows.v.data() + offset, stride, config.page_tokens, model.head_dim};
      visit(head, k, v);
    }
  }
}

// ---- first pass: means, ranges of channels ----

struct HeadStatistics {
  explicit HeadStatistics(int head_dim) : k(head_dim), v(head_dim), q_largest(head_dim) {}
  ChannelStatistics k, v;
  std::vector<double> q_largest;  // over the query heads of the KV head
};

class ChannelPass {
 public:
  ChannelPass(const CalibrationConfig& config, const ModelConfig& model)
      : config_(config),
        model_(model),
        heads_(static_cast<size_t>(model.num_layers) * model.num_kv_heads,
               HeadStatistics(model.head_dim)) {}

  void add(const LayerRows& rows) {
    const auto centre = config_.format.k.mean ? ChannelStatistics::Centre::kPageMean
                                              : ChannelStatistics::Centre::kNone;
    visit_pages(config_, model_, rows, [&](int head, const HeadPage& k, const HeadPage& v) {
      HeadStatistics& statistics = of(rows.layer, head);
      statistics.k.add(k, centre);
      statistics.v.add(v, ChannelStatistics::Centre::kNone);
    });
    if (config_.format.k.smooth) add_queries(rows);
  }

  // Biases and factors of all layers. kInvalidArgument if no page was encoded.
  Status fill(formats::QuantPlan& plan) {
    for (int layer = 0; layer < model_.num_layers; ++layer) {
      for (int head = 0; head < model_.num_kv_heads; ++head) {
        if (of(layer, head).k.num_tokens() == 0) {
          return no_pages(config_);
        }
        fill_head(of(layer, head), plan.layers[layer]);
      }
    }
    return {};
  }

 private:
  HeadStatistics& of(int layer, int head) {
    return heads_[static_cast<size_t>(layer) * model_.num_kv_heads + head];
  }

  void add_queries(const LayerRows& rows) {
    const size_t dim = static_cast<size_t>(model_.head_dim);
    const size_t group = static_cast<size_t>(model_.query_heads_per_kv_head());
    for (size_t i = 0; i < rows.q.size(); ++i) {
      const size_t query_head = i / dim % static_cast<size_t>(model_.num_query_heads);
      HeadStatistics& head = of(rows.layer, static_cast<int>(query_head / group));
      double& largest = head.q_largest[i % dim];
      largest = std::max(largest, std::abs(static_cast<double>(rows.q[i])));
    }
  }

  // Before RoPE a key's channel meets both channels of the queries' pair.
  std::vector<double> query_ranges(const HeadStatistics& head) const {
    std::vector<double> largest = head.q_largest;
    if (!config_.format.k.pre_rope) return largest;
    const int half = model_.rope.rotary_dim / 2;
    for (int c = 0; c < half; ++c) {
      largest[c] = largest[c + half] = std::max(largest[c], largest[c + half]);
    }
    return largest;
  }

  void fill_head(const HeadStatistics& head, formats::LayerPlan& layer) const {
    const auto append = [](const std::vector<float>& values, std::vector<float>& all) {
      all.insert(all.end(), values.begin(), values.end());
    };
    const SideFormat& k = config_.format.k;
    const std::vector<double> k_mean = head.k.mean();
    std::vector<float> smooth;
    if (k.smooth) {
      smooth = smooth_factors(head.k.largest(k.bias ? k_mean.data() : nullptr), query_ranges(head),
                              config_.smooth_alpha);
      append(smooth, layer.k.smooth);
    }
    if (k.bias) append(bias_of(k_mean, k, smooth.data()), layer.k.bias);
    const SideFormat& v = config_.format.v;
    if (v.bias) append(bias_of(head.v.mean(), v, nullptr), layer.v.bias);
  }

  const CalibrationConfig& config_;
  const ModelConfig& model_;
  std::vector<HeadStatistics> heads_;  // [layer][kv_head]
};

// ---- second pass: ranges of what is encoded ----

class RangePass {
 public:
  RangePass(const CalibrationConfig& config, const ModelConfig& model,
            const formats::QuantPlan& plan)
      : config_(config),
        model_(model),
        plan_(plan),
        largest_(static_cast<size_t>(model.num_layers) * model.num_kv_heads) {}

  void add(const LayerRows& rows) {
    const formats::CacheFormat& format = config_.format;
    visit_pages(config_, model_, rows, [&](int head, const HeadPage& k, const HeadPage& v) {
      Range& range = largest_[index(rows.layer, head)];
      ++range.pages;
      if (has_scale(format.k)) range.k = std::max(range.k, side_range(k, format.k, rows, head));
      if (has_scale(format.v)) range.v = std::max(range.v, side_range(v, format.v, rows, head));
    });
  }

  Status fill(formats::QuantPlan& plan) const {
    for (int layer = 0; layer < model_.num_layers; ++layer) {
      if (largest_[index(layer, 0)].pages == 0) {
        return no_pages(config_);
      }
      fill_side(layer, config_.format.k, &Range::k, plan.layers[layer].k);
      fill_side(layer, config_.format.v, &Range::v, plan.layers[layer].v);
    }
    return {};
  }

 private:
  struct Range {
    float k = 0, v = 0;
    int64_t pages = 0;
  };

  size_t index(int layer, int head) const {
    return static_cast<size_t>(layer) * model_.num_kv_heads + head;
  }

  float side_range(const HeadPage& page, const SideFormat& side, const LayerRows& rows,
                   int head) const {
    const bool keys = &side == &config_.format.k;
    return encoded_range(page, side, plan_.side_params(rows.layer, keys, head, model_.head_dim));
  }

  // g = largest / 448: for each head, or of all heads together.
  void fill_side(int layer, const SideFormat& side, float Range::*largest, SidePlan& plan) const {
    if (!has_scale(side)) return;
    std::vector<float> ranges;
    for (int head = 0; head < model_.num_kv_heads; ++head) {
      ranges.push_back(largest_[index(layer, head)].*largest);
    }
    if (formats::format_info(side.base).global_scale == formats::GlobalScale::kPerTensor) {
      ranges = {*std::ranges::max_element(ranges)};
    }
    for (const float range : ranges) {  // where all is zero any scale will do
      plan.global_scale.push_back(range > 0 ? std::max(range / kLargestE4m3, kSmallestScale) : 1);
    }
  }

  const CalibrationConfig& config_;
  const ModelConfig& model_;
  const formats::QuantPlan& plan_;  // biases and factors
  std::vector<Range> largest_;      // [layer][kv_head]
};

// ---- running the model ----

// Observes the model as long as it lives.
class Observation {
 public:
  Observation(model::Model& model, model::LayerObserver observer) : model_(model) {
    model_.set_observer(std::move(observer));
  }
  ~Observation() { model_.set_observer({}); }
  Observation(const Observation&) = delete;
  Observation& operator=(const Observation&) = delete;

 private:
  model::Model& model_;
};

Status run_sequence(model::Model& model, cache::KvCache& cache, std::span<const int32_t> tokens,
                    const std::atomic<bool>* cancel) {
  KVANT_ASSIGN(const cache::SequenceId id, cache.add_sequence());
  const size_t step = static_cast<size_t>(model.max_step_tokens());
  Status done;
  for (size_t first = 0; first < tokens.size() && done; first += step) {
    const model::ForwardSequence part = {
        id, tokens.subspan(first, std::min(step, tokens.size() - first)), 0};
    const auto no_logits = [](int64_t, std::span<const float>) { return Status(); };
    done = model.forward(std::span(&part, 1), cache, no_logits, cancel);
  }
  cache.remove_sequence(id);
  return done;
}

template <typename Pass>
Status run_pass(model::Model& model, const CalibrationConfig& config, const ForwardLoop& loop,
                Pass& pass) {
  KVANT_ASSIGN(const auto cache, model.create_cache(calibration_runtime(config)));
  const Observation observation(model, [&](const LayerRows& rows) {
    pass.add(rows);
    return Status();
  });
  return loop([&](std::span<const int32_t> tokens) {
    return run_sequence(model, *cache, tokens, config.cancel);
  });
}

}  // namespace

int calibration_passes(const formats::CacheFormat& format) {
  return (needs_channels(format) ? 1 : 0) + (needs_scales(format) ? 1 : 0);
}

model::RuntimeOptions calibration_runtime(const CalibrationConfig& config) {
  model::RuntimeOptions runtime;
  runtime.format.k.pre_rope = config.format.k.pre_rope;  // the observer sees what is appended
  runtime.page_tokens = config.page_tokens;
  runtime.context_tokens = config.context_tokens;
  runtime.max_step_tokens = kStepTokens;
  return runtime;
}

Result<formats::QuantPlan> calibrate(model::Model& model, const CalibrationConfig& config,
                                     const ForwardLoop& loop) {
  KVANT_TRY(check_config(config));
  const ModelConfig& geometry = model.config();
  formats::QuantPlan plan;
  plan.geometry_id = geometry.geometry_id();
  KVANT_ASSIGN(const model::Sha256 weights,
               model::weights_id(model.source(), model::default_cache_dir()));
  plan.weights_id = model::to_hex(weights);
  plan.corpus_sha256 = config.corpus_sha256;
  plan.kv = formats::canonical_name(config.format);
  plan.layers.resize(geometry.num_layers);
  for (formats::LayerPlan& layer : plan.layers) {
    layer.num_kv_heads = geometry.num_kv_heads;
    layer.head_dim = geometry.head_dim;
  }
  KVANT_TRY(model.reserve(calibration_runtime(config)));
  if (needs_channels(config.format)) {
    ChannelPass pass(config, geometry);
    KVANT_TRY(run_pass(model, config, loop, pass));
    KVANT_TRY(pass.fill(plan));
  }
  if (needs_scales(config.format)) {
    RangePass pass(config, geometry, plan);
    KVANT_TRY(run_pass(model, config, loop, pass));
    KVANT_TRY(pass.fill(plan));
  }
  return plan;
}

}  // namespace kvant::calib
