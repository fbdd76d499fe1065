#include "kvant/model/logits_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>

#include <sys/stat.h>
#include <unistd.h>

#include "kvant/base/check.h"

namespace kvant::model {

static_assert(std::endian::native == std::endian::little, "files are read and written in place");

namespace {

constexpr char kMagic[] = "_logits_";
constexpr size_t kMagicBytes = 8;
constexpr size_t kHeaderBytes = kMagicBytes + 3 * sizeof(int32_t);
constexpr int32_t kMinCtx = 4;  // at least one scored position
constexpr int32_t kMaxCtx =
    1 << 24;  // of tokens, vocabulary and chunks: far above any use, and small
constexpr int32_t kMaxVocab = 1 << 24;  // enough that no product below overflows
constexpr int32_t kMaxChunks = 1 << 24;

Error corrupt(const std::string& name, std::string_view what) {
  return Error(ErrorCode::kCorruptData, fmt::format("'{}': {}", name, what));
}

Status check_header(const LogitsFileHeader& header, const std::string& name) {
  const auto in_range = [](int32_t value, int32_t low, int32_t high) {
    return value >= low && value <= high;
  };
  if (!in_range(header.ctx, kMinCtx, kMaxCtx) || !in_range(header.vocab, 2, kMaxVocab) ||
      !in_range(header.chunks, 1, kMaxChunks)) {
    return corrupt(name, fmt::format("impossible sizes in the header: context {}, vocabulary {}, "
                                     "chunks {}",
                                     header.ctx, header.vocab, header.chunks));
  }
  return {};
}

}  // namespace

Result<LogitsFile> LogitsFile::open(const std::string& path) {
  KVANT_ASSIGN(MappedFile mapped, MappedFile::open(path));
  KVANT_ASSIGN(LogitsFile file, parse(mapped.bytes(), path));
  file.file_ = std::move(mapped);  // the mapping does not move with its owner
  return file;
}

Result<LogitsFile> LogitsFile::parse(std::span<const std::byte> bytes, std::string name) {
  if (bytes.size() < kHeaderBytes || std::memcmp(bytes.data(), kMagic, kMagicBytes) != 0) {
    return corrupt(
        name,
        "not a logits file: it does not start with '_logits_'; make one with `kvant eval "
        "--save-logits` or llama.cpp's `llama-perplexity --save-all-logits`");
  }
  LogitsFile file;
  std::memcpy(&file.header_.ctx, bytes.data() + kMagicBytes, sizeof(int32_t));
  std::memcpy(&file.header_.vocab, bytes.data() + kMagicBytes + 4, sizeof(int32_t));
  std::memcpy(&file.header_.chunks, bytes.data() + kMagicBytes + 8, sizeof(int32_t));
  const LogitsFileHeader& header = file.header_;
  KVANT_TRY(check_header(header, name));

  bytes = bytes.subspan(kHeaderBytes);
  const auto num_tokens = static_cast<size_t>(header.chunks) * static_cast<size_t>(header.ctx);
  const size_t token_bytes = num_tokens * sizeof(int32_t);
  const auto num_rows = static_cast<size_t>(header.chunks * header.scored_per_chunk());
  const auto row_bytes = static_cast<size_t>(header.row_bytes());
  const size_t left = bytes.size() < token_bytes ? 0 : bytes.size() - token_bytes;
  if (bytes.size() < token_bytes || left / row_bytes < num_rows) {
    return corrupt(name, fmt::format("cut short: {} chunks of {} positions are announced, {} are "
                                     "there; write it again",
                                     header.chunks, header.scored_per_chunk(), left / row_bytes));
  }
  if (left != num_rows * row_bytes) {
    return corrupt(name, fmt::format("{} bytes follow the last row", left - num_rows * row_bytes));
  }
  file.tokens_.resize(num_tokens);
  std::memcpy(file.tokens_.data(), bytes.data(), token_bytes);
  for (const int32_t token : file.tokens_) {
    if (token < 0 || token >= header.vocab) {
      return corrupt(
          name, fmt::format("token id {} is outside the vocabulary of {}", token, header.vocab));
    }
  }
  file.rows_ = bytes.subspan(token_bytes);
  file.name_ = std::move(name);
  return file;
}

Status LogitsFile::read_row(int64_t chunk, int64_t index, std::span<float> log_probs) const {
  KVANT_CHECK(chunk >= 0 && chunk < header_.chunks, "chunk of the file");
  KVANT_CHECK(index >= 0 && index < header_.scored_per_chunk(), "scored position of a chunk");
  KVANT_CHECK(log_probs.size() == static_cast<size_t>(header_.vocab), "one value a token");
  const int64_t row = chunk * header_.scored_per_chunk() + index;
  const std::byte* at = rows_.data() + row * header_.row_bytes();
  float scale = 0;
  float minimum = 0;
  std::memcpy(&scale, at, sizeof scale);
  std::memcpy(&minimum, at + sizeof scale, sizeof minimum);
  // The step is at most 16 / 65535, the largest log-probability at most 0 (rounding aside).
  constexpr float kMaxScale = 16.5f / 65535.0f;
  if (!(scale >= 0 && scale <= kMaxScale && std::isfinite(minimum)) ||
      minimum + 65535.0f * scale > 0.01f) {
    return corrupt(name_, fmt::format("row {} of chunk {} holds no probabilities (scale {}, "
                                      "minimum {})",
                                      index, chunk, scale, minimum));
  }
  const std::byte* codes = at + 4 * sizeof(uint16_t);
  for (int64_t i = 0; i < header_.vocab; ++i) {
    uint16_t code = 0;
    std::memcpy(&code, codes + i * 2, sizeof code);
    log_probs[static_cast<size_t>(i)] = scale * static_cast<float>(code) + minimum;
  }
  return {};
}

void pack_logits_row(std::span<const float> logits, double log_sum_exp,
                     std::span<uint16_t> packed) {
  KVANT_CHECK(packed.size() == 4 + logits.size() + logits.size() % 2, "one packed row");
  const auto [low, high] = std::minmax_element(logits.begin(), logits.end());
  const float top = *high;
  const float bottom = std::max(*low, top + kLogitsFileFloor);
  const float scale = (top - bottom) / 65535.0f;
  const auto minimum = static_cast<float>(bottom - log_sum_exp);
  std::memcpy(packed.data(), &scale, sizeof scale);
  std::memcpy(packed.data() + 2, &minimum, sizeof minimum);
  const float steps = scale > 0 ? 1.0f / scale : 0.0f;
  std::fill(packed.begin() + 4, packed.end(), uint16_t{0});
  for (size_t i = 0; i < logits.size(); ++i) {
    const float code = std::nearbyint(std::max(logits[i] - bottom, 0.0f) * steps);
    packed[4 + i] = static_cast<uint16_t>(std::min(code, 65535.0f));
  }
}

// ---- writer ----

Error LogitsFileWriter::failed(int error_number) const {
  return Error(ErrorCode::kIoError,
               fmt::format("cannot write '{}': {}", path_, std::strerror(error_number)));
}

Status LogitsFileWriter::write(const void* data, size_t bytes) {
  if (std::fwrite(data, 1, bytes, file_) != bytes) return failed(errno);
  return {};
}

Result<std::unique_ptr<LogitsFileWriter>> LogitsFileWriter::create(
    const std::string& path, const LogitsFileHeader& header, std::span<const int32_t> tokens) {
  KVANT_TRY(check_header(header, path));
  KVANT_CHECK(tokens.size() == static_cast<size_t>(header.chunks) * static_cast<size_t>(header.ctx),
              "the tokens of every chunk");
  std::unique_ptr<LogitsFileWriter> writer(new LogitsFileWriter);
  struct stat info = {};
  const bool special = ::stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode);
  writer->header_ = header;
  writer->path_ = path;
  writer->target_ = special ? path : fmt::format("{}.tmp{}", path, ::getpid());
  writer->file_ = std::fopen(writer->target_.c_str(), "wbe");
  if (writer->file_ == nullptr) return writer->failed(errno);
  KVANT_TRY(writer->write(kMagic, kMagicBytes));
  const int32_t sizes[3] = {header.ctx, header.vocab, header.chunks};
  KVANT_TRY(writer->write(sizes, sizeof sizes));
  KVANT_TRY(writer->write(tokens.data(), tokens.size_bytes()));
  if (std::fflush(writer->file_) != 0) return writer->failed(errno);  // a full disk shows at once
  return writer;
}

LogitsFileWriter::~LogitsFileWriter() {
  if (file_ == nullptr) return;
  std::fclose(file_);
  if (target_ != path_) ::unlink(target_.c_str());
}

Status LogitsFileWriter::append(std::span<const uint16_t> rows) {
  KVANT_CHECK(static_cast<int64_t>(rows.size()) % header_.row_codes() == 0, "whole rows");
  codes_written_ += static_cast<int64_t>(rows.size());
  return write(rows.data(), rows.size_bytes());
}

Status LogitsFileWriter::finish() {
  KVANT_CHECK(file_ != nullptr, "finish is called once");
  if (codes_written_ != header_.chunks * header_.scored_per_chunk() * header_.row_codes()) {
    return Error(ErrorCode::kInternal, fmt::format("'{}': rows are missing", path_));
  }
  std::FILE* file = std::exchange(file_, nullptr);
  int error = std::fflush(file) != 0 ? errno : 0;
  if (std::fclose(file) != 0 && error == 0) error = errno;
  if (target_ == path_) return error == 0 ? Status() : failed(error);
  if (error == 0 && std::rename(target_.c_str(), path_.c_str()) != 0) error = errno;
  if (error == 0) return {};
  ::unlink(target_.c_str());
  return failed(error);
}

}  // namespace kvant::model
