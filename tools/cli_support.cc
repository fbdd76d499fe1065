#include "tools/cli_support.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <cstring>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kvant/base/check.h"

namespace kvant::tools {

int exit_code(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument: return kExitUsage;
    case ErrorCode::kNotFound: return kExitNoInput;
    case ErrorCode::kCorruptData: return kExitData;
    case ErrorCode::kUnsupported: return kExitUnavailable;
    case ErrorCode::kResourceExhausted: return kExitTempFail;
    case ErrorCode::kNumericError: return kExitData;
    case ErrorCode::kCancelled: return kExitInterrupted;
    case ErrorCode::kIoError: return kExitIo;
    case ErrorCode::kDeviceError: return kExitOs;
    case ErrorCode::kInternal: return kExitSoftware;
  }
  return kExitSoftware;
}

// ---- Console ----

namespace {

// Process-wide because signal handlers have no other state; written by the handler and by Console.
std::atomic<bool> g_stop_requested{false};
std::atomic<int> g_stop_signal{0};
static_assert(std::atomic<bool>::is_always_lock_free && std::atomic<int>::is_always_lock_free);

extern "C" void on_stop_signal(int signal_number) {
  if (g_stop_requested.exchange(true)) {
    // The second one ends the program at once.
    std::signal(signal_number, SIG_DFL);
    std::raise(signal_number);
    return;
  }
  g_stop_signal.store(signal_number);
}

// Writes everything or returns errno.
int write_all(int fd, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(fd, bytes.data(), bytes.size());
    if (written < 0) {
      if (errno == EINTR) continue;
      return errno;
    }
    bytes.remove_prefix(static_cast<size_t>(written));
  }
  return 0;
}

void write_stderr(std::string_view text) {
  (void)write_all(STDERR_FILENO, text);
}

constexpr size_t kOutputBufferBytes = 64 * 1024;

}  // namespace

void Console::install_signal_handlers() {
  struct sigaction ignore = {};
  ignore.sa_handler = SIG_IGN;
  // A closed pipe, or a file that a limit does not let grow, is an error of write(2) instead.
  sigaction(SIGPIPE, &ignore, nullptr);
  sigaction(SIGXFSZ, &ignore, nullptr);
  struct sigaction stop = {};
  stop.sa_handler = on_stop_signal;
  sigemptyset(&stop.sa_mask);
  stop.sa_flags = 0;  // no SA_RESTART: a blocked read of stdin returns, so that Ctrl-C is seen
  sigaction(SIGINT, &stop, nullptr);
  sigaction(SIGTERM, &stop, nullptr);
}

bool Console::stop_requested() {
  return g_stop_requested.load(std::memory_order_relaxed);
}
Status Console::check_stop() {
  return stop_requested() ? Status(cancelled()) : Status();
}
const std::atomic<bool>& Console::stop_flag() {
  return g_stop_requested;
}
int Console::stop_signal() {
  return g_stop_signal.load();
}
Error Console::cancelled() {
  return Error(ErrorCode::kCancelled, "interrupted");
}

Status Console::print(std::string_view text) {
  buffer_.append(text);
  if (buffer_.size() < kOutputBufferBytes) return {};
  return flush();
}

Status Console::flush() {
  if (buffer_.empty()) return {};
  const int error = write_all(STDOUT_FILENO, buffer_);
  buffer_.clear();
  if (error == 0) return {};
  if (error == EPIPE) {
    reader_gone_ = true;
    g_stop_requested.store(true);
    return Error(ErrorCode::kCancelled, "the reader of standard output has gone");
  }
  return Error(ErrorCode::kIoError,
               fmt::format("cannot write to standard output: {}", std::strerror(error)));
}

void Console::note(std::string_view line) {
  if (!options_.quiet) write_stderr(std::string(line) + "\n");
}

void Console::warn(std::string_view line) {
  write_stderr(fmt::format("kvant: warning: {}\n", line));
}

// ---- Progress ----

namespace {
constexpr std::chrono::milliseconds kTerminalInterval{100};
constexpr std::chrono::seconds kLogInterval{5};
constexpr std::chrono::seconds kQuietStart{1};  // work shorter than this shows nothing
}  // namespace

Progress::Progress(const Console& console, std::string label, int64_t total, std::string unit)
    : label_(std::move(label)),
      total_(total),
      unit_(std::move(unit)),
      enabled_(!console.quiet()),
      terminal_(isatty(STDERR_FILENO) == 1),
      start_(Clock::now()),
      last_(start_) {}

Progress::~Progress() {
  if (drawn_ && terminal_) write_stderr("\r\x1b[K");
}

void Progress::update(int64_t done, std::string_view detail) {
  if (!enabled_) return;
  const Clock::time_point now = Clock::now();
  if (now - start_ < kQuietStart) return;
  if (drawn_ && terminal_ && now - last_ < kTerminalInterval) return;
  if (!terminal_ && now - last_ < kLogInterval) return;
  const std::string text = line(done, detail, std::chrono::duration<double>(now - start_).count());
  write_stderr(terminal_ ? "\r\x1b[K" + text : text + "\n");
  drawn_ = true;
  last_ = now;
}

std::string Progress::line(int64_t done, std::string_view detail, double seconds) const {
  std::string text = label_;
  if (total_ > 0) {
    text += fmt::format(": {}/{} {} ({}%)", done, total_, unit_, done * 100 / total_);
  } else {
    text += fmt::format(": {} {}", done, unit_);
  }
  if (!detail.empty()) text += fmt::format(", {}", detail);
  if (total_ > 0 && done > 0 && done < total_) {
    const double left = seconds * static_cast<double>(total_ - done) / static_cast<double>(done);
    text += fmt::format(", {:.0f} s left", std::ceil(left));
  }
  return text;
}

// ---- Table ----

namespace {

// Terminal columns of UTF-8 text, taking each code point for one column.
size_t display_width(std::string_view text) {
  size_t width = 0;
  for (const char c : text) width += (static_cast<unsigned char>(c) & 0xc0u) != 0x80u ? 1 : 0;
  return width;
}

}  // namespace

Table::Table(std::vector<std::string> header, std::vector<size_t> left) : left_(std::move(left)) {
  rows_.push_back(std::move(header));
}

void Table::add_row(std::vector<std::string> cells) {
  KVANT_CHECK(cells.size() == rows_[0].size(), "a table row has as many cells as the header");
  rows_.push_back(std::move(cells));
}

std::string Table::str() const {
  std::vector<size_t> widths(rows_[0].size(), 0);
  for (const auto& row : rows_) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], display_width(row[i]));
  }
  std::string text;
  const auto add_line = [&](const std::vector<std::string>& cells) {
    std::string line;
    for (size_t i = 0; i < cells.size(); ++i) {
      const std::string padding(widths[i] - display_width(cells[i]), ' ');
      const bool left = std::find(left_.begin(), left_.end(), i) != left_.end();
      if (i > 0) line += "  ";
      line += left ? cells[i] + padding : padding + cells[i];
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  };
  add_line(rows_[0]);
  std::vector<std::string> rule;
  for (const size_t width : widths) rule.emplace_back(width, '-');
  add_line(rule);
  for (size_t i = 1; i < rows_.size(); ++i) add_line(rows_[i]);
  return text;
}

// ---- Bytes ----

std::string format_bytes(int64_t bytes) {
  static constexpr const char* kUnits[] = {"KiB", "MiB", "GiB", "TiB", "PiB"};
  if (std::abs(bytes) < 1024) return fmt::format("{} B", bytes);
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  for (value /= 1024; std::abs(value) >= 1023.995 && unit + 1 < std::size(kUnits); ++unit)
    value /= 1024;
  return fmt::format("{:.2f} {}", value, kUnits[unit]);
}

Result<int64_t> parse_bytes(std::string_view text) {
  const auto wrong = [&](std::string_view why) {
    return Error(ErrorCode::kInvalidArgument,
                 fmt::format("'{}' is not a size: {}; write for example 8GiB, 512M or 1073741824",
                             text, why));
  };
  const std::string copy(text);
  char* end = nullptr;
  if (copy.empty() || (std::isdigit(static_cast<unsigned char>(copy[0])) == 0 && copy[0] != '.')) {
    return wrong("expected a number");
  }
  const double number = std::strtod(copy.c_str(), &end);
  std::string unit(end);
  unit.erase(0, std::min(unit.find_first_not_of(' '), unit.size()));
  for (char& c : unit) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  double factor = 1;
  if (!unit.empty() && unit != "b") {
    const size_t power = std::string_view("kmgtp").find(unit[0]);
    const std::string_view rest = std::string_view(unit).substr(1);
    if (power == std::string_view::npos || !(rest.empty() || rest == "ib" || rest == "b")) {
      return wrong("unknown unit");
    }
    factor = std::pow(rest == "b" ? 1000.0 : 1024.0, static_cast<double>(power + 1));
  }
  const double bytes = number * factor;
  if (!(bytes < 9.0e18)) return wrong("too large");
  return static_cast<int64_t>(std::llround(bytes));
}

Result<int64_t> parse_optional_bytes(std::string_view text) {
  if (text.empty()) return int64_t{0};
  return parse_bytes(text);
}

// ---- Files ----

namespace {

// Appends up to `limit` bytes; false at the end of input.
Result<bool> read_some(int fd, std::string& to, size_t limit, std::string_view name) {
  const size_t old_size = to.size();
  to.resize(old_size + limit);
  while (true) {
    const ssize_t count = ::read(fd, to.data() + old_size, limit);
    if (count >= 0) {
      to.resize(old_size + static_cast<size_t>(count));
      return count > 0;
    }
    const int error = errno;
    if (error == EINTR && !Console::stop_requested()) continue;
    to.resize(old_size);
    if (error == EINTR) return Console::cancelled();
    return Error(ErrorCode::kIoError,
                 fmt::format("cannot read {}: {}", name, std::strerror(error)));
  }
}

constexpr size_t kReadBytes = 64 * 1024;

Result<std::string> read_to_end(int fd, std::string_view name) {
  std::string text;
  while (true) {
    KVANT_ASSIGN(const bool more, read_some(fd, text, kReadBytes, name));
    if (!more) return text;
  }
}

}  // namespace

Result<std::string> read_stdin() {
  if (isatty(STDIN_FILENO) == 1) write_stderr("reading standard input; end it with Ctrl-D\n");
  return read_to_end(STDIN_FILENO, "standard input");
}

Result<std::string> read_file(const std::string& path) {
  if (path == "-") return read_stdin();
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    const int error = errno;
    const bool missing = error == ENOENT || error == ENOTDIR;
    return Error(missing ? ErrorCode::kNotFound : ErrorCode::kIoError,
                 fmt::format("cannot open '{}': {}", path, std::strerror(error)));
  }
  Result<std::string> text = read_to_end(fd, "'" + path + "'");
  ::close(fd);
  return text;
}

Result<std::string> read_file_or(const std::string& path, std::string_view otherwise) {
  return path.empty() ? std::string(otherwise) : read_file(path);
}

Status write_file(const std::string& path, std::string_view bytes) {
  // Special files (/dev/stdout, /dev/full) cannot be replaced by a rename: write into them.
  struct stat info = {};
  const bool special = ::stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode);
  const std::string target = special ? path : fmt::format("{}.tmp{}", path, ::getpid());
  const auto failed = [&](int error) {
    if (!special) ::unlink(target.c_str());
    return Error(ErrorCode::kIoError,
                 fmt::format("cannot write '{}': {}", path, std::strerror(error)));
  };
  const int fd = ::open(target.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd < 0) return failed(errno);
  int error = write_all(fd, bytes);
  if (::close(fd) != 0 && error == 0) error = errno;
  if (error == 0 && !special && ::rename(target.c_str(), path.c_str()) != 0) error = errno;
  if (error != 0) return failed(error);
  return {};
}

Result<bool> LineReader::next(std::string& line) {
  while (true) {
    const size_t newline = buffer_.find('\n', start_);
    if (newline != std::string::npos) {
      line.assign(buffer_, start_, newline - start_);
      start_ = newline + 1;
      return true;
    }
    buffer_.erase(0, start_);
    start_ = 0;
    if (at_end_) {
      if (buffer_.empty()) return false;
      line = std::move(buffer_);
      buffer_.clear();
      return true;
    }
    KVANT_ASSIGN(const bool more, read_some(STDIN_FILENO, buffer_, kReadBytes, "standard input"));
    at_end_ = !more;
  }
}

}  // namespace kvant::tools
