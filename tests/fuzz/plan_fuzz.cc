// Hostile plan files: parsing, the plausibility check, and the terms of every layer.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

#include "kvant/formats/plan.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvant::formats;
  constexpr int kHeads = 2, kDim = 16;
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data), size);
  const kvant::Result<QuantPlan> plan = QuantPlan::parse(bytes, "fuzz");
  if (!plan) return 0;
  static const CacheFormat format = *parse_cache_format("k=nvfp4+bias+smooth,v=fp8:head+bias");
  const int num_layers = static_cast<int>(plan->layers.size());
  if (!check_plan(*plan, format, num_layers, kHeads, kDim)) return 0;
  for (int layer = 0; layer < num_layers; ++layer) {
    for (const bool keys : {true, false}) {
      const SideParams params = plan->side_params(layer, keys, kHeads - 1, kDim);
      // What passed the check can be used: extents fit and scales are positive.
      if (!(params.global_scale > 0.0f) || params.bias == nullptr) std::abort();
      volatile float sink = params.bias[kDim - 1];
      (void)sink;
    }
  }
  return 0;
}
