#include "kvant/serve/monitor/dashboard.h"

#include <cstddef>

extern const unsigned char kvant_embedded_dashboard[];
extern const std::size_t kvant_embedded_dashboard_size;

namespace kvant::serve {

std::string_view dashboard_page() {
  return {reinterpret_cast<const char*>(kvant_embedded_dashboard), kvant_embedded_dashboard_size};
}

}  // namespace kvant::serve
