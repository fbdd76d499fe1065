// The typed getters of Gguf.
#include <fmt/format.h>

#include <cstring>
#include <limits>
#include <type_traits>

#include "kvant/model/gguf.h"

namespace kvant::model {
namespace {

template <typename T>
T load(const std::byte* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

// An integer of any of the file's types.
struct Integer {
  bool negative = false;
  uint64_t magnitude = 0;  // two's complement bits if negative
};

template <typename T>
Integer widen(const std::byte* p) {
  const T value = load<T>(p);
  if constexpr (std::is_signed_v<T>) {
    return {value < 0, static_cast<uint64_t>(static_cast<int64_t>(value))};
  } else {
    return {false, value};
  }
}

// Reads the item at `p`; false if the type is not an integer type.
bool read_integer(GgufValueType type, const std::byte* p, Integer& out) {
  switch (type) {
    case GgufValueType::kU8: out = widen<uint8_t>(p); return true;
    case GgufValueType::kI8: out = widen<int8_t>(p); return true;
    case GgufValueType::kU16: out = widen<uint16_t>(p); return true;
    case GgufValueType::kI16: out = widen<int16_t>(p); return true;
    case GgufValueType::kU32: out = widen<uint32_t>(p); return true;
    case GgufValueType::kI32: out = widen<int32_t>(p); return true;
    case GgufValueType::kU64: out = widen<uint64_t>(p); return true;
    case GgufValueType::kI64: out = widen<int64_t>(p); return true;
    default: return false;
  }
}

template <typename T>
bool fits(const Integer& value) {
  if (value.negative) {
    return std::is_signed_v<T> && static_cast<int64_t>(value.magnitude) >=
                                      static_cast<int64_t>(std::numeric_limits<T>::min());
  }
  return value.magnitude <= static_cast<uint64_t>(std::numeric_limits<T>::max());
}

bool read_float(GgufValueType type, const std::byte* p, float& out) {
  if (type == GgufValueType::kF32) {
    out = load<float>(p);
    return true;
  }
  if (type != GgufValueType::kF64) return false;
  const double wide = load<double>(p);
  constexpr double kMax = static_cast<double>(std::numeric_limits<float>::max());
  if (wide > kMax || wide < -kMax) return false;
  out = static_cast<float>(wide);
  return true;
}

size_t item_stride(const GgufValue& value) {
  return value.count == 0 ? 0 : value.bytes.size() / value.count;
}

std::string_view string_at(const std::byte* p) {
  return {reinterpret_cast<const char*>(p + 8), load<uint64_t>(p)};
}

}  // namespace

std::string_view gguf_value_type_name(GgufValueType type) {
  constexpr std::string_view kNames[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                         "bool", "string", "array", "u64", "i64", "f64"};
  return kNames[static_cast<uint32_t>(type)];
}

const GgufValue* Gguf::find(std::string_view key) const {
  const auto it = values_.find(key);
  return it == values_.end() ? nullptr : &it->second;
}

Error Gguf::wrong_kind(std::string_view key, const GgufValue& value,
                       std::string_view wanted) const {
  const std::string found =
      value.type == GgufValueType::kArray
          ? fmt::format("an array of {} {}", value.count, gguf_value_type_name(value.element_type))
          : fmt::format("{}", gguf_value_type_name(value.type));
  return Error(ErrorCode::kCorruptData,
               fmt::format("{}: \"{}\" should be {}, found {}", name_, key, wanted, found));
}

Result<GgufValue> Gguf::scalar(std::string_view key) const {
  const GgufValue* value = find(key);
  if (value == nullptr) {
    return Error(ErrorCode::kNotFound, fmt::format("{}: no metadata key \"{}\"", name_, key));
  }
  return *value;
}

Result<GgufValue> Gguf::array(std::string_view key) const {
  KVANT_ASSIGN(const GgufValue value, scalar(key));
  if (value.type != GgufValueType::kArray) return wrong_kind(key, value, "an array");
  return value;
}

template <typename T>
Result<T> Gguf::integer(std::string_view key) const {
  KVANT_ASSIGN(const GgufValue value, scalar(key));
  Integer number;
  if (!read_integer(value.type, value.bytes.data(), number)) {
    return wrong_kind(key, value, "an integer");
  }
  if (!fits<T>(number)) {
    return Error(ErrorCode::kCorruptData,
                 fmt::format("{}: the value of \"{}\" is out of range", name_, key));
  }
  return static_cast<T>(number.magnitude);
}

template <typename T>
Result<std::vector<T>> Gguf::integer_array(std::string_view key) const {
  KVANT_ASSIGN(const GgufValue value, array(key));
  std::vector<T> out;
  out.reserve(value.count);
  const size_t stride = item_stride(value);
  for (uint64_t i = 0; i < value.count; ++i) {
    Integer number;
    if (!read_integer(value.element_type, value.bytes.data() + i * stride, number)) {
      return wrong_kind(key, value, "an array of integers");
    }
    if (!fits<T>(number)) {
      return Error(ErrorCode::kCorruptData,
                   fmt::format("{}: item {} of \"{}\" is out of range", name_, i, key));
    }
    out.push_back(static_cast<T>(number.magnitude));
  }
  return out;
}

Result<uint32_t> Gguf::u32(std::string_view key) const {
  return integer<uint32_t>(key);
}
Result<uint64_t> Gguf::u64(std::string_view key) const {
  return integer<uint64_t>(key);
}
Result<int64_t> Gguf::i64(std::string_view key) const {
  return integer<int64_t>(key);
}

Result<float> Gguf::f32(std::string_view key) const {
  KVANT_ASSIGN(const GgufValue value, scalar(key));
  float out = 0;
  if (!read_float(value.type, value.bytes.data(), out)) {
    return wrong_kind(key, value, "a floating-point number");
  }
  return out;
}

Result<bool> Gguf::boolean(std::string_view key) const {
  KVANT_ASSIGN(const GgufValue value, scalar(key));
  if (value.type != GgufValueType::kBool) return wrong_kind(key, value, "a bool");
  return load<uint8_t>(value.bytes.data()) != 0;
}

Result<std::string_view> Gguf::string(std::string_view key) const {
  KVANT_ASSIGN(const GgufValue value, scalar(key));
  if (value.type != GgufValueType::kString) return wrong_kind(key, value, "a string");
  return string_at(value.bytes.data());
}

Result<uint32_t> Gguf::u32_or(std::string_view key, uint32_t fallback) const {
  if (!has(key)) return fallback;
  return u32(key);
}
Result<float> Gguf::f32_or(std::string_view key, float fallback) const {
  if (!has(key)) return fallback;
  return f32(key);
}
Result<bool> Gguf::boolean_or(std::string_view key, bool fallback) const {
  if (!has(key)) return fallback;
  return boolean(key);
}
Result<std::string_view> Gguf::string_or(std::string_view key, std::string_view fallback) const {
  if (!has(key)) return fallback;
  return string(key);
}

Result<std::vector<uint32_t>> Gguf::u32_array(std::string_view key) const {
  return integer_array<uint32_t>(key);
}
Result<std::vector<int32_t>> Gguf::i32_array(std::string_view key) const {
  return integer_array<int32_t>(key);
}

Result<std::vector<float>> Gguf::f32_array(std::string_view key) const {
  KVANT_ASSIGN(const GgufValue value, array(key));
  std::vector<float> out(value.count);
  const size_t stride = item_stride(value);
  for (uint64_t i = 0; i < value.count; ++i) {
    if (!read_float(value.element_type, value.bytes.data() + i * stride, out[i])) {
      return wrong_kind(key, value, "an array of floating-point numbers");
    }
  }
  return out;
}

Result<std::vector<bool>> Gguf::boolean_array(std::string_view key) const {
  KVANT_ASSIGN(const GgufValue value, array(key));
  if (value.count != 0 && value.element_type != GgufValueType::kBool) {
    return wrong_kind(key, value, "an array of bools");
  }
  std::vector<bool> out(value.count);
  for (uint64_t i = 0; i < value.count; ++i) out[i] = value.bytes[i] != std::byte{0};
  return out;
}

Result<std::vector<std::string_view>> Gguf::string_array(std::string_view key) const {
  KVANT_ASSIGN(const GgufValue value, array(key));
  if (value.count != 0 && value.element_type != GgufValueType::kString) {
    return wrong_kind(key, value, "an array of strings");
  }
  std::vector<std::string_view> out;
  out.reserve(value.count);
  const std::byte* p = value.bytes.data();
  for (uint64_t i = 0; i < value.count; ++i) {
    out.push_back(string_at(p));
    p += 8 + out.back().size();
  }
  return out;
}

Result<std::vector<uint32_t>> Gguf::u32_per_layer(std::string_view key, int64_t num_layers) const {
  const GgufValue* value = find(key);
  if (value != nullptr && value->type == GgufValueType::kArray) {
    if (value->count != static_cast<uint64_t>(num_layers)) {
      return wrong_kind(key, *value, fmt::format("one value for each of {} layers", num_layers));
    }
    return u32_array(key);
  }
  KVANT_ASSIGN(const uint32_t same, u32(key));
  return std::vector<uint32_t>(static_cast<size_t>(num_layers), same);
}

}  // namespace kvant::model
