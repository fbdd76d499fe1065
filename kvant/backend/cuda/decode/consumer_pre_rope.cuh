// Consumer of keys stored before RoPE: what the launch knows of formats and options, by uniform
// branches. Included by consumer.cuh.
#pragma once

#include <type_traits>
#include <utility>

#include "kvant/backend/cuda/decode/consumer.cuh"

namespace kvant::backend::cuda {

template <typename Shape>
template <typename Use>
__device__ __forceinline__ void Consumer<Shape>::with_octets(const Use& use) const {
  if constexpr (Shape::kAny) {
    const auto try_each = [&]<int... kOctets>(std::integer_sequence<int, kOctets...>) {
      (void)((params_.pre_rope.octets == kSteps - kOctets
                  ? (use(std::integral_constant<int, kSteps - kOctets>()), true)
                  : false) ||
             ...);
    };
    try_each(std::make_integer_sequence<int, kSteps + 1>());
  } else {
    use(std::integral_constant<int, kSteps>());
  }
}

template <typename Shape>
__device__ __forceinline__ float Consumer<Shape>::decode_any_keys(
    const KeyPage& page, int tile, KeyFragments<kHeadDim>& keys) const {
  switch (params_.key_kernel) {
#define KVANT_CASE(kernel)                                   \
  case KeyKernel::kernel:                                    \
    decode_keys<KeyKernel::kernel>(page, tile, lane_, keys); \
    return pre_rope_unit(KeyKernel::kernel);
    KVANT_CASE(kNvfp4)
    KVANT_CASE(kMxfp4)
    KVANT_CASE(kE4m3)
    KVANT_CASE(kE4m3Token)
    KVANT_CASE(kE5m2)
    KVANT_CASE(kMxfp8)
    KVANT_CASE(kInt8)
    KVANT_CASE(kInt4)
    KVANT_CASE(kInt4Channel)
    KVANT_CASE(kInt3Channel)
    KVANT_CASE(kInt2Channel)
#undef KVANT_CASE
    default:
      decode_16_bit_keys(page.codes + tile * kHeadDim * 32, params_.key_kernel == KeyKernel::kF16,
                         lane_, keys);
      return 1.0f;
  }
}

template <typename Shape>
__device__ __forceinline__ void Consumer<Shape>::undo_options(const KeyPage& page, float& unit,
                                                              KeyFragments<kHeadDim>& keys) const {
  const PreRopeParams& options = params_.pre_rope;
  const int64_t head = static_cast<int64_t>(now_->segment.kv_head) * kHeadDim;
  if (page.mean != 0) {
    unit = add_key_terms(
        unit, lane_,
        [&](int channel) -> float2 {
          const uint32_t pair =
              *reinterpret_cast<const uint32_t*>(page.codes + page.mean + channel * 2);
          return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
        },
        keys);
  } else if (options.bias != nullptr) {
    unit = add_key_terms(
        unit, lane_,
        [&](int channel) {
          return __ldg(reinterpret_cast<const float2*>(options.bias + head + channel));
        },
        keys);
  }
  const auto smooth = [&](int channel) {
    return __ldg(reinterpret_cast<const float2*>(options.smooth + head + channel));
  };
  if (options.rotated) {
    unrotate_keys(
        lane_,
        [&](int channel) -> float2 {
          if (options.smooth == nullptr) return {options.rotation_scale, options.rotation_scale};
          const float2 x = smooth(channel);
          return {x.x * options.rotation_scale, x.y * options.rotation_scale};
        },
        keys);
  } else if (options.smooth != nullptr) {
    multiply_keys(lane_, smooth, keys);
  }
}

}  // namespace kvant::backend::cuda
