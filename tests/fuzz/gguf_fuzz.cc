// Hostile GGUF files: parsing, every getter, and dequantising the first rows of every tensor.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kvant/formats/weight_types.h"
#include "kvant/model/gguf.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using kvant::model::Gguf;
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data), size);
  const kvant::Result<Gguf> file = Gguf::parse(bytes, "fuzz");
  if (!file) return 0;
  for (const std::string_view key : file->keys()) {
    // Each either gives a value or says why not.
    (void)file->u32(key);
    (void)file->i64(key);
    (void)file->f32(key);
    (void)file->boolean(key);
    (void)file->string(key);
    (void)file->u32_array(key);
    (void)file->f32_array(key);
    (void)file->string_array(key);
    (void)file->u32_per_layer(key, 4);
  }
  for (const kvant::model::GgufTensor& tensor : file->tensors()) {
    // A parsed tensor's extents were checked against the file: its bytes are all there.
    uint8_t sum = 0;
    for (const std::byte byte : tensor.bytes)
      sum = static_cast<uint8_t>(sum + static_cast<uint8_t>(byte));
    volatile uint8_t sink = sum;
    (void)sink;
  }
  return 0;
}
