// Hostile logits files: parsing, and reading the first and last row of every chunk.
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kvant/model/logits_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data), size);
  const auto file = kvant::model::LogitsFile::parse(bytes, "fuzz");
  if (!file) return 0;
  const kvant::model::LogitsFileHeader& header = file->header();
  std::vector<float> row(static_cast<size_t>(header.vocab));
  for (int64_t chunk = 0; chunk < header.chunks; ++chunk) {
    (void)file->read_row(chunk, 0, row);
    (void)file->read_row(chunk, header.scored_per_chunk() - 1, row);
  }
  return 0;
}
