#include "kvant/model/logits_file.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>

#include "kvant/model/eval_stats.h"

namespace kvant::model {
namespace {

constexpr LogitsFileHeader kHeader = {.ctx = 6, .vocab = 5, .chunks = 2};  // 2 positions a chunk

std::vector<int32_t> tokens() {
  return {0, 1, 2, 3, 4, 0, 4, 3, 2, 1, 0, 4};
}

std::vector<float> logits_of(int row) {
  return {0.5f * static_cast<float>(row), -3.0f, 2.25f, 40.0f - 20.0f * static_cast<float>(row),
          -90.0f};
}

std::string temp_path(const char* name) {
  return (std::filesystem::temp_directory_path() / (std::string("kvant_") + name)).string();
}

std::vector<uint16_t> packed_rows() {
  std::vector<uint16_t> rows;
  for (int row = 0; row < 4; ++row) {
    std::vector<uint16_t> packed(static_cast<size_t>(kHeader.row_codes()));
    const std::vector<float> logits = logits_of(row);
    pack_logits_row(logits, row_softmax(logits).log_sum_exp, packed);
    rows.insert(rows.end(), packed.begin(), packed.end());
  }
  return rows;
}

std::vector<std::byte> file_bytes() {
  const std::string path = temp_path("logits_bytes");
  auto writer = LogitsFileWriter::create(path, kHeader, tokens());
  EXPECT_TRUE(writer);
  EXPECT_TRUE((*writer)->append(packed_rows()));
  EXPECT_TRUE((*writer)->finish());
  std::ifstream in(path, std::ios::binary);
  const std::vector<char> chars((std::istreambuf_iterator<char>(in)), {});
  std::vector<std::byte> bytes(chars.size());
  std::memcpy(bytes.data(), chars.data(), chars.size());
  std::filesystem::remove(path);
  return bytes;
}

TEST(LogitsFile, RowsSurviveWithinHalfAStep) {
  const std::vector<std::byte> bytes = file_bytes();
  // 20 bytes of header, 12 tokens, 4 rows of 4 + 5 + 1 codes.
  ASSERT_EQ(bytes.size(), 20u + 48u + 80u);
  const auto file = LogitsFile::parse(bytes, "test");
  ASSERT_TRUE(file) << file.error().message();
  EXPECT_EQ(std::vector<int32_t>(file->tokens().begin(), file->tokens().end()), tokens());
  std::vector<float> log_probs(5);
  for (int row = 0; row < 4; ++row) {
    ASSERT_TRUE(file->read_row(row / 2, row % 2, log_probs));
    const std::vector<float> logits = logits_of(row);
    const double sum = row_softmax(logits).log_sum_exp;
    const float top = *std::max_element(logits.begin(), logits.end());
    for (size_t i = 0; i < logits.size(); ++i) {
      const double expected = std::max(logits[i], top - 16) - sum;
      EXPECT_NEAR(log_probs[i], expected, 0.5 * 16 / 65535 + 1e-5)
          << "row " << row << " token " << i;
    }
  }
}

TEST(LogitsFile, EqualLogitsHaveNoScale) {
  std::vector<uint16_t> packed(10);
  const std::vector<float> logits(5, 3.0f);
  pack_logits_row(logits, row_softmax(logits).log_sum_exp, packed);
  float scale = 1;
  float minimum = 0;
  std::memcpy(&scale, packed.data(), 4);
  std::memcpy(&minimum, packed.data() + 2, 4);
  EXPECT_EQ(scale, 0);
  EXPECT_NEAR(minimum, -std::log(5.0), 1e-6);
}

TEST(LogitsFile, EveryTruncationIsAnError) {
  const std::vector<std::byte> bytes = file_bytes();
  for (size_t size = 0; size < bytes.size(); ++size) {
    const auto file = LogitsFile::parse(std::span(bytes).first(size), "short");
    ASSERT_FALSE(file) << size;
    EXPECT_EQ(file.error().code(), ErrorCode::kCorruptData);
  }
  std::vector<std::byte> longer = bytes;
  longer.push_back(std::byte{0});
  EXPECT_FALSE(LogitsFile::parse(longer, "long"));
}

TEST(LogitsFile, ImpossibleHeadersAndTokensAreErrors) {
  const std::vector<std::byte> bytes = file_bytes();
  for (const size_t field : {8u, 12u, 16u}) {
    for (const int32_t value : {-1, 0, 1, std::numeric_limits<int32_t>::max()}) {
      if (field == 16 && value == 1) continue;  // one chunk: the rest would be surplus bytes
      std::vector<std::byte> changed = bytes;
      std::memcpy(changed.data() + field, &value, sizeof value);
      EXPECT_FALSE(LogitsFile::parse(changed, "header")) << field << ' ' << value;
    }
  }
  std::vector<std::byte> changed = bytes;
  const int32_t outside = 5;
  std::memcpy(changed.data() + 20, &outside, sizeof outside);
  const auto file = LogitsFile::parse(changed, "tokens");
  ASSERT_FALSE(file);
  EXPECT_NE(file.error().message().find("outside the vocabulary"), std::string::npos);
}

TEST(LogitsFile, RowsThatNoSoftmaxGivesAreErrors) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const auto& [scale, minimum] :
       {std::pair{nan, -20.0f}, {-1.0f, -20.0f}, {1.0f, -20.0f}, {1e-4f, nan}, {2e-4f, 0.0f}}) {
    std::vector<std::byte> changed = file_bytes();
    std::memcpy(changed.data() + 68, &scale, sizeof scale);
    std::memcpy(changed.data() + 72, &minimum, sizeof minimum);
    const auto file = LogitsFile::parse(changed, "rows");
    ASSERT_TRUE(file);
    std::vector<float> log_probs(5);
    const Status read = file->read_row(0, 0, log_probs);
    ASSERT_FALSE(read) << scale << ' ' << minimum;
    EXPECT_EQ(read.error().code(), ErrorCode::kCorruptData);
    EXPECT_TRUE(file->read_row(0, 1, log_probs));
  }
}

TEST(LogitsFileWriter, FailureLeavesTheOldFile) {
  const std::string path = temp_path("logits_old");
  std::ofstream(path) << "old";
  {
    auto writer = LogitsFileWriter::create(path, kHeader, tokens());
    ASSERT_TRUE(writer);
    const Status early = (*writer)->finish();  // rows are missing
    ASSERT_FALSE(early);
    EXPECT_EQ(early.error().code(), ErrorCode::kInternal);
  }
  std::ifstream in(path);
  std::string text;
  in >> text;
  EXPECT_EQ(text, "old");
  for (const auto& entry :
       std::filesystem::directory_iterator(std::filesystem::temp_directory_path())) {
    EXPECT_EQ(entry.path().string().find(path + ".tmp"), std::string::npos);
  }
  std::filesystem::remove(path);
}

TEST(LogitsFileWriter, AFullDiskIsAnError) {
  const auto writer = LogitsFileWriter::create("/dev/full", kHeader, tokens());
  ASSERT_FALSE(writer);
  EXPECT_EQ(writer.error().code(), ErrorCode::kIoError);
  EXPECT_TRUE(std::filesystem::exists("/dev/full"));
  const auto nowhere = LogitsFileWriter::create("/nonexistent/x", kHeader, tokens());
  ASSERT_FALSE(nowhere);
  EXPECT_EQ(nowhere.error().code(), ErrorCode::kIoError);
}

}  // namespace
}  // namespace kvant::model
