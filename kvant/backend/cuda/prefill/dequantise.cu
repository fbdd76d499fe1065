#include "kvant/backend/cuda/prefill/dequantise.h"

#include <algorithm>

#include "kvant/backend/cuda/prefill/fragments.cuh"
#include "kvant/backend/cuda/prefill/hopper.cuh"
#include "kvant/backend/cuda/status.h"
#include "kvant/formats/all_formats.h"

namespace kvant::backend::cuda {

using formats::FormatId;
using formats::GlobalScale;

namespace {

template <FormatId kId>
struct FormatOf;
#define KVANT_FORMAT(number, Type, header)                    \
  template <>                                                 \
  struct FormatOf<FormatId::k##Type> {                        \
    static constexpr FormatInfo kInfo = formats::Type::kInfo; \
  };
#include "kvant/formats/formats.def"
#undef KVANT_FORMAT

constexpr int kWarps = 4;
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
  const float* reference;  // b, then the scale of values
  int num_tokens;
  int page_number;
  std::byte* image;
};

__device__ __forceinline__ Side side_of(const DequantiseArgs& args, const ImageJob& job, int head,
                                        bool keys) {
  const UnitKind& kind = args.kinds[job.kind];
  const SideKind& format = keys ? kind.k : kind.v;
  const auto* unit = reinterpret_cast<const uint8_t*>(job.page) + head * kind.unit_bytes;
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
  const int64_t bytes = image_bytes(args.head_dim, args.page_tokens);
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

// Decodes one tile of 16 tokens as the codec does, before mean, bias and the rest; calls
// sink(step, x) for every k-step, x as fragments.cuh says. For channel formats `fold` (scale and
// zero of a channel already in the sink's factors) leaves codes.
template <FormatId kId, bool kKeys, typename Sink>
__device__ __forceinline__ void decode_part(const Side& side, int head_dim, int tile, int part,
                                            Sink&& sink) {
  constexpr FormatInfo kInfo = FormatOf<kId>::kInfo;
  constexpr Scale kScale = kInfo.scale;
  constexpr int kParts = scale_parts<kScale>();
  constexpr bool kByChannel = kInfo.axis == BlockAxis::kToken;
  constexpr int kScaleBytes = kScale == Scale::kE4m3 || kScale == Scale::kE8m0 ? 1
                              : kScale == Scale::kF32                          ? 4
                                                                               : 2;
  constexpr int kBlockSteps = kInfo.block_size / kStepChannels;  // 0: one block a row
  const int lane = threadIdx.x % 32;
  const int steps = head_dim / kStepChannels;
  const int num_blocks =
      kBlockSteps == 0 ? 1 : (steps + kBlockSteps - 1) / (kBlockSteps == 0 ? 1 : kBlockSteps);
  const uint8_t* codes = side.codes + tile * (2 * kInfo.code_bits) * head_dim;
  const uint8_t* scales = side.scales + tile * kTileTokens * num_blocks * kParts * kScaleBytes;
  PartWords<kInfo.code_bits> words;
  words.load(codes, lane, part, steps);
#pragma unroll
  for (int i = 0; i < kPartSteps; ++i) {
    const int step = part * kPartSteps + i;
    if (step >= steps) break;
    float x[8];
    step_values<kInfo.element, kInfo.code_bits>(words, i, x);
    if constexpr (!kByChannel && kScale != Scale::kNone) {
      const int block = kBlockSteps == 0 ? 0 : step / (kBlockSteps == 0 ? 1 : kBlockSteps);
      float scale[4], zero[4];  // keys: of tokens g, g + 8; values: of tokens 2t, +1, +8, +9
#pragma unroll
      for (int n = 0; n < (kKeys ? 2 : 4); ++n) {
        const int entry = kKeys ? (((lane / 4) * 2 + n) * num_blocks + block) * kParts
                                : ((lane % 4) * num_blocks + block) * kParts * 4 + n;
        scale[n] = read_scale_part<kScale>(scales, entry) * element_factor(kInfo.element);
        if constexpr (kParts == 2) {
          zero[n] = read_scale_part<kScale>(scales, entry + (kKeys ? 1 : 4));
        }
      }
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int at = kKeys ? (n / 2) % 2 : 2 * (n / 4) + n % 2;
        x[n] *= scale[at];
        if constexpr (kParts == 2) x[n] += zero[at];
      }
    }
    if constexpr (kInfo.global_scale != GlobalScale::kNone) {
#pragma unroll
      for (int n = 0; n < 8; ++n) x[n] *= side.global_scale;
    }
    sink(step, x);
  }
}

// Scale and zero of a channel (formats with blocks along tokens).
__device__ __forceinline__ float2 channel_scale(const uint8_t* scales, int channel) {
  const int in_step = channel % 16;
  const int entry = (channel / 16) * 32 + ((in_step % 8) / 2) * 8 + (in_step / 8) * 4 + in_step % 2;
  return make_float2(read_scale_part<Scale::kF16>(scales, entry + 2),
                     read_scale_part<Scale::kF16>(scales, entry));
}

// value = decoded * mul + add, per channel: everything that needs no other channel. What a K image
// holds, or a V image.
template <FormatId kId, bool kKeys>
__device__ __forceinline__ void channel_factors(const Side& side, int head_dim, float* mul,
                                                float* add) {
  constexpr bool kByChannel = FormatOf<kId>::kInfo.axis == BlockAxis::kToken;
  for (int c = threadIdx.x % 32; c < head_dim; c += 32) {
    float a = 0.0f;
    float m = 1.0f;
    if (side.mean != nullptr) a += from_bf16(__ldg(side.mean + c));
    if (side.bias != nullptr) a += __ldg(side.bias + c);
    if constexpr (kByChannel) {
      const float2 scale = channel_scale(side.scales, c);
      m = scale.x;
      a += scale.y;
    }
    if constexpr (kKeys) {
      if (side.smooth != nullptr) {
        m *= __ldg(side.smooth + c);
        a *= __ldg(side.smooth + c);
      }
      a -= side.reference[c];
    } else {
      const float scale = side.reference[head_dim];
      m *= scale;
      a *= scale;
    }
    mul[c] = m;
    add[c] = a;
  }
  __syncwarp();
}

// Saturates, and remembers in `largest` the magnitude before.
__device__ __forceinline__ uint32_t to_image(float low, float high, __half2& largest) {
  const __half2 limit = __float2half2_rn(65504.0f);
  const __half2 h = __floats2half2_rn(low, high);
  largest = __hmax2(largest, __habs2(h));
  const __half2 clamped = __hmin2(__hmax2(h, __hneg2(limit)), limit);
  return *reinterpret_cast<const uint32_t*>(&clamped);
}

__device__ __forceinline__ void report(const DequantiseArgs& args, __half2 largest) {
  const bool infinite = __hisinf(__low2half(largest)) != 0 || __hisinf(__high2half(largest)) != 0;
  if (infinite) *args.saturated = 1;
}

// Without rotation and RoPE: fragments to image rows through one part of staging, 16 rows of 128
// bytes, two of them in turn.
template <FormatId kId, bool kKeys>
__device__ __forceinline__ void write_image(const DequantiseArgs& args, const Side& side,
                                            uint8_t* shared) {
  const int lane = threadIdx.x % 32;
  const int d = args.head_dim;
  float* mul = reinterpret_cast<float*>(shared + 2 * kTileTokens * 128);
  float* add = mul + d;
  channel_factors<kId, kKeys>(side, d, mul, add);
  const int matrix = lane / 8;
  // Lane 8 m + r gives the address of row r of matrix m: token 8 (m % 2) + r and chunk m / 2 of a
  // step for keys, the other way round for values, which are transposed.
  const int row = 8 * (kKeys ? matrix % 2 : matrix / 2) + lane % 8;
  const int chunk = kKeys ? matrix / 2 : matrix % 2;
  const uint32_t stage = shared_address(shared);
  __half2 largest = __float2half2_rn(0.0f);
  const int parts = (d + kImageChannels - 1) / kImageChannels;
  for (int tile = 0; tile < args.page_tokens / kTileTokens; ++tile) {
    const int tokens = side.num_tokens - tile * kTileTokens;
    for (int part = 0; part < parts; ++part) {
      const uint32_t buffer = stage + ((tile * parts + part) % 2) * (kTileTokens * 128);
      decode_part<kId, kKeys>(side, d, tile, part, [&](int step, float(&x)[8]) {
        uint32_t h[4];
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const int channel = element_channel<kKeys>(step, n);
          x[n] = fmaf(x[n], mul[channel], add[channel]);
          if constexpr (kId == FormatId::kBf16) {
            if (element_token<kKeys>(n) >= tokens) x[n] = 0.0f;
          }
        }
#pragma unroll
        for (int r = 0; r < 4; ++r) h[r] = to_image(x[2 * r], x[2 * r + 1], largest);
        const int at = 2 * (step % kPartSteps) + chunk;
        store_matrices<!kKeys>(buffer + row * 128 + ((at ^ (row % 8)) << 4), h);
      });
      __syncwarp();
      auto* target = reinterpret_cast<uint4*>(side.image + part * args.page_tokens * 128 +
                                              tile * kTileTokens * 128);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        target[i * 32 + lane] = load_shared(buffer + (i * 32 + lane) * 16);
    }
  }
  report(args, largest);
}

// ---- with rotation or RoPE: whole rows in fp32 ----

// The tile's keys or values as the format defines them, before RoPE: rows [16][head_dim + 4].
template <FormatId kId, bool kKeys>
__device__ void decode_rows(const DequantiseArgs& args, const Side& side, int tile, float* rows) {
  constexpr bool kByChannel = FormatOf<kId>::kInfo.axis == BlockAxis::kToken;
  const int d = args.head_dim;
  const int stride = d + 4;
  const int tokens = side.num_tokens - tile * kTileTokens;
  for (int part = 0; part * kImageChannels < d; ++part) {
    decode_part<kId, kKeys>(side, d, tile, part, [&](int step, float(&x)[8]) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int c = element_channel<kKeys>(step, n);
        const int token = element_token<kKeys>(n);
        float v = x[n];
        if constexpr (kByChannel) {
          const float2 scale = channel_scale(side.scales, c);
          v = v * scale.x + scale.y;
        }
        if (side.mean != nullptr) v += from_bf16(__ldg(side.mean + c));
        if (side.bias != nullptr) v += __ldg(side.bias + c);
        rows[token * stride + c] = token < tokens ? v : 0.0f;
      }
    });
  }
  __syncwarp();
}

// Orthonormal Hadamard blocks of the largest power of two in head_dim, as formats::rotate_row.
__device__ void rotate_rows(float* rows, int d) {
  const int lane = threadIdx.x % 32;
  const int stride = d + 4;
  const int block = d & -d;
  for (int half = 1; half < block; half *= 2) {
    for (int i = lane; i < kTileTokens * d / 2; i += 32) {
      const int in_row = i % (d / 2);
      float* x = rows + (i / (d / 2)) * stride + (in_row / half) * 2 * half + in_row % half;
      const float a = x[0], b = x[half];
      x[0] = a + b;
      x[half] = a - b;
    }
    __syncwarp();
  }
  const float scale = 1.0f / sqrtf(static_cast<float>(block));
  for (int i = lane; i < kTileTokens * d; i += 32) rows[(i / d) * stride + i % d] *= scale;
  __syncwarp();
}

__device__ void apply_rope(const DequantiseArgs& args, int64_t position, float* rows) {
  const int stride = args.head_dim + 4;
  for (int i = threadIdx.x % 32; i < kTileTokens * args.rope_half; i += 32) {
    const int pair = i % args.rope_half;
    const int token = i / args.rope_half;
    const double turns =
        static_cast<double>(position + token) * args.rope_frequency[pair] * 0.15915494309189535;
    float sine, cosine;
    sincospif(static_cast<float>(2.0 * (turns - rint(turns))), &sine, &cosine);
    sine *= args.rope_magnitude;
    cosine *= args.rope_magnitude;
    float* x = rows + token * stride + pair;
    const float a = x[0], b = x[args.rope_half];
    x[0] = a * cosine - b * sine;
    x[args.rope_half] = a * sine + b * cosine;
  }
  __syncwarp();
}

template <FormatId kId, bool kKeys>
__device__ void plain_rows(const DequantiseArgs& args, const Side& side, int tile, float* rows) {
  decode_rows<kId, kKeys>(args, side, tile, rows);
  const int d = args.head_dim;
  if (side.rotate) rotate_rows(rows, d);
  if constexpr (kKeys) {
    if (side.smooth != nullptr) {
      for (int i = threadIdx.x % 32; i < kTileTokens * d; i += 32) {
        rows[(i / d) * (d + 4) + i % d] *= __ldg(side.smooth + i % d);
      }
      __syncwarp();
    }
    if (args.rope_frequency != nullptr) {
      apply_rope(args,
                 static_cast<int64_t>(side.page_number) * args.page_tokens + tile * kTileTokens,
                 rows);
    }
  }
}

template <FormatId kId, bool kKeys>
__device__ void write_image_by_rows(const DequantiseArgs& args, const Side& side, float* rows) {
  const int lane = threadIdx.x % 32;
  const int d = args.head_dim;
  __half2 largest = __float2half2_rn(0.0f);
  for (int tile = 0; tile < args.page_tokens / kTileTokens; ++tile) {
    plain_rows<kId, kKeys>(args, side, tile, rows);
    for (int i = lane; i < kTileTokens * d / 8; i += 32) {
      const int row = i / (d / 8);
      const int chunk = i % (d / 8);
      const bool written = tile * kTileTokens + row < side.num_tokens;
      float x[8];
      for (int n = 0; n < 8; ++n) {
        x[n] = rows[row * (d + 4) + chunk * 8 + n];
        if constexpr (kKeys) {
          x[n] -= side.reference[chunk * 8 + n];
        } else {
          x[n] *= side.reference[d];
        }
        if (!written) x[n] = 0.0f;
      }
      uint32_t h[4];
      for (int n = 0; n < 4; ++n) h[n] = to_image(x[2 * n], x[2 * n + 1], largest);
      const int token = tile * kTileTokens + row;
      std::byte* target = side.image + (chunk / 8) * args.page_tokens * 128 + token * 128 +
                          (((chunk % 8) ^ (token % 8)) << 4);
      *reinterpret_cast<uint4*>(target) = make_uint4(h[0], h[1], h[2], h[3]);
    }
    __syncwarp();
  }
  report(args, largest);
}

// ---- kernels ----

// Calls f with the format as a constant.
template <bool kKeys, typename F>
__device__ __forceinline__ void with_format(FormatId id, F&& f) {
  switch (id) {
#define KVANT_FORMAT(number, Type, header)                                                   \
  case FormatId::k##Type:                                                                    \
    if constexpr (kKeys ? formats::Type::kInfo.for_keys : formats::Type::kInfo.for_values) { \
      f(std::integral_constant<FormatId, FormatId::k##Type>{});                              \
    }                                                                                        \
    break;
#include "kvant/formats/formats.def"
#undef KVANT_FORMAT
  }
}

__host__ __device__ constexpr int fast_shared_bytes(int head_dim) {
  return 2 * kTileTokens * 128 + 2 * head_dim * 4;
}
__host__ __device__ constexpr int row_shared_bytes(int head_dim) {
  return kTileTokens * (head_dim + 4) * 4;
}

// A warp a side of a page of a head. kByRows: some kind needs whole rows.
template <bool kByRows>
__global__ __launch_bounds__(32 *
                             kWarps) void dequantise(const __grid_constant__ DequantiseArgs args) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int warp = threadIdx.x / 32;
  const int num_units = args.num_jobs * args.num_heads * 2;
  uint8_t* own = shared + warp * (kByRows ? max(fast_shared_bytes(args.head_dim),
                                                row_shared_bytes(args.head_dim))
                                          : fast_shared_bytes(args.head_dim));
  for (int n = blockIdx.x * kWarps + warp; n < num_units; n += gridDim.x * kWarps) {
    const bool keys = n % 2 == 0;
    const int head = args.first_head + n / 2 % args.num_heads;
    const ImageJob job = args.jobs[n / 2 / args.num_heads];
    const Side side = side_of(args, job, head, keys);
    const UnitKind& kind = args.kinds[job.kind];
    const bool by_rows = kByRows && (side.rotate || (keys && args.rope_frequency != nullptr));
    const auto write = [&](auto id, auto is_keys) {
      if (kByRows && by_rows) {
        write_image_by_rows<decltype(id)::value, decltype(is_keys)::value>(
            args, side, reinterpret_cast<float*>(own));
      } else {
        write_image<decltype(id)::value, decltype(is_keys)::value>(args, side, own);
      }
    };
    if (keys) {
      with_format<true>(kind.k.format, [&](auto id) { write(id, std::true_type{}); });
    } else {
      with_format<false>(kind.v.format, [&](auto id) { write(id, std::false_type{}); });
    }
    __syncwarp();
  }
}

// A block a sequence and KV head: warp 0 the keys, warp 1 the values of a page's first tokens.
__global__ __launch_bounds__(64) void make_references(const __grid_constant__ DequantiseArgs args) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int lane = threadIdx.x % 32;
  const int d = args.head_dim;
  const int head = blockIdx.x % args.num_kv_heads;
  const ImageJob job = args.jobs[blockIdx.x / args.num_kv_heads];
  const bool keys = threadIdx.x < 32;
  const Side side = side_of(args, job, head, keys);
  const UnitKind& kind = args.kinds[job.kind];
  float* rows = reinterpret_cast<float*>(shared + (keys ? 0 : row_shared_bytes(d)));
  float* out = args.references + (static_cast<int64_t>(job.sequence) * args.num_kv_heads + head) *
                                     reference_floats(d);
  const int tokens = min(side.num_tokens, kTileTokens);
  if (keys) {
    with_format<true>(kind.k.format,
                      [&](auto id) { plain_rows<decltype(id)::value, true>(args, side, 0, rows); });
    for (int c = lane; c < d; c += 32) {
      float sum = 0.0f;
      for (int t = 0; t < tokens; ++t) sum += rows[t * (d + 4) + c];
      out[c] = sum / static_cast<float>(tokens);
    }
    return;
  }
  with_format<false>(kind.v.format,
                     [&](auto id) { plain_rows<decltype(id)::value, false>(args, side, 0, rows); });
  float largest = 0.0f;
  for (int i = lane; i < tokens * d; i += 32) {
    largest = fmaxf(largest, fabsf(rows[(i / d) * (d + 4) + i % d]));
  }
  for (int n = 16; n > 0; n /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, n));
  // Largest magnitude to [4, 8): a factor of 8000 above it fits, of 60000 below it is normal.
  int exponent = 0;
  if (largest > 0.0f && isfinite(largest)) exponent = 2 - ilogbf(largest);
  exponent = max(-100, min(100, exponent));
  if (lane == 0) {
    out[d] = ldexpf(1.0f, exponent);
    out[d + 1] = ldexpf(1.0f, -exponent);
  }
}

__global__ void make_rope_frequencies(int rotary_dim, double base, double position_scale,
                                      const float* factors, double* frequency) {
  const int i = threadIdx.x;
  if (2 * i >= rotary_dim) return;
  double f = pow(base, -2.0 * i / rotary_dim);
  if (factors != nullptr) f /= factors[i];
  frequency[i] = f * position_scale;
}

bool needs_rows(const DequantiseArgs& args) {
  if (args.rope_frequency != nullptr) return true;
  for (const UnitKind& kind : args.kinds) {
    if (kind.k.rotate || kind.v.rotate) return true;
  }
  return false;
}

}  // namespace

Status launch_rope_frequencies(int rotary_dim, float base, float position_scale,
                               const float* factors, double* frequency, cudaStream_t stream) {
  make_rope_frequencies<<<1, 256, 0, stream>>>(rotary_dim, base, position_scale, factors,
                                               frequency);
  return launch_status("RoPE frequencies");
}

Status launch_references(const DequantiseArgs& args, cudaStream_t stream) {
  const int bytes = 2 * row_shared_bytes(args.head_dim);
  make_references<<<args.num_jobs * args.num_kv_heads, 64, bytes, stream>>>(args);
  return launch_status("reference keys");
}

Status launch_dequantise(const DequantiseArgs& args, int num_processors, cudaStream_t stream) {
  const bool by_rows = needs_rows(args);
  const auto kernel = by_rows ? dequantise<true> : dequantise<false>;
  const int bytes = kWarps * (by_rows ? std::max(fast_shared_bytes(args.head_dim),
                                                 row_shared_bytes(args.head_dim))
                                      : fast_shared_bytes(args.head_dim));
  KVANT_TRY(
      cuda_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                  "asking for shared memory of dequantisation"));
  const int units = args.num_jobs * args.num_heads * 2;
  const int blocks = std::min((units + kWarps - 1) / kWarps, num_processors * 8);
  kernel<<<blocks, 32 * kWarps, bytes, stream>>>(args);
  return launch_status("dequantisation of pages");
}

}  // namespace kvant::backend::cuda
