// Reads GGUF model files (versions 2 and 3, little-endian): metadata and the table of tensors.
//
// `open` maps the file and checks everything that can be checked without reading tensor data: all
// counts and lengths against the bytes that are left, names, types, alignment and extents. Strings
// and tensor bytes are views into the mapping and live as long as the Gguf. Getters convert and
// check the type of a value; each error names the key. Thread-safe once open (all const). Source:
// docs/gguf.md of ggml-org/ggml.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "kvant/base/mapped_file.h"
#include "kvant/base/result.h"
#include "kvant/formats/weight_types.h"

namespace kvant::model {

enum class GgufValueType : uint32_t {
  kU8 = 0,
  kI8 = 1,
  kU16 = 2,
  kI16 = 3,
  kU32 = 4,
  kI32 = 5,
  kF32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kU64 = 10,
  kI64 = 11,
  kF64 = 12,
};
std::string_view gguf_value_type_name(GgufValueType type);  // "u8", "string", ...

// One metadata entry, undecoded. Use the getters of Gguf.
struct GgufValue {
  GgufValueType type = GgufValueType::kU8;          // kArray for arrays
  GgufValueType element_type = GgufValueType::kU8;  // of an array; otherwise equal to `type`
  uint64_t count = 1;                               // items of an array; otherwise 1
  std::span<const std::byte> bytes;                 // the items; strings with their length in front
};

struct GgufTensor {
  std::string_view name;
  formats::WeightType type = formats::WeightType::kF32;
  // As in the file: dims[0] varies fastest, unused dimensions are 1. A matrix that maps x [n_in] to
  // y [n_out] has dims {n_in, n_out}: n_out rows of n_in elements.
  std::array<int64_t, 4> dims = {1, 1, 1, 1};
  int num_dims = 0;
  std::span<const std::byte> bytes;

  int64_t num_elements() const { return dims[0] * dims[1] * dims[2] * dims[3]; }
  int64_t num_rows() const { return dims[1] * dims[2] * dims[3]; }
  int64_t row_bytes() const { return formats::weight_bytes(type, dims[0]); }
};

class Gguf {
 public:
  // kNotFound, kIoError, kCorruptData, or kUnsupported (other versions, byte order, tensor types).
  static Result<Gguf> open(const std::string& path);
  // The same from memory, which must outlive the result; `name` stands for the path in messages.
  static Result<Gguf> parse(std::span<const std::byte> bytes, std::string name);

  const std::string& name() const { return name_; }
  uint32_t version() const { return version_; }
  int64_t file_bytes() const { return static_cast<int64_t>(bytes_.size()); }

  // ---- tensors, in file order ----
  std::span<const GgufTensor> tensors() const { return tensors_; }
  const GgufTensor* find_tensor(std::string_view tensor_name) const;  // nullptr: absent
  Result<GgufTensor> tensor(std::string_view tensor_name) const;      // kNotFound: absent

  // Takes a tensor's bytes out of resident memory; they are read from the file again if needed.
  void drop_pages(const GgufTensor& tensor) const {
    if (file_) file_->drop_pages(tensor.bytes);
  }

  // ---- metadata ----
  std::span<const std::string_view> keys() const { return keys_; }  // in file order
  const GgufValue* find(std::string_view key) const;                // nullptr: absent
  bool has(std::string_view key) const { return find(key) != nullptr; }

  // kNotFound if absent, kCorruptData if the value has another kind or does not fit. Integers of
  // any width convert to each other when the value fits; f32 and f64 to float.
  Result<uint32_t> u32(std::string_view key) const;
  Result<uint64_t> u64(std::string_view key) const;
  Result<int64_t> i64(std::string_view key) const;
  Result<float> f32(std::string_view key) const;
  Result<bool> boolean(std::string_view key) const;
  Result<std::string_view> string(std::string_view key) const;

  // The same with a value for an absent key; a value of the wrong kind is still an error.
  Result<uint32_t> u32_or(std::string_view key, uint32_t fallback) const;
  Result<float> f32_or(std::string_view key, float fallback) const;
  Result<bool> boolean_or(std::string_view key, bool fallback) const;
  Result<std::string_view> string_or(std::string_view key, std::string_view fallback) const;

  Result<std::vector<uint32_t>> u32_array(std::string_view key) const;
  Result<std::vector<int32_t>> i32_array(std::string_view key) const;
  Result<std::vector<float>> f32_array(std::string_view key) const;
  Result<std::vector<bool>> boolean_array(std::string_view key) const;
  Result<std::vector<std::string_view>> string_array(std::string_view key) const;

  // One value per layer: an array of `num_layers` items, or a scalar that holds for all of them.
  Result<std::vector<uint32_t>> u32_per_layer(std::string_view key, int64_t num_layers) const;

 private:
  Gguf() = default;
  friend class GgufParser;

  // The scalar value at `key`, or an error; `wanted` is for the message.
  Result<GgufValue> scalar(std::string_view key) const;
  Result<GgufValue> array(std::string_view key) const;
  Error wrong_kind(std::string_view key, const GgufValue& value, std::string_view wanted) const;
  template <typename T>
  Result<T> integer(std::string_view key) const;
  template <typename T>
  Result<std::vector<T>> integer_array(std::string_view key) const;

  std::optional<MappedFile> file_;  // absent when parsed from memory
  std::span<const std::byte> bytes_;
  std::string name_;
  uint32_t version_ = 0;
  std::vector<std::string_view> keys_;
  std::unordered_map<std::string_view, GgufValue> values_;
  std::vector<GgufTensor> tensors_;
  std::unordered_map<std::string_view, size_t> tensor_index_;  // into tensors_
};

}  // namespace kvant::model
