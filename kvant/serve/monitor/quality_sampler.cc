#include "kvant/serve/monitor/quality_sampler.h"

#include <cmath>
#include <utility>

#include "kvant/base/cpu_level.h"
#include "kvant/base/small_floats.h"
#include "kvant/formats/sections.h"

namespace kvant::serve {
namespace {

constexpr double kOutlierRms = 6;

const formats::CacheFormat& layer_format(const model::RuntimeOptions& runtime, int layer) {
  return runtime.layer_formats.empty() ? runtime.format
                                       : runtime.layer_formats[static_cast<size_t>(layer)];
}

// One head's page through the codec and back.
struct PageSide {
  std::vector<float> rows, decoded;
  std::vector<uint8_t> codes, scales;
  std::vector<uint16_t> mean;
};

void add_differences(const PageSide& page, double& squares, double& errors) {
  for (size_t i = 0; i < page.rows.size(); ++i) {
    const double value = page.rows[i];
    const double difference = page.decoded[i] - value;
    squares += value * value;
    errors += difference * difference;
  }
}

int64_t count_outliers(const std::vector<float>& rows) {
  double squares = 0;
  for (const float value : rows) squares += static_cast<double>(value) * value;
  const double limit = kOutlierRms * std::sqrt(squares / static_cast<double>(rows.size()));
  int64_t count = 0;
  for (const float value : rows) count += std::fabs(value) > limit;
  return count;
}

}  // namespace

std::vector<ScaleAudit> audit_scales(const model::RuntimeOptions& runtime, int num_layers,
                                     bool keys) {
  std::vector<ScaleAudit> audit = {
      {ScaleSource::kNone, 0}, {ScaleSource::kPlan, 0}, {ScaleSource::kUnit, 0}};
  for (int layer = 0; layer < num_layers; ++layer) {
    const formats::CacheFormat& format = layer_format(runtime, layer);
    const formats::FormatId base = keys ? format.k.base : format.v.base;
    ScaleSource source = ScaleSource::kNone;
    if (formats::format_info(base).global_scale != formats::GlobalScale::kNone) {
      source = ScaleSource::kUnit;
      if (runtime.plan != nullptr && static_cast<size_t>(layer) < runtime.plan->layers.size()) {
        const formats::LayerPlan& plan = runtime.plan->layers[static_cast<size_t>(layer)];
        if (!(keys ? plan.k : plan.v).global_scale.empty()) source = ScaleSource::kPlan;
      }
    }
    for (ScaleAudit& one : audit) one.layers += one.source == source;
  }
  return audit;
}

QualitySampler::QualitySampler(model::Model& model, model::RuntimeOptions runtime,
                               int64_t every_prompts, Report report)
    : model_(model),
      runtime_(std::move(runtime)),
      every_prompts_(every_prompts),
      report_(std::move(report)),
      prompts_(every_prompts - 1) {}  // the first prompt is a sample

Result<std::unique_ptr<QualitySampler>> QualitySampler::create(model::Model& model,
                                                               const model::RuntimeOptions& runtime,
                                                               int64_t every_prompts,
                                                               Report report) {
  bool plain = runtime.format.is_bf16();
  for (const formats::CacheFormat& format : runtime.layer_formats) plain &= format.is_bf16();
  if (plain || every_prompts <= 0) return std::unique_ptr<QualitySampler>();
  std::unique_ptr<QualitySampler> sampler(
      new QualitySampler(model, runtime, every_prompts, std::move(report)));
  if (runtime.plan != nullptr) {
    KVANT_ASSIGN(formats::FittedPlan fitted, formats::fit_plan(*runtime.plan, runtime.format));
    sampler->plan_ = std::move(fitted.plan);
  } else {
    sampler->plan_.layers.resize(static_cast<size_t>(model.config().num_layers));
  }
  return sampler;
}

QualitySampler::~QualitySampler() {
  model_.set_observer({});
}

void QualitySampler::on_lookup(int64_t queried, int64_t found) {
  if (looking_ || queried - found < runtime_.page_tokens || ++prompts_ < every_prompts_) return;
  looking_ = true;
  found_ = false;
  model_.set_observer([this](const model::LayerRows& rows) { return look(rows); });
}

void QualitySampler::on_step(const StepRecord&) {
  if (!looking_) return;
  looking_ = false;
  model_.set_observer({});
}

// A sample is a view on the step, never a reason for it to fail.
Status QualitySampler::look(const model::LayerRows& rows) {
  if (found_ || rows.layer != next_layer_) return {};
  const std::optional<int64_t> first_row = whole_page(rows.positions, rows.layer);
  if (!first_row) return {};
  for (const bool keys : {true, false}) static_cast<void>(compare(rows, *first_row, keys));
  found_ = true;
  prompts_ = 0;
  next_layer_ = (next_layer_ + 1) % model_.config().num_layers;
  return {};
}

// The first row of the step's first page that is computed whole, and that is encoded at all.
std::optional<int64_t> QualitySampler::whole_page(std::span<const int64_t> positions,
                                                  int layer) const {
  const auto tokens = static_cast<size_t>(runtime_.page_tokens);
  const bool full = model_.config().layer_window[static_cast<size_t>(layer)] == 0;
  for (size_t i = 0; i + tokens <= positions.size(); ++i) {
    if (positions[i] % runtime_.page_tokens != 0) continue;
    if (runtime_.format.sink && full && positions[i] == 0) continue;
    size_t length = 1;
    while (length < tokens && positions[i + length] == positions[i] + static_cast<int64_t>(length))
      ++length;
    if (length == tokens) return static_cast<int64_t>(i);
  }
  return std::nullopt;
}

Status QualitySampler::compare(const model::LayerRows& rows, int64_t first_row, bool keys) {
  const formats::CacheFormat& format = layer_format(runtime_, rows.layer);
  const formats::SideFormat& side = keys ? format.k : format.v;
  if (side.base == formats::FormatId::kBf16) return {};
  const int heads = model_.config().num_kv_heads;
  const int head_dim = model_.config().head_dim;
  const int tokens = runtime_.page_tokens;
  KVANT_ASSIGN(const CpuLevel level, choose_cpu_level());
  KVANT_ASSIGN(const formats::Codec codec, formats::Codec::create(side, head_dim, level));
  const formats::SideBytes bytes = formats::side_bytes(side, tokens, head_dim);
  PageSide page;
  page.rows.resize(static_cast<size_t>(tokens) * static_cast<size_t>(head_dim));
  page.decoded.resize(page.rows.size());
  page.codes.resize(static_cast<size_t>(bytes.codes));
  page.scales.resize(static_cast<size_t>(bytes.scales));
  page.mean.resize(side.mean ? static_cast<size_t>(head_dim) : 0);
  uint16_t* const mean = side.mean ? page.mean.data() : nullptr;

  QualitySample sample{.keys = keys};
  double squares = 0, errors = 0;
  for (int head = 0; head < heads; ++head) {
    const std::span<const float> source = keys ? rows.k : rows.v;
    for (int t = 0; t < tokens; ++t) {
      const size_t row = static_cast<size_t>(((first_row + t) * heads + head) * head_dim);
      for (int c = 0; c < head_dim; ++c) {
        page.rows[static_cast<size_t>(t * head_dim + c)] =
            from_bf16(to_bf16(source[row + static_cast<size_t>(c)]));
      }
    }
    const formats::SideParams params = plan_.side_params(rows.layer, keys, head, head_dim);
    const formats::EncodeStats stats = codec.encode_page(
        page.rows.data(), tokens, params, {page.codes.data(), page.scales.data(), mean});
    codec.decode_page({page.codes.data(), page.scales.data(), mean}, tokens, params,
                      formats::Codec::Frame::kPlain, page.decoded.data());
    sample.saturated += stats.saturated;
    sample.outliers += count_outliers(page.rows);
    sample.values += static_cast<int64_t>(page.rows.size());
    add_differences(page, squares, errors);
  }
  if (!(squares > 0) || !std::isfinite(errors)) return {};
  sample.error = std::sqrt(errors / squares);
  report_(sample);
  return {};
}

}  // namespace kvant::serve
