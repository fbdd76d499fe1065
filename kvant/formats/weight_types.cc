#include "kvant/formats/weight_types.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include "kvant/base/check.h"
#include "kvant/base/small_floats.h"

namespace kvant::formats {
namespace {

uint16_t load_u16(const uint8_t* p) {
  return static_cast<uint16_t>(p[0] | p[1] << 8);
}

uint32_t load_u32(const uint8_t* p) {
  return static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8 |
         static_cast<uint32_t>(p[2]) << 16 | static_cast<uint32_t>(p[3]) << 24;
}

float load_f16(const uint8_t* p) {
  return from_f16(load_u16(p));
}

void dequantize_f32(const uint8_t* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = std::bit_cast<float>(load_u32(in + 4 * i));
}

void dequantize_f16(const uint8_t* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = load_f16(in + 2 * i);
}

void dequantize_bf16(const uint8_t* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_bf16(load_u16(in + 2 * i));
}

// Types of 32 elements: byte j of the nibbles holds element j (low) and element j + 16 (high).

void dequantize_q4_0(const uint8_t* in, int64_t num_blocks, float* out) {
  for (int64_t b = 0; b < num_blocks; ++b, in += 18, out += 32) {
    const float d = load_f16(in);
    for (int j = 0; j < 16; ++j) {
      out[j] = d * static_cast<float>((in[2 + j] & 15) - 8);
      out[j + 16] = d * static_cast<float>((in[2 + j] >> 4) - 8);
    }
  }
}

void dequantize_q4_1(const uint8_t* in, int64_t num_blocks, float* out) {
  for (int64_t b = 0; b < num_blocks; ++b, in += 20, out += 32) {
    const float d = load_f16(in);
    const float m = load_f16(in + 2);
    for (int j = 0; j < 16; ++j) {
      out[j] = d * static_cast<float>(in[4 + j] & 15) + m;
      out[j + 16] = d * static_cast<float>(in[4 + j] >> 4) + m;
    }
  }
}

// Fifth bits: bit i of the 32-bit word belongs to element i.
int five_bits(uint32_t low, uint32_t high_bits, int element) {
  return static_cast<int>(low | ((high_bits >> element) & 1u) << 4);
}

void dequantize_q5_0(const uint8_t* in, int64_t num_blocks, float* out) {
  for (int64_t b = 0; b < num_blocks; ++b, in += 22, out += 32) {
    const float d = load_f16(in);
    const uint32_t high = load_u32(in + 2);
    for (int j = 0; j < 16; ++j) {
      out[j] = d * static_cast<float>(five_bits(in[6 + j] & 15u, high, j) - 16);
      out[j + 16] = d * static_cast<float>(five_bits(in[6 + j] >> 4, high, j + 16) - 16);
    }
  }
}

void dequantize_q5_1(const uint8_t* in, int64_t num_blocks, float* out) {
  for (int64_t b = 0; b < num_blocks; ++b, in += 24, out += 32) {
    const float d = load_f16(in);
    const float m = load_f16(in + 2);
    const uint32_t high = load_u32(in + 4);
    for (int j = 0; j < 16; ++j) {
      out[j] = d * static_cast<float>(five_bits(in[8 + j] & 15u, high, j)) + m;
      out[j + 16] = d * static_cast<float>(five_bits(in[8 + j] >> 4, high, j + 16)) + m;
    }
  }
}

void dequantize_q8_0(const uint8_t* in, int64_t num_blocks, float* out) {
  for (int64_t b = 0; b < num_blocks; ++b, in += 34, out += 32) {
    const float d = load_f16(in);
    for (int j = 0; j < 32; ++j) out[j] = d * static_cast<float>(static_cast<int8_t>(in[2 + j]));
  }
}

// Types of 256 elements.

// The 6-bit scale and minimum of sub-block j (0..7) from the 12 packed bytes.
std::pair<int, int> unpack_scale_min(const uint8_t* p, int j) {
  if (j < 4) return {p[j] & 63, p[j + 4] & 63};
  return {(p[j + 4] & 15) | (p[j - 4] >> 6) << 4, (p[j + 4] >> 4) | (p[j] >> 6) << 4};
}

void dequantize_q4_k(const uint8_t* in, int64_t num_blocks, float* out) {
  for (int64_t b = 0; b < num_blocks; ++b, in += 144, out += 256) {
    const float d = load_f16(in);
    const float d_min = load_f16(in + 2);
    for (int j = 0; j < 8; ++j) {
      const auto [scale, minimum] = unpack_scale_min(in + 4, j);
      const float s = d * static_cast<float>(scale);
      const float m = d_min * static_cast<float>(minimum);
      // Each 32 nibble bytes hold two sub-blocks: low nibbles, then high nibbles.
      const uint8_t* q = in + 16 + 32 * (j / 2);
      const int shift = 4 * (j % 2);
      for (int i = 0; i < 32; ++i) {
        out[32 * j + i] = s * static_cast<float>((q[i] >> shift) & 15) - m;
      }
    }
  }
}

void dequantize_q5_k(const uint8_t* in, int64_t num_blocks, float* out) {
  for (int64_t b = 0; b < num_blocks; ++b, in += 176, out += 256) {
    const float d = load_f16(in);
    const float d_min = load_f16(in + 2);
    const uint8_t* high = in + 16;  // byte i: fifth bits of element i of the 8 sub-blocks
    for (int j = 0; j < 8; ++j) {
      const auto [scale, minimum] = unpack_scale_min(in + 4, j);
      const float s = d * static_cast<float>(scale);
      const float m = d_min * static_cast<float>(minimum);
      const uint8_t* q = in + 48 + 32 * (j / 2);
      const int shift = 4 * (j % 2);
      for (int i = 0; i < 32; ++i) {
        const int code = ((q[i] >> shift) & 15) | ((high[i] >> j) & 1) << 4;
        out[32 * j + i] = s * static_cast<float>(code) - m;
      }
    }
  }
}

void dequantize_q6_k(const uint8_t* in, int64_t num_blocks, float* out) {
  for (int64_t b = 0; b < num_blocks; ++b, in += 210, out += 256) {
    const float d = load_f16(in + 208);
    for (int element = 0; element < 256; ++element) {
      // In each half of 128, four groups of 32 share 64 low-nibble bytes and 32 bytes of high
      // pairs.
      const int half = element / 128;
      const int group = element % 128 / 32;
      const int i = element % 32;
      const int low = (in[64 * half + 32 * (group % 2) + i] >> (4 * (group / 2))) & 15;
      const int high = (in[128 + 32 * half + i] >> (2 * group)) & 3;
      const int scale = static_cast<int8_t>(in[192 + element / 16]);
      out[element] = d * static_cast<float>(scale) * static_cast<float>((low | high << 4) - 32);
    }
  }
}

// A row: the scale, then the codes.

constexpr float kMaxE4m3 = 448.0f;

constexpr std::array<float, 256> e4m3_values() {
  std::array<float, 256> values{};
  for (int code = 0; code < 256; ++code) values[code] = from_e4m3(static_cast<uint8_t>(code));
  return values;
}

void dequantize_f8_e4m3(const uint8_t* in, int64_t n, float* out) {
  static constexpr std::array<float, 256> kValues = e4m3_values();
  const float scale = std::bit_cast<float>(load_u32(in));
  for (int64_t i = 0; i < n; ++i) out[i] = scale * kValues[in[4 + i]];
}

constexpr std::array kWeightTypes = {
    WeightTypeInfo{WeightType::kF32, "F32", 1, 4, dequantize_f32},
    WeightTypeInfo{WeightType::kF16, "F16", 1, 2, dequantize_f16},
    WeightTypeInfo{WeightType::kQ4_0, "Q4_0", 32, 18, dequantize_q4_0},
    WeightTypeInfo{WeightType::kQ4_1, "Q4_1", 32, 20, dequantize_q4_1},
    WeightTypeInfo{WeightType::kQ5_0, "Q5_0", 32, 22, dequantize_q5_0},
    WeightTypeInfo{WeightType::kQ5_1, "Q5_1", 32, 24, dequantize_q5_1},
    WeightTypeInfo{WeightType::kQ8_0, "Q8_0", 32, 34, dequantize_q8_0},
    WeightTypeInfo{WeightType::kQ4_K, "Q4_K", 256, 144, dequantize_q4_k},
    WeightTypeInfo{WeightType::kQ5_K, "Q5_K", 256, 176, dequantize_q5_k},
    WeightTypeInfo{WeightType::kQ6_K, "Q6_K", 256, 210, dequantize_q6_k},
    WeightTypeInfo{WeightType::kBF16, "BF16", 1, 2, dequantize_bf16},
    WeightTypeInfo{WeightType::kF8_E4M3, "F8_E4M3", 1, 1, dequantize_f8_e4m3, /*in_files=*/false},
};

// Types that exist but that kvant cannot read: only for messages.
constexpr std::array<std::pair<uint32_t, std::string_view>, 22> kOtherTypes = {{
    {9, "Q8_1"},     {10, "Q2_K"},  {11, "Q3_K"},   {15, "Q8_K"},  {16, "IQ2_XXS"}, {17, "IQ2_XS"},
    {18, "IQ3_XXS"}, {19, "IQ1_S"}, {20, "IQ4_NL"}, {21, "IQ3_S"}, {22, "IQ2_S"},   {23, "IQ4_XS"},
    {24, "I8"},      {25, "I16"},   {26, "I32"},    {27, "I64"},   {28, "F64"},     {29, "IQ1_M"},
    {34, "TQ1_0"},   {35, "TQ2_0"}, {39, "MXFP4"},  {40, "NVFP4"},
}};

}  // namespace

std::span<const WeightTypeInfo> weight_types() {
  return kWeightTypes;
}

const WeightTypeInfo* find_weight_type(uint32_t gguf_id) {
  for (const WeightTypeInfo& info : kWeightTypes) {
    if (static_cast<uint32_t>(info.type) == gguf_id) return info.in_files ? &info : nullptr;
  }
  return nullptr;
}

const WeightTypeInfo& weight_type_info(WeightType type) {
  const auto info = std::ranges::find(kWeightTypes, type, &WeightTypeInfo::type);
  KVANT_CHECK(info != kWeightTypes.end(), "every WeightType has a row in kWeightTypes");
  return *info;
}

std::string_view gguf_type_name(uint32_t gguf_id) {
  if (const WeightTypeInfo* info = find_weight_type(gguf_id)) return info->name;
  for (const auto& [id, name] : kOtherTypes) {
    if (id == gguf_id) return name;
  }
  return {};
}

int64_t weight_bytes(WeightType type, int64_t num_elements) {
  const WeightTypeInfo& info = weight_type_info(type);
  KVANT_CHECK(num_elements >= 0 && num_elements % info.block_elements == 0,
              "rows hold whole blocks");
  return row_head_bytes(type) + num_elements / info.block_elements * info.block_bytes;
}

void dequantize_row(WeightType type, const std::byte* bytes, int64_t num_elements, float* out) {
  const WeightTypeInfo& info = weight_type_info(type);
  KVANT_CHECK(num_elements >= 0 && num_elements % info.block_elements == 0,
              "rows hold whole blocks");
  info.dequantize(reinterpret_cast<const uint8_t*>(bytes), num_elements / info.block_elements, out);
}

bool quantize_row_e4m3(std::span<const float> values, std::byte* out) {
  uint32_t largest = 0;  // magnitude; as integers they are in order, Inf and NaN above all others
  for (const float value : values) {
    largest = std::max(largest, std::bit_cast<uint32_t>(value) & 0x7fffffffu);
  }
  if (largest >= 0x7f800000u) return false;
  const float scale = std::bit_cast<float>(largest) / kMaxE4m3;
  std::memcpy(out, &scale, sizeof(scale));
  auto* const codes = reinterpret_cast<uint8_t*>(out + row_head_bytes(WeightType::kF8_E4M3));
  if (scale == 0.0f) {
    std::memset(codes, 0, values.size());
    return true;
  }
  for (size_t i = 0; i < values.size(); ++i) codes[i] = to_e4m3(values[i] / scale);
  return true;
}

}  // namespace kvant::formats
