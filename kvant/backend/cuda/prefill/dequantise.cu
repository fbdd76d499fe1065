#include "kvant/backend/cuda/prefill/dequantise.h"

#include <algorithm>

#include "kvant/backend/cuda/prefill/write_image.cuh"
#include "kvant/backend/cuda/status.h"

namespace kvant::backend::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kAnyFormat = -1;  // else a FormatId

// ---- with rotation or RoPE: whole rows in fp32 ----

// 64 channels of the tile's keys or values as the codec decodes them, with mean and bias, to rows
// [16][head_dim + 4].
template <FormatId kId, bool kKeys>
__device__ void decode_rows(const DequantiseArgs& args, const Side& side, int tile, int part,
                            float* rows) {
  constexpr bool kByChannel = FormatOf<kId>::kInfo.axis == BlockAxis::kToken;
  const int d = args.head_dim;
  const int stride = d + 4;
  const int tokens = side.num_tokens - tile * kTileTokens;
  PartData<kId, kKeys> data;
  data.load(side, d, tile, part);
  data.decode(side, d, part, [&](int step, float(&x)[8]) {
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

// From decoded rows to keys or values as the format defines them.
template <bool kKeys>
__device__ void finish_rows(const DequantiseArgs& args, const Side& side, int tile, float* rows) {
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

// A tile of rows to an image in FP16.
template <bool kKeys>
__device__ void write_rows(const DequantiseArgs& args, const Side& side, int tile,
                           const float* rows) {
  const int d = args.head_dim;
  const float scale = side.reference[d];
  __half2 largest = __float2half2_rn(0.0f);
  for (int i = threadIdx.x % 32; i < kTileTokens * d / 8; i += 32) {
    const int row = i / (d / 8);
    const int chunk = i % (d / 8);
    const bool written = tile * kTileTokens + row < side.num_tokens;
    float x[8];
    for (int n = 0; n < 8; ++n) {
      x[n] = rows[row * (d + 4) + chunk * 8 + n];
      if constexpr (kKeys) {
        x[n] -= side.reference[chunk * 8 + n];
      } else {
        x[n] *= scale;
      }
      if (!written) x[n] = 0.0f;
    }
    uint32_t h[4];
    for (int n = 0; n < 4; ++n) h[n] = to_image(x[2 * n], x[2 * n + 1], ~0u, largest);
    const int token = tile * kTileTokens + row;
    std::byte* target = side.image + (chunk / 8) * args.page_tokens * 128 + token * 128 +
                        (((chunk % 8) ^ (token % 8)) << 4);
    *reinterpret_cast<uint4*>(target) = make_uint4(h[0], h[1], h[2], h[3]);
  }
  report(args, largest);
}

// The same in E4M3, a lane a word.
template <bool kKeys>
__device__ void write_rows_e4m3(const DequantiseArgs& args, const Side& side, int tile,
                                const float* rows) {
  const int d = args.head_dim;
  const float scale = side.reference[d + (kKeys ? 2 : 0)];
  float largest = 0.0f;
  for (int i = threadIdx.x % 32; i < kTileTokens * d / 4; i += 32) {
    const int t = i % 4;
    // Keys: a token and its group of channels. Values: a channel.
    const int token = kKeys ? i / 4 % kTileTokens : 0;
    const int channel = kKeys ? i / 4 / kTileTokens * 16 : i / 4;
    float x[4];
    for (int n = 0; n < 4; ++n) {
      const int at = 2 * t + n % 2 + 8 * (n / 2);
      const int row = kKeys ? token : at;
      const int c = kKeys ? channel + at : channel;
      x[n] = rows[row * (d + 4) + c];
      if constexpr (kKeys) x[n] -= side.reference[c];
      x[n] = tile * kTileTokens + row < side.num_tokens ? x[n] * scale : 0.0f;
      largest = fmaxf(largest, fabsf(x[n]));
    }
    *reinterpret_cast<uint32_t*>(side.image + word_offset<kKeys>(d, tile, token, channel, t)) =
        ptx::e4m3x4_of_f32(x[0], x[1], x[2], x[3]);
  }
  report_e4m3<kKeys>(args, largest);
}

template <FormatId kId, bool kKeys, ImageType kImages>
__device__ void write_image_by_rows(const DequantiseArgs& args, const Side& side, int first,
                                    int count, float* rows) {
  const int d = args.head_dim;
  for (int tile = first; tile < first + count; ++tile) {
    for (int part = 0; part * kImageChannels < d; ++part) {
      decode_rows<kId, kKeys>(args, side, tile, part, rows);
    }
    __syncwarp();
    finish_rows<kKeys>(args, side, tile, rows);
    if constexpr (kImages == ImageType::kE4m3) {
      write_rows_e4m3<kKeys>(args, side, tile, rows);
    } else {
      write_rows<kKeys>(args, side, tile, rows);
    }
    __syncwarp();
  }
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

__host__ __device__ constexpr int row_shared_bytes(int head_dim) {
  return kTileTokens * (head_dim + 4) * 4;
}

// A warp some tiles of a side of a page of a head. kByRows: some kind needs whole rows.
template <bool kByRows, ImageType kImages>
__global__ __launch_bounds__(32 *
                             kWarps) void dequantise(const __grid_constant__ DequantiseArgs args,
                                                     int tiles_per_unit) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int warp = threadIdx.x / 32;
  const int units_per_side = args.page_tokens / kTileTokens / tiles_per_unit;
  const int num_units = args.num_jobs * args.num_heads * 2 * units_per_side;
  uint8_t* own = shared + warp * (kByRows ? max(fast_shared_bytes(args.head_dim),
                                                row_shared_bytes(args.head_dim))
                                          : fast_shared_bytes(args.head_dim));
  for (int n = blockIdx.x * kWarps + warp; n < num_units; n += gridDim.x * kWarps) {
    const int first = n % units_per_side * tiles_per_unit;
    const int page_side = n / units_per_side;
    const bool keys = page_side % 2 == 0;
    const int head = args.first_head + page_side / 2 % args.num_heads;
    const ImageJob job = args.jobs[page_side / 2 / args.num_heads];
    const Side side = side_of(args, job, head, keys);
    const UnitKind& kind = args.kinds[job.kind];
    const bool by_rows = kByRows && (side.rotate || (keys && args.rope_frequency != nullptr));
    const auto write = [&](auto id, auto is_keys) {
      if (kByRows && by_rows) {
        write_image_by_rows<decltype(id)::value, decltype(is_keys)::value, kImages>(
            args, side, first, tiles_per_unit, reinterpret_cast<float*>(own));
      } else if constexpr (kImages == ImageType::kE4m3) {
        write_image_e4m3<decltype(id)::value, decltype(is_keys)::value>(args, side, first,
                                                                        tiles_per_unit, own);
      } else {
        write_image<decltype(id)::value, decltype(is_keys)::value>(args, side, first,
                                                                   tiles_per_unit, own);
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

// The same where it can only be kOnly or BF16.
template <bool kKeys, int kOnly, typename F>
__device__ __forceinline__ void with_format_of(FormatId id, F&& f) {
  if constexpr (kOnly == kAnyFormat) {
    with_format<kKeys>(id, f);
  } else if (id == FormatId::kBf16) {
    f(std::integral_constant<FormatId, FormatId::kBf16>{});
  } else {
    f(std::integral_constant<FormatId, static_cast<FormatId>(kOnly)>{});
  }
}

// A block a sequence and KV head: half of the warps the keys, half the values of a page's first
// tokens, a warp 64 channels. The formats of usual caches have kernels of their own: what takes
// longest in one of all formats is its instructions' way from DRAM.
template <int kK, int kV>
__global__ void make_references(const __grid_constant__ DequantiseArgs args) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ int largest_of[2];  // of keys less their mean, of values
  const int d = args.head_dim;
  const int head = blockIdx.x % args.num_kv_heads;
  const ImageJob job = args.jobs[blockIdx.x / args.num_kv_heads];
  const int threads = blockDim.x / 2;
  const bool keys = threadIdx.x < threads;
  const int thread = threadIdx.x % threads;
  const Side side = side_of(args, job, head, keys);
  const UnitKind& kind = args.kinds[job.kind];
  float* rows = reinterpret_cast<float*>(shared + (keys ? 0 : row_shared_bytes(d)));
  float* out = args.references + (static_cast<int64_t>(job.sequence) * args.num_kv_heads + head) *
                                     reference_floats(d);
  const int tokens = min(side.num_tokens, kTileTokens);
  if (threadIdx.x < 2) largest_of[threadIdx.x] = 0;
  const bool e4m3 = args.type == ImageType::kE4m3;
  const UnitKind& stored = args.kinds[cache::kKindStored];
  const bool codes = e4m3 && keeps_codes(keys ? stored.k : stored.v);
  if (keys) {
    with_format_of<true, kK>(kind.k.format, [&](auto id) {
      decode_rows<decltype(id)::value, true>(args, side, 0, thread / 32, rows);
    });
  } else {
    with_format_of<false, kV>(kind.v.format, [&](auto id) {
      decode_rows<decltype(id)::value, false>(args, side, 0, thread / 32, rows);
    });
  }
  __syncthreads();
  if (thread < 32) {
    if (keys) {
      finish_rows<true>(args, side, 0, rows);
    } else {
      finish_rows<false>(args, side, 0, rows);
    }
  }
  __syncthreads();
  float largest = 0.0f;
  for (int c = thread; c < d; c += threads) {
    float sum = 0.0f;
#pragma unroll
    for (int t = 0; t < kTileTokens; ++t) {  // nought where there is no token
      const float x = rows[t * (d + 4) + c];
      sum += x;
      largest = fmaxf(largest, fabsf(x));
    }
    if (!keys) continue;
    const float mean = codes ? 0.0f : sum / static_cast<float>(tokens);
    out[c] = mean;
    if (!e4m3) continue;
    // What is common to all keys must not be taken for their size, nor one key's difference from
    // itself.
    largest *= 0.0625f;
    for (int t = 0; t < tokens; ++t) largest = fmaxf(largest, fabsf(rows[t * (d + 4) + c] - mean));
  }
  atomicMax(largest_of + (keys ? 0 : 1), __float_as_int(largest));
  __syncthreads();
  if (thread != 0) return;
  // Largest magnitude to [4, 8). In FP16 a factor of 8000 above it fits, of 60000 below it is
  // normal; keys have no scale there.
  float* scales = out + d + (keys ? 2 : 0);
  const int biased = largest_of[keys ? 0 : 1] >> 23;
  int exponent = 0;
  if (largest_of[keys ? 0 : 1] > 0 && biased < 255 && (e4m3 || !keys)) exponent = 129 - biased;
  exponent = max(-100, min(100, exponent));
  const float global_scale = (keys ? args.k_scale : args.v_scale)[head];
  scales[0] = codes ? 1.0f / global_scale : __int_as_float((127 + exponent) << 23);
  scales[1] = codes ? global_scale : __int_as_float((127 - exponent) << 23);
}

__global__ void make_rope_frequencies(int rotary_dim, double base, double position_scale,
                                      const float* factors, double* frequency) {
  const int i = threadIdx.x;
  if (2 * i >= rotary_dim) return;
  double f = pow(base, -2.0 * i / rotary_dim);
  if (factors != nullptr) f /= factors[i];
  frequency[i] = f * position_scale;
}

// Whether every kind is the stored one or BF16.
bool only_stored_or_bf16(const DequantiseArgs& args) {
  const UnitKind& stored = args.kinds[cache::kKindStored];
  for (const UnitKind& kind : args.kinds) {
    const bool known = (kind.k.format == FormatId::kBf16 || kind.k.format == stored.k.format) &&
                       (kind.v.format == FormatId::kBf16 || kind.v.format == stored.v.format);
    if (kind.base != nullptr && !known) return false;
  }
  return true;
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
  const int parts = (args.head_dim + kImageChannels - 1) / kImageChannels;
  const UnitKind& stored = args.kinds[cache::kKindStored];
  const auto launch = [&](auto kernel) {
    kernel<<<args.num_jobs * args.num_kv_heads, 64 * parts, bytes, stream>>>(args);
  };
  const auto only = [&](FormatId k, FormatId v) {
    return stored.k.format == k && stored.v.format == v && only_stored_or_bf16(args);
  };
  constexpr auto kNvfp4 = static_cast<int>(FormatId::kNvfp4);
  constexpr auto kInt4 = static_cast<int>(FormatId::kInt4Channel);
  constexpr auto kInt8 = static_cast<int>(FormatId::kInt8);
  constexpr auto kBf16 = static_cast<int>(FormatId::kBf16);
  if (only(FormatId::kNvfp4, FormatId::kNvfp4)) {
    launch(make_references<kNvfp4, kNvfp4>);
  } else if (only(FormatId::kInt4Channel, FormatId::kNvfp4)) {
    launch(make_references<kInt4, kNvfp4>);
  } else if (only(FormatId::kInt8, FormatId::kInt8)) {
    launch(make_references<kInt8, kInt8>);
  } else if (only(FormatId::kBf16, FormatId::kBf16)) {
    launch(make_references<kBf16, kBf16>);
  } else {
    launch(make_references<kAnyFormat, kAnyFormat>);
  }
  return launch_status("reference keys");
}

Status launch_dequantise(const DequantiseArgs& args, int num_processors, cudaStream_t stream) {
  const bool by_rows = needs_rows(args);
  const bool e4m3 = args.type == ImageType::kE4m3;
  const auto kernel =
      e4m3 ? (by_rows ? dequantise<true, ImageType::kE4m3> : dequantise<false, ImageType::kE4m3>)
      : by_rows ? dequantise<true, ImageType::kF16>
                : dequantise<false, ImageType::kF16>;
  const int bytes = kWarps * (by_rows ? std::max(fast_shared_bytes(args.head_dim),
                                                 row_shared_bytes(args.head_dim))
                                      : fast_shared_bytes(args.head_dim));
  KVANT_TRY(
      cuda_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                  "asking for shared memory of dequantisation"));
  int blocks_per_processor = 0;
  KVANT_TRY(cuda_status(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                            &blocks_per_processor, kernel, 32 * kWarps, static_cast<size_t>(bytes)),
                        "asking for the occupancy of dequantisation"));
  // A page at a time if there are plenty, else less: a page takes a warp as long as many do.
  const int resident = blocks_per_processor * num_processors;
  const int sides = args.num_jobs * args.num_heads * 2;
  int tiles = args.page_tokens / kTileTokens;
  while (tiles > 1 && sides * (args.page_tokens / kTileTokens / tiles) < 8 * resident * kWarps) {
    tiles /= 2;
  }
  const int units = sides * (args.page_tokens / kTileTokens / tiles);
  const int blocks = std::min((units + kWarps - 1) / kWarps, resident);
  kernel<<<blocks, 32 * kWarps, bytes, stream>>>(args, tiles);
  return launch_status("dequantisation of pages");
}

}  // namespace kvant::backend::cuda
