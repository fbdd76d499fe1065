#include "tools/json_output.h"

#include <gtest/gtest.h>

namespace kvant::tools {
namespace {

TEST(JsonOutput, ObjectsNameSchemaAndCommand) {
  Json object = json_object("eval");
  object["results"] = Json::array();
  EXPECT_EQ(json_text(object), R"({"schema_version":1,"command":"eval","results":[]})");
}

TEST(JsonOutput, ErrorsCarryCodeAndMessage) {
  const Json object = json_error("run", Error(ErrorCode::kNotFound, "cannot open 'x'"));
  EXPECT_EQ(object["error"]["code"], "not_found");
  EXPECT_EQ(object["error"]["message"], "cannot open 'x'");
}

TEST(JsonOutput, BrokenUtf8IsReplacedNotThrown) {
  EXPECT_EQ(json_text(Json("a\xff")), "\"a\xef\xbf\xbd\"");
}

}  // namespace
}  // namespace kvant::tools
