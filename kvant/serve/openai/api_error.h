// What a client is told when its request cannot be served: the error object of OpenAI's API and the
// HTTP status with it.
#pragma once

#include <string>
#include <string_view>

#include "kvant/base/result.h"
#include "kvant/serve/http/message.h"

namespace kvant::serve::openai {

struct ApiError {
  int status = 400;
  std::string message;
  std::string param = {};       // the field that is wrong; empty: null
  std::string code = {};        // a name for programs, e.g. "model_not_found"; empty: the status
  int retry_after_seconds = 0;  // sent as Retry-After if above 0
};

// "invalid_request_error", "authentication_error", "rate_limit_error", "server_error", ...
std::string_view error_type(int status);

// {"error": {"message", "type", "param", "code"}}
std::string error_body(const ApiError& error);
http::HttpResponse error_response(const ApiError& error);

// By the error's code: what the caller got wrong is 400, what is full 429, what is ending 503, a
// bug 500.
ApiError to_api_error(const Error& error);

}  // namespace kvant::serve::openai
