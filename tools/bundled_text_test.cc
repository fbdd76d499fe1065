#include "tools/bundled_text.h"

#include <gtest/gtest.h>

#include <string_view>

namespace kvant::tools {
namespace {

int64_t count(std::string_view text, std::string_view part) {
  int64_t found = 0;
  for (size_t at = text.find(part); at != text.npos; at = text.find(part, at + 1)) ++found;
  return found;
}

TEST(BundledText, HasFiveRegisters) {
  const std::string_view text = registers_text();
  EXPECT_GT(text.size(), 140'000u);
  EXPECT_TRUE(text.starts_with("Persuasion, by Jane Austen"));
  EXPECT_TRUE(text.ends_with("America/Martinique\n"));
  for (const std::string_view register_of :
       {"Sir Walter Elliot", "\" said Catherine", "The Jargon File", "#include", "Flour, rye"}) {
    EXPECT_GE(count(text, register_of), 1) << register_of;
  }
  EXPECT_EQ(count(text, "The Jargon File, "), 4);  // one piece in each turn
}

TEST(BundledText, HasANovel) {
  const std::string_view text = novel_text();
  EXPECT_GT(text.size(), 50'000u);
  EXPECT_TRUE(text.starts_with("Persuasion"));
  EXPECT_EQ(count(text, "\n\nChapter "), 3);
  EXPECT_EQ(text.find('\0'), text.npos);
}

}  // namespace
}  // namespace kvant::tools
