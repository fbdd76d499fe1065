#include "kvant/backend/backend.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>

namespace kvant::backend {

Status Backend::norm_linear(const RmsNormArgs& norm, std::span<const LinearTarget> targets) {
  KVANT_TRY(rms_norm(norm));
  return linear(norm.out, norm.num_rows, targets);
}

Status Backend::norm_gated(const GatedArgs& args) {
  const std::array<LinearTarget, 2> targets = {{
      {.matrix = args.gate, .out = args.out},
      {.matrix = args.up, .out = args.up_scratch},
  }};
  KVANT_TRY(norm_linear(args.norm, targets));
  return gate(args.kind, args.out, args.up_scratch, args.out,
              args.norm.num_rows * args.gate->rows());
}

Status Backend::greatest_in_rows(const void* x, int64_t num_rows, int64_t num_cols,
                                 RowMaximum* maxima) {
  const auto* values = static_cast<const float*>(x);
  for (int64_t row = 0; row < num_rows; ++row) {
    maxima[row] = greatest_value({values + row * num_cols, static_cast<size_t>(num_cols)});
  }
  return {};
}

Status Backend::repeat(const RepeatKey&, const std::function<Status()>& enqueue) {
  return enqueue();
}

Status Backend::rope_append(const RopeArgs& rope_args, const AppendArgs& args) {
  KVANT_TRY(rope(rope_args));
  return append(args);
}

RowMaximum greatest_value(std::span<const float> values) {
  constexpr uint32_t kExponent = 0x7f800000u;  // infinite and not a number have all its bits
  constexpr size_t kLanes = 16;                // independent chains, for vector registers
  float lanes[kLanes];
  uint32_t broken[kLanes] = {};
  std::fill_n(lanes, kLanes, -std::numeric_limits<float>::infinity());
  const auto take = [&](size_t lane, float value) {
    lanes[lane] = value > lanes[lane] ? value : lanes[lane];
    broken[lane] |= (std::bit_cast<uint32_t>(value) & kExponent) == kExponent ? 1u : 0u;
  };
  const size_t whole = values.size() / kLanes * kLanes;
  for (size_t i = 0; i < whole; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) take(lane, values[i + lane]);
  }
  for (size_t i = whole; i < values.size(); ++i) take(i - whole, values[i]);
  RowMaximum result;
  if (values.empty() || *std::max_element(broken, broken + kLanes) != 0) return result;
  result.value = *std::max_element(lanes, lanes + kLanes);
  const auto found = std::find(values.begin(), values.end(), result.value);
  result.index = static_cast<int32_t>(found - values.begin());
  result.value = *found;
  return result;
}

int64_t activation_bytes(ActivationType type, int64_t num_values) {
  return num_values * (type == ActivationType::kF32 ? 4 : 2);
}

}  // namespace kvant::backend
