// A plan made for one cache format as another needs it.
#include <algorithm>

#include "kvant/formats/codec.h"
#include "kvant/formats/plan.h"
#include "kvant/formats/suggest.h"

namespace kvant::formats {
namespace {

// Whether both sides transform values alike before they subtract anything.
bool same_frame(const SideFormat& a, const SideFormat& b) {
  return a.smooth == b.smooth && a.rotate == b.rotate && a.pre_rope == b.pre_rope;
}

// Whether both encode the same values.
bool same_values(const SideFormat& a, const SideFormat& b) {
  return same_frame(a, b) && a.bias == b.bias && a.mean == b.mean;
}

struct SideFit {
  const SideFormat& from;
  const SideFormat& to;
  bool keys;
  bool scales_apply;
};

// From the frame of `from` to plain channels, and on to the frame of `to`.
Status move_bias(const SideFit& fit, int head_dim, SidePlan& side) {
  if (side.bias.empty() || same_frame(fit.from, fit.to)) return {};
  const bool factors = fit.from.smooth != fit.to.smooth;
  const bool whole_rows = head_dim > 0 && side.bias.size() % static_cast<size_t>(head_dim) == 0;
  if (!whole_rows || (factors && side.smooth.size() != side.bias.size())) {
    return Error(ErrorCode::kCorruptData,
                 "plan: its biases were measured after +smooth, but its factors are missing");
  }
  for (size_t first = 0; first < side.bias.size(); first += static_cast<size_t>(head_dim)) {
    float* row = side.bias.data() + first;
    if (fit.from.rotate) rotate_row(row, head_dim);
    for (int c = 0; c < head_dim && factors; ++c) {
      const float factor = side.smooth[first + static_cast<size_t>(c)];
      row[c] = fit.from.smooth ? row[c] * factor : row[c] / factor;
    }
    if (fit.to.rotate) rotate_row(row, head_dim);
  }
  return {};
}

Status fit_side(const SideFit& fit, int head_dim, SidePlan& side) {
  if (!fit.to.bias) side.bias.clear();
  KVANT_TRY(move_bias(fit, head_dim, side));
  if (!fit.to.smooth) side.smooth.clear();
  const GlobalScale kind = format_info(fit.to.base).global_scale;
  if (kind == GlobalScale::kNone || !fit.scales_apply) side.global_scale.clear();
  if (kind == GlobalScale::kPerTensor && side.global_scale.size() > 1) {
    side.global_scale = {*std::ranges::max_element(side.global_scale)};
  }
  return {};
}

bool reads_scales(const QuantPlan& plan, const SideFormat& side, bool keys) {
  return format_info(side.base).global_scale != GlobalScale::kNone &&
         std::ranges::any_of(plan.layers, [&](const LayerPlan& layer) {
           return !(keys ? layer.k : layer.v).global_scale.empty();
         });
}

}  // namespace

Result<FittedPlan> fit_plan(const QuantPlan& plan, const CacheFormat& format) {
  const Result<CacheFormat> made_for = parse_cache_format(plan.kv);
  if (!made_for) {
    return Error(ErrorCode::kCorruptData,
                 "plan: the format that it was made for is not one of this version of kvant (" +
                     made_for.error().message() + ")");
  }
  const SideFormat& k = made_for->k;
  if (k.pre_rope != format.k.pre_rope && (format.k.bias || format.k.smooth)) {
    return Error(ErrorCode::kInvalidArgument,
                 "the plan was made for " + quote_name(plan.kv) + ", whose keys are " +
                     (k.pre_rope ? "before" : "after") +
                     " RoPE; its biases and factors do not fit " +
                     quote_name(canonical_name(format)) +
                     "; calibrate for that format (`kvant calibrate --kv`)");
  }
  // Without the first page scales may be too small for it.
  const bool first_page_fits = format.sink || !made_for->sink;
  const SideFit k_fit = {k, format.k, true, first_page_fits && same_values(k, format.k)};
  const SideFit v_fit = {made_for->v, format.v, false,
                         first_page_fits && same_values(made_for->v, format.v)};
  FittedPlan fitted;
  fitted.plan = plan;
  fitted.plan.kv = canonical_name(format);
  for (LayerPlan& layer : fitted.plan.layers) {
    for (const SideFit* fit : {&k_fit, &v_fit}) {
      KVANT_TRY(fit_side(*fit, layer.head_dim, fit->keys ? layer.k : layer.v));
    }
  }
  fitted.k_scales_left_out = !k_fit.scales_apply && reads_scales(plan, format.k, true);
  fitted.v_scales_left_out = !v_fit.scales_apply && reads_scales(plan, format.v, false);
  return fitted;
}

}  // namespace kvant::formats
