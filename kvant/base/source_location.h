// Where in the source a value was made: std::source_location for compilers without it (clang 14,
// which builds the fuzz targets). Same member names, so that it can become an alias.
#pragma once

namespace kvant {

class SourceLocation {
 public:
  // As a default argument it names the caller.
  static constexpr SourceLocation current(const char* file = __builtin_FILE(),
                                          int line = __builtin_LINE(),
                                          const char* function = __builtin_FUNCTION()) {
    SourceLocation here;
    here.file_ = file;
    here.line_ = line;
    here.function_ = function;
    return here;
  }

  constexpr const char* file_name() const { return file_; }
  constexpr int line() const { return line_; }
  constexpr const char* function_name() const { return function_; }

 private:
  const char* file_ = "";
  int line_ = 0;
  const char* function_ = "";
};

}  // namespace kvant
