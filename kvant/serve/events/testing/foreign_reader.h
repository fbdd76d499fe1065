// Runs foreign_index.py, a reader of KV events in another language and library, for tests.
// Linux; single-thread.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>

#include <nlohmann/json.hpp>

namespace kvant::serve::testing {

class ForeignReader {
 public:
  // False where Debian's python3, python3-zmq or python3-msgpack is missing: skip the test then.
  static bool available();

  // Subscribes to topics that begin with `topic`.
  ForeignReader(const std::string& endpoint, const std::string& replay, const std::string& topic);
  ~ForeignReader();
  ForeignReader(const ForeignReader&) = delete;
  ForeignReader& operator=(const ForeignReader&) = delete;

  // The next line that it prints, or "" after `timeout_ms`.
  std::string line(int timeout_ms = 20'000);
  bool has_line(int timeout_ms);
  void command(const std::string& text);
  // What it knows after batch `number`.
  nlohmann::json index_after(uint64_t number);

 private:
  pid_t child_ = -1;
  int in_ = -1, out_ = -1;
  std::string buffer_;
};

}  // namespace kvant::serve::testing
