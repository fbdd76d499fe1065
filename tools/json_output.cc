#include "tools/json_output.h"

namespace kvant::tools {

Json json_object(std::string_view command) {
  return Json{{"schema_version", kSchemaVersion}, {"command", std::string(command)}};
}

Json json_error(std::string_view command, const Error& error) {
  Json object = json_object(command);
  object["error"] =
      Json{{"code", std::string(error_code_name(error.code()))}, {"message", error.message()}};
  return object;
}

std::string json_text(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

Status print_json(Console& console, const Json& value) {
  KVANT_TRY(console.print(json_text(value) + "\n"));
  return console.flush();
}

}  // namespace kvant::tools
