#include "kvant/serve/openai/json.h"

#include <gtest/gtest.h>

#include <limits>

namespace kvant::serve::openai {
namespace {

TEST(ParseJson, SaysWhatIsWrong) {
  EXPECT_TRUE(parse_json(R"({"a": [1, "x"]})"));
  for (const std::string text : {"", "{", "{\"a\": }", "\"\xff\"", "\"\xc3\"", R"("\ud800")"}) {
    const Result<Json> parsed = parse_json(text);
    ASSERT_FALSE(parsed) << text;
    EXPECT_EQ(parsed.error().code(), ErrorCode::kInvalidArgument);
    EXPECT_NE(parsed.error().message().find("not valid JSON"), std::string::npos);
    EXPECT_LT(parsed.error().message().size(), 500u);
  }
}

TEST(ParseJson, LimitsDepthAndValues) {
  EXPECT_TRUE(parse_json(std::string(64, '[') + std::string(64, ']')));
  EXPECT_FALSE(parse_json(std::string(65, '[') + std::string(65, ']')));
  EXPECT_FALSE(parse_json(std::string(1'000'000, '[')));
  EXPECT_FALSE(parse_json(std::string(1'000'000, '{')));
  EXPECT_TRUE(parse_json("[\"" + std::string(1000, '[') + "\\\"[[\"]"));  // in a string: text
  EXPECT_TRUE(parse_json("[1,2,3,4]", {.values = 5}));
  EXPECT_FALSE(parse_json("[1,2,3,4,5]", {.values = 5}));
}

TEST(DumpJson, ReplacesWhatIsNotUtf8) {
  EXPECT_EQ(quote_json("a\"\n\xc3\xa9"), "\"a\\\"\\n\xc3\xa9\"");
  EXPECT_EQ(quote_json("\xc3"), "\"\xef\xbf\xbd\"");
  EXPECT_EQ(json_logprob(-std::numeric_limits<float>::infinity()), -9999.0);
}

TEST(FieldReader, ReadsTypesAndKeepsTheFirstError) {
  const Json object = *parse_json(
      R"({"i": 3, "f": 1.5, "whole": 16.0, "s": "x", "b": true, "null": null, "list": ["a", "b"],
          "ids": [1, 2], "o": {}, "huge": 18446744073709551615, "bad": [1, "x"]})");
  std::optional<ApiError> error;
  FieldReader reader(object, "", error);
  EXPECT_EQ(reader.integer("i", 0, 10), 3);
  EXPECT_EQ(reader.integer("whole", 0, 100), 16);
  EXPECT_EQ(reader.number("f"), 1.5);
  EXPECT_EQ(reader.number("i"), 3.0);
  EXPECT_EQ(reader.text("s"), "x");
  EXPECT_EQ(reader.boolean("b"), true);
  EXPECT_EQ(reader.text("null"), std::nullopt);
  EXPECT_EQ(reader.text("absent"), std::nullopt);
  EXPECT_EQ(reader.texts("s"), std::vector<std::string>{"x"});
  EXPECT_EQ(reader.texts("list").size(), 2u);
  EXPECT_EQ(reader.integers("ids"), (std::vector<int32_t>{1, 2}));
  EXPECT_NE(reader.object("o"), nullptr);
  EXPECT_FALSE(error);

  EXPECT_EQ(reader.integer("huge", 0, 100), std::nullopt);
  ASSERT_TRUE(error);
  EXPECT_EQ(error->param, "huge");
  EXPECT_EQ(reader.integer("f", 0, 10), std::nullopt);
  EXPECT_EQ(error->param, "huge");

  for (const char* name : {"f", "s", "b", "o"}) {
    std::optional<ApiError> wrong;
    FieldReader fields(object, "x.", wrong);
    fields.integer(name, 0, 10);
    ASSERT_TRUE(wrong) << name;
    EXPECT_EQ(wrong->param, std::string("x.") + name);
    EXPECT_EQ(wrong->status, 400);
  }
  std::optional<ApiError> wrong;
  FieldReader(object, "", wrong).integers("bad");
  EXPECT_TRUE(wrong);
}

}  // namespace
}  // namespace kvant::serve::openai
