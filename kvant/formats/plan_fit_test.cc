#include <gtest/gtest.h>

#include <cmath>

#include "kvant/formats/codec.h"
#include "kvant/formats/plan.h"

namespace kvant::formats {
namespace {

constexpr int kHeads = 2, kDim = 16;

CacheFormat format_of(std::string_view spec) {
  return parse_cache_format(spec).value();
}

// K and V with all terms; the means of plain channels are `channel_mean(c)`.
float channel_mean(int c) {
  return 3.0f * static_cast<float>(c % 5) - 4.0f;
}
float factor(int c) {
  return 0.5f + 0.25f * static_cast<float>(c % 7);
}

QuantPlan plan_for(const std::string& kv) {
  const CacheFormat format = format_of(kv);
  QuantPlan plan;
  plan.kv = kv;
  LayerPlan layer;
  layer.num_kv_heads = kHeads;
  layer.head_dim = kDim;
  for (SidePlan* side : {&layer.k, &layer.v}) {
    const SideFormat& options = side == &layer.k ? format.k : format.v;
    for (int i = 0; i < kHeads * kDim; ++i) {
      side->bias.push_back(options.smooth ? channel_mean(i) / factor(i) : channel_mean(i));
      if (side == &layer.k) side->smooth.push_back(factor(i));
    }
    for (int head = 0; head < kHeads && options.rotate; ++head) {
      rotate_row(side->bias.data() + head * kDim, kDim);
    }
    side->global_scale = {0.25f, 0.5f};
  }
  plan.layers = {layer, layer};
  return plan;
}

void expect_near(const std::vector<float>& got, const std::vector<float>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i], want[i], 1e-5f) << i;
}

TEST(FitPlan, KeepsEveryBitOfItsOwnFormat) {
  const QuantPlan plan = plan_for("k=fp8:head+bias+smooth+rot,v=fp8:head+bias");
  const FittedPlan fitted = fit_plan(plan, format_of(plan.kv)).value();
  EXPECT_FALSE(fitted.k_scales_left_out);
  EXPECT_FALSE(fitted.v_scales_left_out);
  ASSERT_EQ(fitted.plan.layers.size(), 2u);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(fitted.plan.layers[i].k.bias, plan.layers[i].k.bias);
    EXPECT_EQ(fitted.plan.layers[i].k.smooth, plan.layers[i].k.smooth);
    EXPECT_EQ(fitted.plan.layers[i].k.global_scale, plan.layers[i].k.global_scale);
    EXPECT_EQ(fitted.plan.layers[i].v.bias, plan.layers[i].v.bias);
    EXPECT_EQ(fitted.plan.layers[i].v.global_scale, plan.layers[i].v.global_scale);
  }
}

TEST(FitPlan, MovesBiasesBetweenFrames) {
  const char* const frames[] = {"k=nvfp4+bias,v=nvfp4+bias", "k=nvfp4+bias+smooth,v=nvfp4+bias",
                                "k=nvfp4+bias+rot,v=nvfp4+bias+rot",
                                "k=nvfp4+bias+smooth+rot,v=nvfp4+bias+rot"};
  for (const char* from : frames) {
    for (const char* to : frames) {
      SCOPED_TRACE(std::string(from) + " -> " + to);
      const FittedPlan fitted = fit_plan(plan_for(from), format_of(to)).value();
      const QuantPlan want = plan_for(to);
      expect_near(fitted.plan.layers[1].k.bias, want.layers[1].k.bias);
      expect_near(fitted.plan.layers[1].v.bias, want.layers[1].v.bias);
      EXPECT_TRUE(check_plan(fitted.plan, format_of(to), 2, kHeads, kDim));
    }
  }
}

TEST(FitPlan, LeavesOutScalesOfOtherValues) {
  const QuantPlan plan = plan_for("k=nvfp4+bias+smooth,v=nvfp4+sink");
  struct Case {
    const char* to;
    bool k_left_out, v_left_out;
  };
  for (const Case& c : {Case{"k=fp8+bias+smooth,v=fp8+sink", false, false},
                        Case{"k=fp8+bias,v=nvfp4+46+sink", true, false},
                        Case{"k=fp8+smooth,v=nvfp4+rot+sink", true, true},
                        Case{"k=fp8+bias+smooth,v=fp8", true, true},  // the first page too
                        Case{"k=int8+bias,v=int8", false, false}}) {  // read no scales
    const FittedPlan fitted = fit_plan(plan, format_of(c.to)).value();
    EXPECT_EQ(fitted.k_scales_left_out, c.k_left_out) << c.to;
    EXPECT_EQ(fitted.v_scales_left_out, c.v_left_out) << c.to;
    const bool int8 = std::string_view(c.to).starts_with("k=int8");
    EXPECT_EQ(fitted.plan.layers[0].k.global_scale.empty(), c.k_left_out || int8) << c.to;
    EXPECT_EQ(fitted.plan.layers[0].v.global_scale.empty(), c.v_left_out || int8) << c.to;
    EXPECT_TRUE(check_plan(fitted.plan, format_of(c.to), 2, kHeads, kDim)) << c.to;
  }
}

TEST(FitPlan, OneScaleOfSeveralHeadsIsTheLargest) {
  const QuantPlan plan = plan_for("fp8:head");
  EXPECT_EQ(fit_plan(plan, format_of("fp8"))->plan.layers[0].v.global_scale,
            (std::vector<float>{0.5f}));
  EXPECT_EQ(fit_plan(plan, format_of("fp8:head"))->plan.layers[0].v.global_scale,
            (std::vector<float>{0.25f, 0.5f}));
}

TEST(FitPlan, RefusesWhatCannotBeMoved) {
  const auto code = [](const QuantPlan& plan, const char* to) {
    const auto fitted = fit_plan(plan, format_of(to));
    return fitted ? ErrorCode::kInternal : fitted.error().code();
  };
  EXPECT_EQ(code(plan_for("k=nvfp4+bias,v=nvfp4"), "k=nvfp4+bias+prerope,v=nvfp4"),
            ErrorCode::kInvalidArgument);
  EXPECT_EQ(code(plan_for("k=nvfp4+smooth+prerope,v=nvfp4"), "k=nvfp4+smooth,v=nvfp4"),
            ErrorCode::kInvalidArgument);
  QuantPlan plan = plan_for("k=nvfp4+bias+smooth,v=nvfp4");
  plan.layers[1].k.smooth.clear();
  EXPECT_EQ(code(plan, "k=nvfp4+bias,v=nvfp4"), ErrorCode::kCorruptData);
  plan.kv = "nvfp5";
  EXPECT_EQ(code(plan, "nvfp4"), ErrorCode::kCorruptData);
}

}  // namespace
}  // namespace kvant::formats
