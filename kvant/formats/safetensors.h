// Reading and writing safetensors containers: named tensors behind a JSON header.
//
// The parser takes hostile bytes: every offset, shape and name is checked against the file before
// it is used. Layout (huggingface/safetensors): u64 header length (little-endian), that many bytes
// of JSON that start with '{' and may end in spaces, then the tensors' bytes without holes or
// overlaps. Views point into the caller's bytes. Thread-safe (pure functions).
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/base/result.h"

namespace kvant::formats {

struct SafetensorsTensor {
  std::string name;
  std::string dtype;  // "F32", "BF16", ...; only the byte count of the known ones is checked
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;
};

struct Safetensors {
  std::map<std::string, std::string> metadata;
  std::vector<SafetensorsTensor> tensors;  // by name
};

// kCorruptData says what is wrong and where; the caller adds the file's name.
Result<Safetensors> parse_safetensors(std::span<const std::byte> bytes);

// The file's bytes. Tensors must have unique names; their data is copied in the given order.
std::string serialize_safetensors(const Safetensors& content);

}  // namespace kvant::formats
