#include "kvant/base/result.h"

#include <stdexcept>

namespace kvant {

std::string_view error_code_name(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument: return "invalid_argument";
    case ErrorCode::kNotFound: return "not_found";
    case ErrorCode::kCorruptData: return "corrupt_data";
    case ErrorCode::kUnsupported: return "unsupported";
    case ErrorCode::kResourceExhausted: return "resource_exhausted";
    case ErrorCode::kNumericError: return "numeric_error";
    case ErrorCode::kCancelled: return "cancelled";
    case ErrorCode::kIoError: return "io_error";
    case ErrorCode::kDeviceError: return "device_error";
    case ErrorCode::kInternal: return "internal";
  }
  return "internal";
}

namespace internal {

void bad_result_access(const Error& error) {
  throw std::logic_error("value() of a failed Result: " + error.message());
}

}  // namespace internal
}  // namespace kvant
