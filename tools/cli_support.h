// What the commands of `kvant` share: exit codes, the console (stdout, stderr, Ctrl-C), progress,
// tables, sizes in bytes, whole files. JSON output is in json_output.h.
//
// Contract of every command: results go to stdout, everything else to stderr; errors are returned,
// never printed; work that takes long polls Console::stop_requested(). Everything here is
// single-thread except stop_requested() and stop_flag().
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/base/result.h"

namespace kvant::tools {

// Exit codes, after sysexits.h; docs/cli.md lists them for users.
inline constexpr int kExitOk = 0;
inline constexpr int kExitUsage = 64;         // EX_USAGE: a wrong option or argument
inline constexpr int kExitData = 65;          // EX_DATAERR: a file's bytes are not what they claim
inline constexpr int kExitNoInput = 66;       // EX_NOINPUT: a file or name does not exist
inline constexpr int kExitUnavailable = 69;   // EX_UNAVAILABLE: well-formed but not supported
inline constexpr int kExitSoftware = 70;      // EX_SOFTWARE: a bug in kvant
inline constexpr int kExitOs = 71;            // EX_OSERR: the accelerator or its driver failed
inline constexpr int kExitIo = 74;            // EX_IOERR: reading or writing failed
inline constexpr int kExitTempFail = 75;      // EX_TEMPFAIL: out of memory, pages or disk
inline constexpr int kExitInterrupted = 130;  // Ctrl-C, as shells report it

int exit_code(ErrorCode code);

// The terminal as a command sees it.
class Console {
 public:
  struct Options {
    bool json = false;   // --json was given
    bool quiet = false;  // --quiet was given: no notes, no progress
  };

  Console() = default;
  explicit Console(Options options) : options_(options) {}
  Console(const Console&) = delete;
  Console& operator=(const Console&) = delete;

  bool json() const { return options_.json; }
  bool quiet() const { return options_.quiet; }

  // Writes results to stdout (buffered). Fails with kIoError if stdout cannot be written, e.g.
  // because the disk is full, and with kCancelled if its reader has gone (`kvant ... | head`): pass
  // either on.
  Status print(std::string_view text);
  // Makes what was printed visible; call it after each piece of streamed text.
  Status flush();

  // One line on stderr for people, without a newline at the end; nothing with --quiet.
  void note(std::string_view line);
  // "kvant: warning: ..." on stderr, also with --quiet.
  void warn(std::string_view line);

  // True once Ctrl-C (or SIGTERM) came, or the reader of stdout has gone. Long work polls it and
  // returns cancelled(). Callable from any thread.
  static bool stop_requested();
  static Status check_stop();  // cancelled() once that is true
  // The flag itself, for engine calls that take one.
  static const std::atomic<bool>& stop_flag();
  static Error cancelled();

  // For main() only.
  static void install_signal_handlers();
  static int stop_signal();  // the signal that came, 0 if none
  bool reader_gone() const { return reader_gone_; }

 private:
  Options options_;
  std::string buffer_;
  bool reader_gone_ = false;
};

// A progress line on stderr for work that takes more than a second: redrawn in place on a terminal,
// a line every few seconds elsewhere, nothing with --quiet. Erases itself when it goes out of
// scope.
//   Progress progress(console, "evaluating", num_chunks, "chunks");
//   progress.update(done, "ppl 28.41");
class Progress {
 public:
  // `total` 0: unknown.
  Progress(const Console& console, std::string label, int64_t total, std::string unit);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void update(int64_t done, std::string_view detail = {});

 private:
  using Clock = std::chrono::steady_clock;
  std::string line(int64_t done, std::string_view detail, double seconds) const;

  std::string label_;
  int64_t total_;
  std::string unit_;
  bool enabled_;
  bool terminal_;
  bool drawn_ = false;
  Clock::time_point start_;
  Clock::time_point last_;
};

// Text in aligned columns. The first column is aligned left, the others right, unless `left` names
// them.
class Table {
 public:
  explicit Table(std::vector<std::string> header, std::vector<size_t> left = {0});
  void add_row(std::vector<std::string> cells);  // as many cells as the header has
  std::string str() const;                       // header, rule, rows; each line ends in '\n'

 private:
  std::vector<std::vector<std::string>> rows_;
  std::vector<size_t> left_;
};

// "512 B", "3.00 KiB", "1.25 GiB".
std::string format_bytes(int64_t bytes);
// "8GiB", "512M", "1.5g", "4096": K, M, G, T alone and KiB ... are powers of 1024, KB ... powers of
// 1000. kInvalidArgument says what is accepted.
Result<int64_t> parse_bytes(std::string_view text);
// The same for an option that need not be given: 0 for an empty text.
Result<int64_t> parse_optional_bytes(std::string_view text);

// Whole of stdin, to its end. kIoError, kCancelled.
Result<std::string> read_stdin();
// Whole file; "-" is stdin. kNotFound, kIoError, each naming the path.
Result<std::string> read_file(const std::string& path);
// The same, or `otherwise` for an empty path.
Result<std::string> read_file_or(const std::string& path, std::string_view otherwise);
// Replaces `path` by `bytes` so that a failure leaves the old file as it was. kIoError naming the
// path.
Status write_file(const std::string& path, std::string_view bytes);

// Reads stdin line by line; the newline is not part of a line.
class LineReader {
 public:
  // True and a line, or false at the end of input. kIoError, kCancelled (Ctrl-C).
  Result<bool> next(std::string& line);

 private:
  std::string buffer_;
  size_t start_ = 0;
  bool at_end_ = false;
};

}  // namespace kvant::tools
