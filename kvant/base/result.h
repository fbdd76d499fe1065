// Errors as values: `Error`, `Result<T>`, `Status`, and the macros that pass them on.
//
// Used by every public function that the caller or the outside world can make fail (bad file, full
// cache, unsupported format). Bugs in kvant are not errors: see check.h. Member names follow
// std::expected (C++23), so that Result can become an alias of it later.
// Thread-safe as plain values are.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

#include "kvant/base/source_location.h"

namespace kvant {

// Few on purpose: a code says what the caller can do, the message says what happened.
enum class ErrorCode {
  kInvalidArgument,    // the call or flag is wrong: fix it and try again
  kNotFound,           // a file, tensor or name does not exist
  kCorruptData,        // the bytes of a file, page or message are not what their format says
  kUnsupported,        // well-formed, but this build or backend cannot do it
  kResourceExhausted,  // out of memory, pages or disk: try again with less
  kNumericError,       // non-finite values reached a codec (codecs.md section 2)
  kCancelled,          // the caller asked to stop
  kIoError,            // the operating system refused to read or write
  kDeviceError,        // the accelerator reported a fault
  kInternal,           // a bug in kvant, caught at a boundary
};

// Stable lower-case name of a code, e.g. "corrupt_data"; used in JSON and in messages.
std::string_view error_code_name(ErrorCode code);

// What went wrong, in words for people: what was expected, what was found, what to do.
class Error {
 public:
  Error(ErrorCode code, std::string message, SourceLocation where = SourceLocation::current())
      : code_(code), message_(std::move(message)), where_(where) {}

  ErrorCode code() const { return code_; }
  const std::string& message() const { return message_; }
  const SourceLocation& where() const { return where_; }

  // The same error with "context: " in front, for adding a file or tensor name on the way up.
  Error with_context(std::string_view context) const {
    return Error(code_, std::string(context) + ": " + message_, where_);
  }

 private:
  ErrorCode code_;
  std::string message_;
  SourceLocation where_;
};

namespace internal {
// Throws std::logic_error naming the error: reading the value of a failed Result is a bug.
[[noreturn]] void bad_result_access(const Error& error);
}  // namespace internal

// Holds a value of type T or an Error.
template <typename T>
class [[nodiscard]] Result {
 public:
  using value_type = T;
  using error_type = Error;

  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}      // NOLINT: implicit
  Result(Error error) : state_(std::in_place_index<1>, std::move(error)) {}  // NOLINT: implicit

  bool has_value() const { return state_.index() == 0; }
  explicit operator bool() const { return has_value(); }

  T& value() & {
    check();
    return std::get<0>(state_);
  }
  const T& value() const& {
    check();
    return std::get<0>(state_);
  }
  T&& value() && {
    check();
    return std::get<0>(std::move(state_));
  }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T&& operator*() && { return std::move(*this).value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

  const Error& error() const& { return std::get<1>(state_); }
  Error&& error() && { return std::get<1>(std::move(state_)); }

  template <typename U>
  T value_or(U&& fallback) const& {
    return has_value() ? value() : static_cast<T>(std::forward<U>(fallback));
  }

 private:
  void check() const {
    if (!has_value()) internal::bad_result_access(std::get<1>(state_));
  }
  std::variant<T, Error> state_;
};

// Success or an Error.
template <>
class [[nodiscard]] Result<void> {
 public:
  using value_type = void;
  using error_type = Error;

  Result() = default;
  Result(Error error) : error_(std::move(error)) {}  // NOLINT: implicit

  bool has_value() const { return !error_.has_value(); }
  explicit operator bool() const { return has_value(); }
  void value() const {
    if (error_) internal::bad_result_access(*error_);
  }
  const Error& error() const& { return *error_; }
  Error&& error() && { return std::move(*error_); }

 private:
  std::optional<Error> error_;
};

using Status = Result<void>;

}  // namespace kvant

#define KVANT_CONCAT_INNER(a, b) a##b
#define KVANT_CONCAT(a, b) KVANT_CONCAT_INNER(a, b)

// Returns the error of `expr` (a Status or Result) from the enclosing function, if it has one.
#define KVANT_TRY(expr)                                                \
  do {                                                                 \
    auto kvant_try_result = (expr);                                    \
    if (!kvant_try_result) return std::move(kvant_try_result).error(); \
  } while (false)

// `KVANT_ASSIGN(auto x, make_x());` binds the value or returns the error.
#define KVANT_ASSIGN(lhs, expr) KVANT_ASSIGN_INNER(KVANT_CONCAT(kvant_result_, __LINE__), lhs, expr)
#define KVANT_ASSIGN_INNER(tmp, lhs, expr) \
  auto tmp = (expr);                       \
  if (!tmp) return std::move(tmp).error(); \
  lhs = std::move(tmp).value()
