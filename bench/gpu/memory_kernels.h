// Kernels of the benchmarks: a linear read (the ceiling) and random pages.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace kvant::bench {

// Reads `bytes` (a multiple of 16) once, linearly; `sink` is one word of device memory.
void launch_linear_read(const std::byte* data, int64_t bytes, uint32_t* sink, int num_sms,
                        cudaStream_t stream);

// Bytes of a section of a unit, [begin, end), and what random values they hold.
enum class Fill { kCodes, kFiniteE4m3, kScaleE4m3, kScaleE8m0, kScaleF16, kScaleF32, kBf16 };
struct FillSection {
  int64_t begin;
  int64_t end;
  Fill fill;
};
// `units` units of `unit_bytes`, all sections random.
void launch_fill(std::byte* data, int64_t units, int64_t unit_bytes, const FillSection* sections,
                 int num_sections, uint32_t seed, cudaStream_t stream);

void launch_fill_normal(float* data, int64_t count, uint32_t seed, cudaStream_t stream);

}  // namespace kvant::bench
