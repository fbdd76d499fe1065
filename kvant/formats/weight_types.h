// The tensor types of weights, those of GGUF files and kvant's own: names, block sizes and the
// exact scalar dequantisation.
//
// Used by the GGUF reader, by inspection and by every backend; `dequantize_row` is the oracle for
// their kernels. A row is a run of elements along the fastest dimension and holds whole blocks. All
// multi-byte fields are little-endian. Every value is scale * integer (exact in fp32), that plus or
// minus an offset (rounded once), or scale * E4M3 (rounded once), so the result does not depend on
// whether FMA is used. Source: ggml's published block layouts (docs/gguf.md and ggml-common.h of
// ggml-org/ggml). Adding a type: one enumerator, one function and one row in the table in
// weight_types.cc. Thread-safe (pure functions).
//
// F8_E4M3 is kvant's own: a row is its fp32 scale and then one E4M3 code (OCP 8-bit Floating Point
// v1.0) an element, value = scale * code. It is made of other types, see quantize_row_e4m3, the
// usual recipe of checkpoints with one scale per output channel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace kvant::formats {

// Values are the type ids of GGUF files; kvant's own are far above them.
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
  kF8_E4M3 = 0x10000,
};

// Bytes of a row before its blocks.
constexpr int64_t row_head_bytes(WeightType type) {
  return type == WeightType::kF8_E4M3 ? 4 : 0;
}

struct WeightTypeInfo {
  WeightType type;
  std::string_view name;   // as in file names and messages: "Q4_K"
  int64_t block_elements;  // 1 for the plain floating-point types
  int64_t block_bytes;
  // blocks [num_blocks * block_bytes] to out [num_blocks * block_elements]; any alignment.
  // With a head, `blocks` is a row from its head on.
  void (*dequantize)(const uint8_t* blocks, int64_t num_blocks, float* out);
  bool in_files = true;  // whether GGUF files have it
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

// Bytes of a row of `num_elements` elements, which must be a multiple of the type's block.
int64_t weight_bytes(WeightType type, int64_t num_elements);
// Of a matrix.
inline int64_t weight_bytes(WeightType type, int64_t rows, int64_t cols) {
  return rows * weight_bytes(type, cols);
}

// Writes the `num_elements` (a multiple of the block) values of the row at `bytes` to `out`,
// exactly. NaN and Inf in scales pass through as IEEE arithmetic has it. Without a head, any run of
// whole blocks will do.
void dequantize_row(WeightType type, const std::byte* bytes, int64_t num_elements, float* out);

// A row of F8_E4M3 of `values`, weight_bytes(kF8_E4M3, values.size()) bytes: scale = fl(amax /
// 448), code = E4M3(fl(value / scale)) to nearest, ties to even, saturated. Of zeros, and of values
// so small that the scale is zero, everything is zero. False, and nothing is written, if a value is
// not finite.
[[nodiscard]] bool quantize_row_e4m3(std::span<const float> values, std::byte* out);

}  // namespace kvant::formats
