#include "kvant/backend/backend.h"

#include <array>

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

Status Backend::rope_append(const RopeArgs& rope_args, const AppendArgs& args) {
  KVANT_TRY(rope(rope_args));
  return append(args);
}

int64_t activation_bytes(ActivationType type, int64_t num_values) {
  return num_values * (type == ActivationType::kF32 ? 4 : 2);
}

}  // namespace kvant::backend
