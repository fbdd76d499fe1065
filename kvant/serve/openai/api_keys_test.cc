#include "kvant/serve/openai/api_keys.h"

#include <gtest/gtest.h>

#include <set>

namespace kvant::serve::openai {
namespace {

TEST(ApiKeys, ReadsNamesAndSalts) {
  const Result<ApiKeys> keys =
      ApiKeys::parse("# comment\nsk-a alice pepper\r\n\n  sk-b\tbob\nsk-c\n");
  ASSERT_TRUE(keys) << keys.error().message();
  EXPECT_EQ(keys->check("Bearer sk-a")->name, "alice");
  EXPECT_EQ(keys->check("Bearer sk-a")->salt, "pepper");
  EXPECT_EQ(keys->check("Bearer sk-b")->name, "bob");
  EXPECT_EQ(keys->check("Bearer sk-c")->name, "key3");
  for (const char* wrong : {"", "sk-a", "Bearer", "Bearer ", "Bearer sk-", "Bearer sk-aa",
                            "Bearer sk-a sk-b", "Basic sk-a"}) {
    EXPECT_FALSE(keys->check(wrong)) << wrong;
  }
}

TEST(ApiKeys, WithoutKeysEverybodyMay) {
  EXPECT_TRUE(ApiKeys().check(""));
  EXPECT_EQ(ApiKeys().check("Bearer x")->name, "");
}

TEST(ApiKeys, WrongFilesAreErrors) {
  EXPECT_FALSE(ApiKeys::parse(""));
  EXPECT_FALSE(ApiKeys::parse("# nothing\n"));
  EXPECT_FALSE(ApiKeys::parse("a b c d\n"));
  const Result<ApiKeys> doubled = ApiKeys::parse("k one\nk two\n");
  ASSERT_FALSE(doubled);
  EXPECT_NE(doubled.error().message().find("line 2"), std::string::npos);
}

TEST(ApiKeys, KnowTheSaltsOfTenants) {
  const Result<ApiKeys> keys = ApiKeys::parse("k1 alice 47\nk2 bob 11\nk3 carol 47\nk4 dave\nk5\n");
  ASSERT_TRUE(keys);
  const std::vector<std::string> salts = keys->salts();
  EXPECT_EQ(std::set(salts.begin(), salts.end()),
            (std::set{combine_salts("11", ""), combine_salts("47", "")}));
  EXPECT_TRUE(ApiKeys().salts().empty());
}

TEST(ApiKeys, SaltsDoNotRunIntoEachOther) {
  EXPECT_EQ(combine_salts("", ""), "");
  EXPECT_EQ(combine_salts("", "mine"), "mine");
  EXPECT_EQ(combine_salts("secret", "mine").find("secret"), std::string::npos);
  EXPECT_NE(combine_salts("", combine_salts("a", "b")), combine_salts("a", "b"));
  EXPECT_NE(combine_salts("", "tenant:x"), combine_salts("", "tenant:tenant:x"));
  EXPECT_NE(combine_salts("ab", "c"), combine_salts("a", "bc"));
  EXPECT_NE(combine_salts("a", ""), combine_salts("", "a"));
  EXPECT_NE(combine_salts("1:a", ""), combine_salts("", "1:a"));
}

}  // namespace
}  // namespace kvant::serve::openai
