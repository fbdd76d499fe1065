// The logits file of llama.cpp's perplexity tool (`--save-all-logits`, `--kl-divergence-base`):
// what a model predicted for the scored positions of a text, so that engines can be compared on one
// base.
//
// Little-endian: "_logits_", i32 ctx, vocab, chunks; i32 token ids [chunks][ctx] (BOS not filled
// in); then for each chunk and each scored position (evaluate.h) one row: f32 scale, f32 minimum,
// u16 codes [vocab], a zero code if vocab is odd. log p(token) = scale * code + minimum; everything
// below the largest logit minus 16 shares the minimum. Facts: tools/perplexity of
// ggml-org/llama.cpp. LogitsFile is thread-safe, the writer is thread-compatible.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kvant/base/mapped_file.h"
#include "kvant/base/result.h"

namespace kvant::model {

struct LogitsFileHeader {
  int32_t ctx = 0;    // tokens a chunk
  int32_t vocab = 0;  // values a row
  int32_t chunks = 0;

  int64_t scored_per_chunk() const { return ctx - 1 - ctx / 2; }
  int64_t row_codes() const { return 4 + int64_t{vocab} + vocab % 2; }  // u16 units a row
  int64_t row_bytes() const { return 2 * row_codes(); }
};

// Readers and `kl` sums take a token whose log-probability is not above this as unknown: the file
// does not tell such tokens apart.
inline constexpr float kLogitsFileFloor = -16.0f;

class LogitsFile {
 public:
  // Maps the file. kNotFound, kIoError, or kCorruptData: not such a file, cut short, impossible
  // sizes, token ids outside the vocabulary.
  static Result<LogitsFile> open(const std::string& path);
  // The same from memory, which must outlive the result; `name` stands for the path in messages.
  static Result<LogitsFile> parse(std::span<const std::byte> bytes, std::string name);

  const LogitsFileHeader& header() const { return header_; }
  const std::string& name() const { return name_; }
  std::span<const int32_t> tokens() const { return tokens_; }  // [chunks][ctx]

  // Natural log-probabilities of scored position `index` of `chunk` into `log_probs` [vocab].
  // kCorruptData if the row's scale or minimum is not a number that a softmax can give.
  Status read_row(int64_t chunk, int64_t index, std::span<float> log_probs) const;

 private:
  LogitsFile() = default;
  std::optional<MappedFile> file_;
  std::string name_;
  LogitsFileHeader header_;
  std::vector<int32_t> tokens_;
  std::span<const std::byte> rows_;
};

// One row as the file holds it: `packed` [row_codes()] from `logits` [vocab]; `log_sum_exp` is that
// of the logits. Rounds to the nearest of 65,536 steps.
void pack_logits_row(std::span<const float> logits, double log_sum_exp, std::span<uint16_t> packed);

// Writes beside `path` and renames at the end, so that a failure leaves an older file as it was and
// no half file. A path that is no regular file (a device, a pipe) is written into directly.
class LogitsFileWriter {
 public:
  // `tokens` [chunks][ctx]. kIoError naming the path.
  static Result<std::unique_ptr<LogitsFileWriter>> create(const std::string& path,
                                                          const LogitsFileHeader& header,
                                                          std::span<const int32_t> tokens);
  ~LogitsFileWriter();  // without finish(): removes what was written
  LogitsFileWriter(const LogitsFileWriter&) = delete;
  LogitsFileWriter& operator=(const LogitsFileWriter&) = delete;

  // Whole packed rows, in the order of the file.
  Status append(std::span<const uint16_t> rows);
  // Fails with kInternal unless every row has been appended.
  Status finish();

 private:
  LogitsFileWriter() = default;
  Status write(const void* data, size_t bytes);
  Error failed(int error_number) const;

  LogitsFileHeader header_;
  std::string path_;
  std::string target_;  // what is written to; differs from path_ unless that is a special file
  std::FILE* file_ = nullptr;
  int64_t codes_written_ = 0;
};

}  // namespace kvant::model
