#include "kvant/serve/openai/api_error.h"

#include "kvant/serve/openai/json.h"

namespace kvant::serve::openai {

std::string_view error_type(int status) {
  switch (status) {
    case 401: return "authentication_error";
    case 403: return "permission_error";
    case 404: return "not_found_error";
    case 429: return "rate_limit_error";
    case 503: return "service_unavailable_error";
    default: return status < 500 ? "invalid_request_error" : "server_error";
  }
}

std::string error_body(const ApiError& error) {
  Json fields;
  fields["message"] = error.message;
  fields["type"] = error_type(error.status);
  fields["param"] = error.param.empty() ? Json() : Json(error.param);
  fields["code"] = error.code.empty() ? Json(error.status) : Json(error.code);
  return dump_json(Json{{"error", std::move(fields)}});
}

http::HttpResponse error_response(const ApiError& error) {
  http::HttpResponse response{.status = error.status, .body = error_body(error)};
  if (error.retry_after_seconds > 0) {
    response.headers.push_back({"Retry-After", std::to_string(error.retry_after_seconds)});
  }
  if (error.status == 401) response.headers.push_back({"WWW-Authenticate", "Bearer"});
  return response;
}

ApiError to_api_error(const Error& error) {
  ApiError api{.status = 500, .message = error.message()};
  switch (error.code()) {
    case ErrorCode::kInvalidArgument:
    case ErrorCode::kUnsupported: api.status = 400; break;
    case ErrorCode::kNotFound: api.status = 404; break;
    case ErrorCode::kResourceExhausted:
      api.status = 429;
      api.retry_after_seconds = 1;
      break;
    case ErrorCode::kCancelled:
      api.status = 503;
      api.retry_after_seconds = 5;
      break;
    default: break;
  }
  return api;
}

}  // namespace kvant::serve::openai
