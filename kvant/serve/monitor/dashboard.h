// The page at `/`: web/dashboard.html, carried in the program. It asks for nothing but
// /dashboard/data (Metrics::json) and /v1/chat/completions of its own server.
#pragma once

#include <string_view>

namespace kvant::serve {

// HTML, UTF-8. Valid for ever.
std::string_view dashboard_page();
inline constexpr std::string_view kDashboardType = "text/html; charset=utf-8";

}  // namespace kvant::serve
