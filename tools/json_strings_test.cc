#include "tools/json_strings.h"

#include <gtest/gtest.h>

namespace kvant::tools {
namespace {

TEST(JsonStrings, Reads) {
  EXPECT_EQ(parse_json_string(R"( "a\n\t\"\\\/\u00e9\ud83d\ude00" )").value(), "a\n\t\"\\/é😀");
  EXPECT_EQ(parse_json_string("\"\"").value(), "");
  EXPECT_EQ(parse_json_string(R"("\udc80\udcff")").value(), "\x80\xff");  // bytes that are no UTF-8
  EXPECT_EQ(parse_json_string("\"\xff\"").value(), "\xff");
  EXPECT_EQ(parse_json_string(R"("\ud800x")").value(), "\xed\xa0\x80x");
  EXPECT_EQ(parse_json_string(R"("\u0000")").value(), std::string(1, '\0'));
}

TEST(JsonStrings, SaysWhatIsWrong) {
  for (const char* text :
       {"", "abc", "\"abc", "\"a\" b", R"("\x")", R"("\u12")", "\"a\nb\"", "\""}) {
    const Result<std::string> parsed = parse_json_string(text);
    ASSERT_FALSE(parsed) << text;
    EXPECT_EQ(parsed.error().code(), ErrorCode::kCorruptData);
    EXPECT_TRUE(parsed.error().message().starts_with("expected a JSON string: ")) << text;
  }
}

TEST(JsonStrings, WritesWhatItReads) {
  EXPECT_EQ(write_json_string("a\n\"\\é😀"), R"("a\n\"\\é😀")");
  EXPECT_EQ(write_json_string("\xff\xed\xa0\x80"), R"("\udcff\udced\udca0\udc80")");
  for (int first = 0; first < 256; ++first) {
    for (int second = 0; second < 256; ++second) {
      const std::string bytes = {static_cast<char>(first), static_cast<char>(second), 'x'};
      ASSERT_EQ(parse_json_string(write_json_string(bytes)).value(), bytes);
    }
  }
}

}  // namespace
}  // namespace kvant::tools
