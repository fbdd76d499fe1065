#include "tools/serve_log.h"

#include <fmt/format.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

namespace kvant::tools {
namespace {

constexpr size_t kMaxText = 256;

spdlog::level::level_enum spdlog_level(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug: return spdlog::level::debug;
    case LogLevel::kInfo: return spdlog::level::info;
    case LogLevel::kWarning: return spdlog::level::warn;
    case LogLevel::kError: return spdlog::level::err;
    case LogLevel::kOff: break;
  }
  return spdlog::level::off;
}

}  // namespace

LogLevel parse_log_level(std::string_view name) {
  if (name == "debug") return LogLevel::kDebug;
  if (name == "warning") return LogLevel::kWarning;
  if (name == "error") return LogLevel::kError;
  if (name == "off") return LogLevel::kOff;
  return LogLevel::kInfo;
}

std::string log_text(std::string_view text) {
  std::string out(text.substr(0, kMaxText));
  for (char& c : out) {
    if (c < 0x20 || c > 0x7e) c = '?';
  }
  if (text.size() > kMaxText) out += "...";
  return out;
}

struct ServeLog::State {
  std::shared_ptr<spdlog::logger> logger;
  bool access = true;
};

ServeLog::ServeLog(LogLevel level, bool access) : state_(std::make_unique<State>()) {
  state_->logger =
      std::make_shared<spdlog::logger>("serve", std::make_shared<spdlog::sinks::stderr_sink_mt>());
  state_->logger->set_pattern("%Y-%m-%d %H:%M:%S.%e %l %v");
  state_->logger->set_level(spdlog_level(level));
  state_->access = access;
}

ServeLog::~ServeLog() = default;

void ServeLog::info(std::string_view text) {
  state_->logger->info(text);
}

void ServeLog::warn(std::string_view text) {
  state_->logger->warn(text);
}

void ServeLog::access(const serve::http::AccessRecord& record) {
  if (!state_->access || !state_->logger->should_log(spdlog::level::info)) return;
  const serve::http::HttpRequest& request = *record.request;
  std::string line =
      fmt::format("{} {} {} {} {} B {:.3f} s id={}", request.peer, log_text(request.method),
                  log_text(request.path), record.status, record.bytes, record.seconds, request.id);
  if (!record.note.empty()) line += fmt::format(" {}", log_text(record.note));
  if (record.client_left) line += " client left";
  if (!record.cut_by.empty()) line += fmt::format(" cut: {}", record.cut_by);
  state_->logger->info(line);
}

void ServeLog::refused(int status, std::string_view peer) {
  if (!state_->access) return;
  state_->logger->info(fmt::format("{} refused with {}", peer, status));
}

}  // namespace kvant::tools
