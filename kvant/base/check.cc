#include "kvant/base/check.h"

namespace kvant::internal {

void check_failed(const char* condition, const char* message, SourceLocation where) {
  throw InternalError(std::string("internal error at ") + where.file_name() + ":" +
                      std::to_string(where.line()) + ": " + message + " (" + condition +
                      " does not hold)");
}

}  // namespace kvant::internal
