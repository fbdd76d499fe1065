// The tensor types of weights in GGUF files: names, block sizes and the exact scalar
// dequantisation.
//
// Used by the GGUF reader, by inspection and by every backend; `dequantize_row` is the oracle for
// their kernels. A row is a run of elements along the fastest dimension and holds whole blocks. All
// multi-byte fields are little-endian. Every value is scale * integer (exact in fp32) or that plus
// or minus an offset (rounded once), so the result does not depend on whether FMA is used. Source:
// ggml's published block layouts (docs/gguf.md and ggml-common.h of ggml-org/ggml). Adding a type:
// one enumerator, one function and one row in the table in weight_types.cc. Thread-safe (pure
// functions).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace kvant::formats {

// Values are the type ids of GGUF files.
enum class WeightType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kBF16 = 30,
};

struct WeightTypeInfo {
  WeightType type;
  std::string_view name;   // as in file names and messages: "Q4_K"
  int64_t block_elements;  // 1 for the plain floating-point types
  int64_t block_bytes;
  // blocks [num_blocks * block_bytes] to out [num_blocks * block_elements]; any alignment.
  void (*dequantize)(const uint8_t* blocks, int64_t num_blocks, float* out);
};

// All supported types, by ascending id.
std::span<const WeightTypeInfo> weight_types();

// The row of a type id found in a file; nullptr if kvant cannot read that type.
const WeightTypeInfo* find_weight_type(uint32_t gguf_id);
const WeightTypeInfo& weight_type_info(WeightType type);
inline std::string_view weight_type_name(WeightType type) {
  return weight_type_info(type).name;
}

// Name of any type id known to exist in GGUF files, supported or not ("IQ4_NL"); empty otherwise.
std::string_view gguf_type_name(uint32_t gguf_id);

// Bytes of `num_elements` elements, which must be a multiple of the type's block.
int64_t weight_bytes(WeightType type, int64_t num_elements);

// Writes the `num_elements` (a multiple of the block) values at `bytes` to `out`, exactly. NaN and
// Inf in scales pass through as IEEE arithmetic has it.
void dequantize_row(WeightType type, const std::byte* bytes, int64_t num_elements, float* out);

}  // namespace kvant::formats
