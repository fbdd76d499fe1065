#include "bench/gpu/memory_kernels.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace kvant::bench {
namespace {

__device__ uint32_t hash(uint64_t x) {
  x = (x + 0x9e3779b97f4a7c15ull) * 0xff51afd7ed558ccdull;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ull;
  return static_cast<uint32_t>(x >> 32);
}

__device__ float normal(uint32_t h) {
  const float sum = static_cast<float>((h & 255) + (h >> 8 & 255) + (h >> 16 & 255) + (h >> 24));
  return (sum - 510.0f) * (1.0f / 147.8f);
}

__global__ void linear_read(const uint4* data, int64_t count, uint32_t* sink) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  uint32_t x = 0;
  for (; i + 3 * stride < count; i += 4 * stride) {
    const uint4 a = __ldcs(data + i), b = __ldcs(data + i + stride);
    const uint4 c = __ldcs(data + i + 2 * stride), d = __ldcs(data + i + 3 * stride);
    x ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^
         d.w;
  }
  for (; i < count; i += stride) {
    const uint4 a = __ldcs(data + i);
    x ^= a.x ^ a.y ^ a.z ^ a.w;
  }
  if (x == 0x12345) *sink = x;
}

struct Sections {
  FillSection of[6];
  int count;
};

__device__ uint32_t random_word(Fill fill, uint32_t h) {
  uint32_t word = h;
  switch (fill) {
    case Fill::kCodes: break;
    case Fill::kFiniteE4m3:  // magnitudes below the NaN code
      word = h & 0xf7f7f7f7u;
      break;
    case Fill::kScaleE4m3:  // 0.25 to 1.4
      word = 0;
      for (int i = 0; i < 4; ++i) word |= (0x28u + (h >> (8 * i) & 255u) % 0x14u) << (8 * i);
      break;
    case Fill::kScaleE8m0:  // 1/4 to 1
      word = 0;
      for (int i = 0; i < 4; ++i) word |= (125u + (h >> (8 * i) & 255u) % 3u) << (8 * i);
      break;
    case Fill::kScaleF16: {  // about 0.1; zeros of pairs too
      const __half2 pair = __floats2half2_rn(0.05f + static_cast<float>(h & 0xffff) * 1e-6f,
                                             0.05f + static_cast<float>(h >> 16) * 1e-6f);
      word = *reinterpret_cast<const uint32_t*>(&pair);
      break;
    }
    case Fill::kScaleF32:
      word = __float_as_uint(0.005f + static_cast<float>(h & 0xffff) * 1e-7f);
      break;
    case Fill::kBf16: {
      const __nv_bfloat162 pair =
          __floats2bfloat162_rn(normal(h), normal(h * 2654435761u + 12345u));
      word = *reinterpret_cast<const uint32_t*>(&pair);
      break;
    }
  }
  return word;
}

__global__ void fill(uint32_t* data, int64_t words, int unit_words, Sections sections,
                     uint32_t seed) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < words;
       i += stride) {
    const int64_t byte = i % unit_words * 4;
    uint32_t word = 0;
    for (int s = 0; s < sections.count; ++s) {
      if (byte >= sections.of[s].begin && byte < sections.of[s].end)
        word =
            random_word(sections.of[s].fill, hash(static_cast<uint64_t>(i) * 2 + seed * 77777ull));
    }
    data[i] = word;
  }
}

__global__ void fill_normal(float* data, int64_t count, uint32_t seed) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) data[i] = normal(hash(static_cast<uint64_t>(i) * 3 + seed * 99991ull));
}

}  // namespace

void launch_linear_read(const std::byte* data, int64_t bytes, uint32_t* sink, int num_sms,
                        cudaStream_t stream) {
  linear_read<<<num_sms * 8, 256, 0, stream>>>(reinterpret_cast<const uint4*>(data), bytes / 16,
                                               sink);
}

void launch_fill(std::byte* data, int64_t units, int64_t unit_bytes, const FillSection* sections,
                 int num_sections, uint32_t seed, cudaStream_t stream) {
  Sections list{};
  list.count = num_sections;
  for (int i = 0; i < num_sections; ++i) list.of[i] = sections[i];
  fill<<<2048, 256, 0, stream>>>(reinterpret_cast<uint32_t*>(data), units * unit_bytes / 4,
                                 static_cast<int>(unit_bytes / 4), list, seed);
}

void launch_fill_normal(float* data, int64_t count, uint32_t seed, cudaStream_t stream) {
  fill_normal<<<static_cast<unsigned>((count + 255) / 256), 256, 0, stream>>>(data, count, seed);
}

}  // namespace kvant::bench
