// Builds small GGUF files in memory, for tests and fuzz seeds only.
//
//   GgufBuilder builder;
//   builder.string("general.architecture", "llama").u32("llama.block_count", 2);
//   builder.tensor("token_embd.weight", WeightType::kF32, {16, 32}, random_weights(...));
//   const std::vector<std::byte> file = builder.build();
//   auto gguf = Gguf::parse(file, "test");
//
// Entries are written in the order of the calls; nothing is checked, so broken files can be built
// too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "kvant/base/small_floats.h"
#include "kvant/formats/weight_types.h"
#include "kvant/model/gguf.h"

namespace kvant::model::testing {

class GgufBuilder {
 public:
  uint32_t version = 3;
  uint32_t alignment = 32;  // of the data; add general.alignment yourself if it is not 32

  GgufBuilder& u32(std::string_view key, uint32_t value) {
    return scalar(key, GgufValueType::kU32, value);
  }
  GgufBuilder& f32(std::string_view key, float value) {
    return scalar(key, GgufValueType::kF32, value);
  }
  GgufBuilder& boolean(std::string_view key, bool value) {
    return scalar(key, GgufValueType::kBool, static_cast<uint8_t>(value));
  }
  GgufBuilder& string(std::string_view key, std::string_view value) {
    entry(key, GgufValueType::kString);
    put_string(metadata_, value);
    return *this;
  }
  // Any scalar type of the format.
  template <typename T>
  GgufBuilder& scalar(std::string_view key, GgufValueType type, T value) {
    entry(key, type);
    put(metadata_, value);
    return *this;
  }
  // An array of a trivially copyable item type.
  template <typename T>
  GgufBuilder& array(std::string_view key, GgufValueType type, const std::vector<T>& items) {
    static_assert(std::is_trivially_copyable_v<T>);
    entry(key, GgufValueType::kArray);
    put(metadata_, type);
    put(metadata_, static_cast<uint64_t>(items.size()));
    for (const T item : items) put(metadata_, item);
    return *this;
  }
  GgufBuilder& strings(std::string_view key, const std::vector<std::string>& items) {
    entry(key, GgufValueType::kArray);
    put(metadata_, GgufValueType::kString);
    put(metadata_, static_cast<uint64_t>(items.size()));
    for (const std::string& item : items) put_string(metadata_, item);
    return *this;
  }

  // `dims` with the fastest dimension first; `bytes` as the type lays them out.
  GgufBuilder& tensor(std::string_view name, formats::WeightType type,
                      const std::vector<int64_t>& dims, const std::vector<std::byte>& bytes) {
    ++num_tensors_;
    put_string(tensors_, name);
    put(tensors_, static_cast<uint32_t>(dims.size()));
    for (const int64_t dim : dims) put(tensors_, static_cast<uint64_t>(dim));
    put(tensors_, type);
    pad(data_, alignment);
    put(tensors_, static_cast<uint64_t>(data_.size()));
    data_.insert(data_.end(), bytes.begin(), bytes.end());
    return *this;
  }

  std::vector<std::byte> build() const {
    std::vector<std::byte> out;
    for (const char c : {'G', 'G', 'U', 'F'}) out.push_back(static_cast<std::byte>(c));
    put(out, version);
    put(out, num_tensors_);
    put(out, num_entries_);
    out.insert(out.end(), metadata_.begin(), metadata_.end());
    out.insert(out.end(), tensors_.begin(), tensors_.end());
    pad(out, alignment);
    out.insert(out.end(), data_.begin(), data_.end());
    return out;
  }

 private:
  template <typename T>
  static void put(std::vector<std::byte>& out, T value) {
    const size_t at = out.size();
    out.resize(at + sizeof(T));
    std::memcpy(out.data() + at, &value, sizeof(T));
  }
  static void put_string(std::vector<std::byte>& out, std::string_view text) {
    put(out, static_cast<uint64_t>(text.size()));
    const std::byte* begin = reinterpret_cast<const std::byte*>(text.data());
    out.insert(out.end(), begin, begin + text.size());
  }
  static void pad(std::vector<std::byte>& out, size_t to) {
    out.resize((out.size() + to - 1) / to * to);
  }
  void entry(std::string_view key, GgufValueType type) {
    ++num_entries_;
    put_string(metadata_, key);
    put(metadata_, type);
  }

  uint64_t num_entries_ = 0;
  uint64_t num_tensors_ = 0;
  std::vector<std::byte> metadata_;
  std::vector<std::byte> tensors_;
  std::vector<std::byte> data_;
};

// Bytes of `values` in one of the plain types F32, F16, BF16.
inline std::vector<std::byte> plain_weights(formats::WeightType type,
                                            const std::vector<float>& values) {
  std::vector<std::byte> out(
      static_cast<size_t>(formats::weight_bytes(type, static_cast<int64_t>(values.size()))));
  const size_t stride = out.size() / (values.empty() ? 1 : values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t narrow =
        type == formats::WeightType::kBF16 ? to_bf16(values[i]) : to_f16(values[i]);
    const void* from = stride == 4 ? static_cast<const void*>(&values[i]) : &narrow;
    std::memcpy(out.data() + i * stride, from, stride);
  }
  return out;
}

// Bytes of `num_elements` pseudo-random weights of any type, of magnitude up to about `scale`:
// random codes, with scales that keep the values finite. The same seed gives the same bytes.
inline std::vector<std::byte> random_weights(formats::WeightType type, int64_t num_elements,
                                             uint32_t seed, float scale = 0.1f) {
  using formats::WeightType;
  std::mt19937 random(seed);
  const auto unit = [&random] { return static_cast<float>(random() >> 8) * 0x1p-24f; };
  const formats::WeightTypeInfo& info = formats::weight_type_info(type);
  if (info.block_elements == 1) {
    std::vector<float> values(static_cast<size_t>(num_elements));
    for (float& value : values) value = scale * (2.0f * unit() - 1.0f);
    return plain_weights(type, values);
  }
  std::vector<std::byte> out(static_cast<size_t>(formats::weight_bytes(type, num_elements)));
  for (std::byte& byte : out) byte = static_cast<std::byte>(random() >> 24);
  // Where the f16 scale (and offset) of a block is, and what to divide `scale` by to get it.
  int64_t scale_at = 0;
  int64_t offset_at = -1;
  float steps = 8;
  switch (type) {
    case WeightType::kQ4_1: offset_at = 2, steps = 7.5f; break;
    case WeightType::kQ5_0: steps = 16; break;
    case WeightType::kQ5_1: offset_at = 2, steps = 15.5f; break;
    case WeightType::kQ8_0: steps = 128; break;
    case WeightType::kQ4_K: offset_at = 2, steps = 7.5f * 63; break;
    case WeightType::kQ5_K: offset_at = 2, steps = 15.5f * 63; break;
    case WeightType::kQ6_K: scale_at = 208, steps = 32 * 128; break;
    default: break;
  }
  const bool super_block = info.block_elements == 256;
  for (int64_t block = 0; block < num_elements / info.block_elements; ++block) {
    std::byte* p = out.data() + block * info.block_bytes;
    const uint16_t d = to_f16(scale / steps * (0.5f + 0.5f * unit()));
    // Q4_1 and Q5_1 add the offset; Q4_K and Q5_K subtract it times a code of up to 63.
    const uint16_t offset = to_f16(super_block ? scale / 63 : -scale);
    std::memcpy(p + scale_at, &d, 2);
    if (offset_at >= 0) std::memcpy(p + offset_at, &offset, 2);
  }
  return out;
}

}  // namespace kvant::model::testing
