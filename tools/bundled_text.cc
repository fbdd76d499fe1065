#include "tools/bundled_text.h"

#include <cstddef>

// Sources that cmake/embed_text.cmake writes.
extern const unsigned char kvant_embedded_registers[];
extern const std::size_t kvant_embedded_registers_size;
extern const unsigned char kvant_embedded_novel[];
extern const std::size_t kvant_embedded_novel_size;

namespace kvant::tools {

std::string_view registers_text() {
  return {reinterpret_cast<const char*>(kvant_embedded_registers), kvant_embedded_registers_size};
}

std::string_view novel_text() {
  return {reinterpret_cast<const char*>(kvant_embedded_novel), kvant_embedded_novel_size};
}

}  // namespace kvant::tools
