// What `kvant serve` writes on stderr while it runs: a line for each request, warnings, its end.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "kvant/serve/http/server.h"

namespace kvant::tools {

enum class LogLevel { kDebug, kInfo, kWarning, kError, kOff };
// The names of --log-level; kInfo for others.
LogLevel parse_log_level(std::string_view name);

// Thread-safe.
class ServeLog {
 public:
  ServeLog(LogLevel level, bool access);
  ~ServeLog();

  void info(std::string_view text);
  void warn(std::string_view text);
  // "127.0.0.1:4711 POST /v1/completions 200 1234 B 0.345 s id=... key=... prompt=... cached=..."
  void access(const serve::http::AccessRecord& record);
  void refused(int status, std::string_view peer);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// `text` on one line of printable ASCII, cut to what fits a log line: requests must not forge lines
// or move a terminal's cursor.
std::string log_text(std::string_view text);

}  // namespace kvant::tools
