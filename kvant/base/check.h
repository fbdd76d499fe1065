// Checks for bugs in kvant itself. A failed check throws InternalError, which only the outermost
// surfaces (CLI, server, Python) catch; the library neither prints nor aborts.
//
// Never use a check for something a caller, a file or a request can get wrong: return an Error.
#pragma once

#include <stdexcept>
#include <string>

#include "kvant/base/source_location.h"

namespace kvant {

class InternalError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

namespace internal {
[[noreturn]] void check_failed(const char* condition, const char* message,
                               SourceLocation where = SourceLocation::current());
}  // namespace internal
}  // namespace kvant

// Always on; keep it cheap. The message says which promise of the code does not hold.
#define KVANT_CHECK(condition, message)                     \
  do {                                                      \
    if (!(condition)) [[unlikely]]                          \
      ::kvant::internal::check_failed(#condition, message); \
  } while (false)

// Only in debug builds: for inner loops.
#ifdef NDEBUG
#define KVANT_DCHECK(condition, message) \
  do {                                   \
  } while (false)
#else
#define KVANT_DCHECK(condition, message) KVANT_CHECK(condition, message)
#endif
