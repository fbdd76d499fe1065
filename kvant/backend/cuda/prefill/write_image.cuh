// Device code that writes images, a warp a side of a page of a KV head: used by the kernels of
// dequantise.cu and, beside attention, by attention_kernel.cuh.
#pragma once

#include "kvant/backend/cuda/hopper.cuh"
#include "kvant/backend/cuda/matrices.cuh"
#include "kvant/backend/cuda/prefill/dequantise.h"
#include "kvant/backend/cuda/prefill/fragments.cuh"
#include "kvant/formats/all_formats.h"

namespace kvant::backend::cuda {

using formats::FormatId;
using formats::GlobalScale;

template <FormatId kId>
struct FormatOf;
#define KVANT_FORMAT(number, Type, header)                    \
  template <>                                                 \
  struct FormatOf<FormatId::k##Type> {                        \
    static constexpr FormatInfo kInfo = formats::Type::kInfo; \
  };
#include "kvant/formats/formats.def"
#undef KVANT_FORMAT

constexpr int kTileTokens = 16;

// One side of one page of one KV head, for a warp.
struct Side {
  const uint8_t* codes;
  const uint8_t* scales;
  const uint16_t* mean;  // null: no such term; likewise below
  const float* bias;
  const float* smooth;
  bool rotate;
  float global_scale;
  const float* reference;  // b, then the scales (reference_floats)
  int num_tokens;
  int page_number;
  std::byte* image;
};

__device__ __forceinline__ Side side_of(const DequantiseArgs& args, const ImageJob& job, int head,
                                        bool keys) {
  const UnitKind& kind = args.kinds[job.kind];
  const SideKind& format = keys ? kind.k : kind.v;
  const auto* unit = reinterpret_cast<const uint8_t*>(kind.base + job.slot * kind.page_bytes) +
                     head * kind.unit_bytes;
  Side side;
  side.codes = unit + format.codes;
  side.scales = unit + format.scales;
  side.mean = format.mean ? reinterpret_cast<const uint16_t*>(unit + format.mean_at) : nullptr;
  const float* bias = keys ? args.k_bias : args.v_bias;
  side.bias = format.bias && bias != nullptr ? bias + head * args.head_dim : nullptr;
  side.smooth =
      format.smooth && args.k_smooth != nullptr ? args.k_smooth + head * args.head_dim : nullptr;
  side.rotate = format.rotate;
  side.global_scale = (keys ? args.k_scale : args.v_scale)[head];
  side.reference =
      args.references + (static_cast<int64_t>(job.sequence) * args.num_kv_heads + head) *
                            reference_floats(args.head_dim);
  side.num_tokens = job.num_tokens;
  side.page_number = job.page_number;
  const int64_t bytes = image_bytes(args.head_dim, args.page_tokens, args.type);
  side.image = args.images + (head - args.first_head) * args.head_stride +
               (2 * static_cast<int64_t>(job.image) + (keys ? 0 : 1)) * bytes;
  return side;
}

// Where element x[2 r + parity] of a lane's step lies: channel and token of the tile.
template <bool kKeys>
__device__ __forceinline__ int element_channel(int step, int i) {
  const int lane = threadIdx.x % 32;
  const int r = i / 2;
  return 16 * step + (kKeys ? 8 * (r / 2) + 2 * (lane % 4) + i % 2 : 8 * (r % 2) + lane / 4);
}
template <bool kKeys>
__device__ __forceinline__ int element_token(int i) {
  const int lane = threadIdx.x % 32;
  const int r = i / 2;
  return kKeys ? 8 * (r % 2) + lane / 4 : 8 * (r / 2) + 2 * (lane % 4) + i % 2;
}

// 64 channels of a tile of 16 tokens, as they are stored.
template <FormatId kId, bool kKeys>
struct PartData {
  static constexpr FormatInfo kInfo = FormatOf<kId>::kInfo;
  static constexpr bool kBlocks = kInfo.axis == BlockAxis::kHeadDim;
  static constexpr int kBlockSteps = kInfo.block_size / kStepChannels;  // 0: one block a row
  static constexpr int kDivisor = kBlockSteps == 0 ? 1 : kBlockSteps;
  // Whether a factor and an addend of a channel can join the multiplication by a block's scale.
  static constexpr bool kFolds = kBlocks && kInfo.scale != Scale::kF16Pair;
  PartWords<kInfo.code_bits> words;
  PartScales<kBlocks ? kInfo.scale : Scale::kNone, kBlockSteps, kKeys> scales;

  __device__ __forceinline__ void load(const Side& side, int head_dim, int tile, int part) {
    const int lane = threadIdx.x % 32;
    const int steps = head_dim / kStepChannels;
    words.load(side.codes + tile * (2 * kInfo.code_bits) * head_dim, lane, part, steps);
    if constexpr (kBlocks) {
      const int num_blocks = kBlockSteps == 0 ? 1 : (steps + kDivisor - 1) / kDivisor;
      scales.load(side.scales + tile * kTileTokens * num_blocks * formats::scale_bytes(kInfo.scale),
                  lane, part, num_blocks);
    }
  }

  // Decodes as the codec does, before mean, bias and the rest: calls sink(step, x) for every k-step
  // of the part, x as fragments.cuh says. Channel formats leave codes.
  template <typename Sink>
  __device__ __forceinline__ void decode(const Side& side, int head_dim, int part,
                                         Sink&& sink) const {
    float scale[4], zero[4];
#pragma unroll
    for (int i = 0; i < kPartSteps; ++i) {
      if (part * kPartSteps + i >= head_dim / kStepChannels) break;
      float x[8];
      step_values<kInfo.element, kInfo.code_bits>(words, i, x);
      if constexpr (kBlocks) {
        if (i % kDivisor == 0 && (kBlockSteps != 0 || i == 0)) {
          scales.get(kBlockSteps == 0 ? 0 : i / kDivisor, scale, zero);
#pragma unroll
          for (int n = 0; n < (kKeys ? 2 : 4); ++n) {
            scale[n] *= element_factor(kInfo.element);
            if constexpr (kInfo.global_scale != GlobalScale::kNone) scale[n] *= side.global_scale;
          }
        }
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const int at = kKeys ? (n / 2) % 2 : 2 * (n / 4) + n % 2;
          x[n] *= scale[at];
          if constexpr (kInfo.scale == Scale::kF16Pair) x[n] += zero[at];
        }
      } else if constexpr (kInfo.global_scale != GlobalScale::kNone) {
#pragma unroll
        for (int n = 0; n < 8; ++n) x[n] *= side.global_scale;
      }
      sink(part * kPartSteps + i, x);
    }
  }

  // The same times `factor`, which all channels share, plus addend(step, n) of element n.
  template <typename Addend, typename Sink>
  __device__ __forceinline__ void decode_folded(const Side& side, int head_dim, int part,
                                                float factor, Addend&& addend, Sink&& sink) const {
    static_assert(kFolds);
    factor *= element_factor(kInfo.element);
    if constexpr (kInfo.global_scale != GlobalScale::kNone) factor *= side.global_scale;
    float scale[4], zero[4];
#pragma unroll
    for (int i = 0; i < kPartSteps; ++i) {
      const int step = part * kPartSteps + i;
      if (step >= head_dim / kStepChannels) break;
      float x[8];
      step_values<kInfo.element, kInfo.code_bits>(words, i, x);
      if (i % kDivisor == 0 && (kBlockSteps != 0 || i == 0)) {
        scales.get(kBlockSteps == 0 ? 0 : i / kDivisor, scale, zero);
#pragma unroll
        for (int n = 0; n < (kKeys ? 2 : 4); ++n) scale[n] *= factor;
      }
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        x[n] = fmaf(x[n], scale[kKeys ? (n / 2) % 2 : 2 * (n / 4) + n % 2], addend(step, n));
      }
      sink(step, x);
    }
  }
};

// Scale and zero of a channel (formats with blocks along tokens).
__device__ __forceinline__ float2 channel_scale(const uint8_t* scales, int channel) {
  const int in_step = channel % 16;
  const int entry = (channel / 16) * 32 + ((in_step % 8) / 2) * 8 + (in_step / 8) * 4 + in_step % 2;
  const auto* parts = reinterpret_cast<const uint16_t*>(scales) + entry;
  return make_float2(__half2float(__ushort_as_half(__ldg(parts + 2))),
                     __half2float(__ushort_as_half(__ldg(parts))));
}

// value = decoded * mul + add, per channel: everything that needs no other channel. What a K image
// holds, or a V image. kFold: mul is the same for all and is returned, `factors` are the addends.
template <FormatId kId, bool kKeys, bool kFold>
__device__ __forceinline__ float channel_factors(const Side& side, int head_dim, void* factors) {
  constexpr bool kByChannel = FormatOf<kId>::kInfo.axis == BlockAxis::kToken;
  const float scale = side.reference[head_dim + (kKeys ? 2 : 0)];
#pragma unroll 4
  for (int c = threadIdx.x % 32; c < head_dim; c += 32) {
    float a = 0.0f;
    float m = 1.0f;
    if (side.mean != nullptr) a += from_bf16(__ldg(side.mean + c));
    if (side.bias != nullptr) a += __ldg(side.bias + c);
    if constexpr (kByChannel) {
      const float2 of_channel = channel_scale(side.scales, c);
      m = of_channel.x;
      a += of_channel.y;
    }
    if constexpr (kKeys && !kFold) {
      if (side.smooth != nullptr) {
        m *= __ldg(side.smooth + c);
        a *= __ldg(side.smooth + c);
      }
    }
    if constexpr (kKeys) a -= side.reference[c];
    if constexpr (kFold) {
      static_cast<float*>(factors)[c] = a * scale;
    } else {
      static_cast<float2*>(factors)[c] = make_float2(m * scale, a * scale);
    }
  }
  __syncwarp();
  return scale;
}

// `largest` remembers the largest magnitude of what `mask` leaves: infinite if a value is beyond
// FP16.
__device__ __forceinline__ uint32_t to_image(float low, float high, uint32_t mask,
                                             __half2& largest) {
  const __half2 h = __floats2half2_rn(low, high);
  const uint32_t word = *reinterpret_cast<const uint32_t*>(&h) & mask;
  largest = __hmax2(largest, __habs2(*reinterpret_cast<const __half2*>(&word)));
  return word;
}

__device__ __forceinline__ void report(const DequantiseArgs& args, __half2 largest) {
  const bool infinite = __hisinf(__low2half(largest)) != 0 || __hisinf(__high2half(largest)) != 0;
  if (infinite) *args.out_of_range = 1;
}

// Which of a lane's words of a step hold tokens that are written, of the `tokens` of a tile: word r
// is masked by token_mask(kKeys ? r % 2 : r / 2).
template <bool kKeys>
__device__ __forceinline__ uint32_t token_mask(int tokens, int i) {
  const int lane = threadIdx.x % 32;
  if constexpr (kKeys) return 8 * i + lane / 4 < tokens ? ~0u : 0u;
  const int token = 8 * i + 2 * (lane % 4);
  return (token < tokens ? 0xffffu : 0u) | (token + 1 < tokens ? 0xffff0000u : 0u);
}

// Tiles [first, first + count) of 16 tokens, without rotation and RoPE: fragments to image rows
// through one part of staging, 16 rows of 128 bytes, two of them in turn. kHeadDim: 0 if it is not
// known, else a multiple of kImageChannels. kFold: there is no factor for smoothing.
template <FormatId kId, bool kKeys, int kHeadDim, bool kFold>
__device__ __forceinline__ void write_image_as(const DequantiseArgs& args, const Side& side,
                                               int first, int count, uint8_t* shared) {
  static_assert(kHeadDim % kImageChannels == 0, "parts are whole");
  const int lane = threadIdx.x % 32;
  const int d = kHeadDim > 0 ? kHeadDim : args.head_dim;
  const int parts = (d + kImageChannels - 1) / kImageChannels;
  // Reads are a part ahead of the arithmetic, except of 16-bit formats where much else takes
  // registers. To L2 these come as a whole: half of a new prompt's pages are BF16.
  constexpr int kBits = FormatOf<kId>::kInfo.code_bits;
  constexpr bool kAhead = kHeadDim > 0 || kBits < 16;
  PartData<kId, kKeys> next;
  if constexpr (kAhead) next.load(side, d, first, 0);
  if constexpr (kHeadDim > 0 && kBits == 16) {
    constexpr int kTileBytes = 2 * kBits * kHeadDim;
    if (lane == 0) prefetch_l2(side.codes + first * kTileBytes, count * kTileBytes);
  }
  uint8_t* factors = shared + 2 * kTileTokens * 128;
  [[maybe_unused]] const float scale = channel_factors<kId, kKeys, kFold>(side, d, factors);
  const int matrix = lane / 8;
  // Lane 8 m + r gives the address of row r of matrix m: token 8 (m % 2) + r and chunk m / 2 of a
  // step for keys, the other way round for values, which are transposed.
  const int row = 8 * (kKeys ? matrix % 2 : matrix / 2) + lane % 8;
  const int chunk = kKeys ? matrix / 2 : matrix % 2;
  const uint32_t stage = ptx::shared_address(shared);
  __half2 largest = __float2half2_rn(0.0f);
  const auto num_parts = static_cast<uint32_t>(count * parts);
  const auto part_of = [&](uint32_t n) { return static_cast<int>(n % parts); };
  const auto tile_of = [&](uint32_t n) { return first + static_cast<int>(n / parts); };
  for (uint32_t n = 0; n < num_parts; ++n) {
    const int part = part_of(n);
    const int tile = tile_of(n);
    const uint32_t buffer = stage + (n % 2) * (kTileTokens * 128);
    auto* target = reinterpret_cast<uint4*>(side.image + part * args.page_tokens * 128 +
                                            tile * kTileTokens * 128);
    if constexpr (!kAhead) next.load(side, d, tile, part);
    const PartData<kId, kKeys> data = next;
    if (kAhead && n + 1 < num_parts) next.load(side, d, tile_of(n + 1), part_of(n + 1));
    uint32_t mask[2] = {~0u, ~0u};
    if constexpr (kId == FormatId::kBf16) {
      const int tokens = side.num_tokens - tile * kTileTokens;
      mask[0] = token_mask<kKeys>(tokens, 0);
      mask[1] = token_mask<kKeys>(tokens, 1);
    }
    const auto store = [&](int step, const float(&x)[8]) {
      uint32_t h[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        h[r] = to_image(x[2 * r], x[2 * r + 1], mask[kKeys ? r % 2 : r / 2], largest);
      }
      const int at = 2 * (step % kPartSteps) + chunk;
      store_matrices<!kKeys>(buffer + row * 128 + ((at ^ (row % 8)) << 4), h);
    };
    if constexpr (kFold) {
      const auto addend = [&](int step, int i) {
        return reinterpret_cast<const float*>(factors)[element_channel<kKeys>(step, i)];
      };
      data.decode_folded(side, d, part, scale, addend, store);
    } else {
      data.decode(side, d, part, [&](int step, float(&x)[8]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float2 factor =
              reinterpret_cast<const float2*>(factors)[element_channel<kKeys>(step, i)];
          x[i] = fmaf(x[i], factor.x, factor.y);
        }
        store(step, x);
      });
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) target[i * 32 + lane] = load_shared(buffer + (i * 32 + lane) * 16);
  }
  report(args, largest);
}
template <FormatId kId, bool kKeys, int kHeadDim = 0>
__device__ __forceinline__ void write_image(const DequantiseArgs& args, const Side& side, int first,
                                            int count, uint8_t* shared) {
  constexpr bool kFolds = PartData<kId, kKeys>::kFolds;
  if (kFolds && (!kKeys || side.smooth == nullptr)) {
    write_image_as<kId, kKeys, kHeadDim, kFolds>(args, side, first, count, shared);
  } else if constexpr (!kFolds || kKeys) {
    write_image_as<kId, kKeys, kHeadDim, false>(args, side, first, count, shared);
  }
}

// ---- E4M3 ----

// Where word t of a row of a core matrix lies in an image: keys of a token, channels 16 `step` +
// 2 t, 2 t + 1 and both + 8; values of a channel, such tokens of a tile.
template <bool kKeys>
__device__ __forceinline__ int64_t word_offset(int head_dim, int tile, int token, int channel,
                                               int t) {
  return kKeys
             ? (2 * tile + token / 8) * (8 * head_dim) + channel / 16 * 128 + token % 8 * 16 + 4 * t
             : tile * (16 * head_dim) + channel / 8 * 128 + channel % 8 * 16 + 4 * t;
}

// What rounds to more than 448 is reported, unless it is the format's own limit.
template <bool kKeys>
__device__ __forceinline__ void report_e4m3(const DequantiseArgs& args, float largest) {
  const UnitKind& stored = args.kinds[cache::kKindStored];
  if (largest >= 464.0f && !keeps_codes(kKeys ? stored.k : stored.v)) *args.out_of_range = 1;
}

// As write_image; a lane's elements of a step are two words of the image.
template <FormatId kId, bool kKeys>
__device__ __forceinline__ void write_image_e4m3(const DequantiseArgs& args, const Side& side,
                                                 int first, int count, uint8_t* shared) {
  const int lane = threadIdx.x % 32;
  const int d = args.head_dim;
  const int parts = (d + kImageChannels - 1) / kImageChannels;
  constexpr bool kAhead = FormatOf<kId>::kInfo.code_bits < 16;
  PartData<kId, kKeys> next;
  if constexpr (kAhead) next.load(side, d, first, 0);
  float2* factors = reinterpret_cast<float2*>(shared);
  channel_factors<kId, kKeys, false>(side, d, factors);
  float largest = 0.0f;
  int tile = first;
  int part = 0;
  for (int n = 0; n < count * parts; ++n) {
    const int tokens = side.num_tokens - tile * kTileTokens;
    if constexpr (!kAhead) next.load(side, d, tile, part);
    const PartData<kId, kKeys> data = next;
    const int this_tile = tile;
    const int this_part = part;
    if (++part == parts) {
      part = 0;
      ++tile;
    }
    if (kAhead && n + 1 < count * parts) next.load(side, d, tile, part);
    data.decode(side, d, this_part, [&](int step, float(&x)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float2 factor = factors[element_channel<kKeys>(step, i)];
        x[i] = fmaf(x[i], factor.x, factor.y);
        if constexpr (kId == FormatId::kBf16) {
          if (element_token<kKeys>(i) >= tokens) x[i] = 0.0f;
        }
        largest = fmaxf(largest, fabsf(x[i]));
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        *reinterpret_cast<uint32_t*>(
            side.image + word_offset<kKeys>(d, this_tile, element_token<kKeys>(2 * h),
                                            element_channel<kKeys>(step, 2 * h), lane % 4)) =
            ptx::e4m3x4_of_f32(x[2 * h], x[2 * h + 1], x[2 * h + 4], x[2 * h + 5]);
      }
    });
  }
  report_e4m3<kKeys>(args, largest);
}

// Shared memory of a warp in write_image.
constexpr int fast_shared_bytes(int head_dim) {
  return 2 * kTileTokens * 128 + 2 * head_dim * 4;
}

}  // namespace kvant::backend::cuda
