// Arbitrary cache format strings: what parses has a canonical name that parses to the same format.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "kvant/formats/spec.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvant::formats;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  for (const std::string& item : split_format_list(text)) {
    const kvant::Result<CacheFormat> format = parse_cache_format(item);
    if (!format) continue;
    const kvant::Result<CacheFormat> again = parse_cache_format(canonical_name(*format));
    if (!again || !(*again == *format)) std::abort();
    if (asymptotic_bits_per_value(*format, 128, 64) < 1.0) std::abort();
    (void)file_name_form(item);
  }
  return 0;
}
