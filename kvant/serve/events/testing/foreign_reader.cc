#include "kvant/serve/events/testing/foreign_reader.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <stdexcept>

namespace kvant::serve::testing {
namespace {

constexpr const char* kPython = "/usr/bin/python3";  // Debian's: another may lack the modules
constexpr const char* kScript = KVANT_SOURCE_DIR "/kvant/serve/events/testing/foreign_index.py";

}  // namespace

bool ForeignReader::available() {
  static const bool result =
      std::system((std::string(kPython) + " -c 'import zmq, msgpack' 2>/dev/null").c_str()) == 0;
  return result;
}

ForeignReader::ForeignReader(const std::string& endpoint, const std::string& replay,
                             const std::string& topic) {
  int to_child[2], from_child[2];
  if (pipe2(to_child, O_CLOEXEC) != 0 || pipe2(from_child, O_CLOEXEC) != 0) {
    throw std::runtime_error("pipe2 failed");
  }
  child_ = fork();
  if (child_ == 0) {
    dup2(to_child[0], 0);
    dup2(from_child[1], 1);
    execl(kPython, kPython, kScript, endpoint.c_str(), replay.c_str(), "--topic", topic.c_str(),
          static_cast<char*>(nullptr));
    _exit(127);
  }
  close(to_child[0]);
  close(from_child[1]);
  in_ = to_child[1];
  out_ = from_child[0];
}

ForeignReader::~ForeignReader() {
  close(in_);
  close(out_);
  kill(child_, SIGKILL);
  waitpid(child_, nullptr, 0);
}

bool ForeignReader::has_line(int timeout_ms) {
  while (buffer_.find('\n') == std::string::npos) {
    pollfd polled = {out_, POLLIN, 0};
    if (poll(&polled, 1, timeout_ms) <= 0) return false;
    char bytes[65536];
    const ssize_t count = read(out_, bytes, sizeof(bytes));
    if (count <= 0) return false;
    buffer_.append(bytes, static_cast<size_t>(count));
  }
  return true;
}

std::string ForeignReader::line(int timeout_ms) {
  if (!has_line(timeout_ms)) return "";
  const size_t end = buffer_.find('\n');
  std::string text = buffer_.substr(0, end);
  buffer_.erase(0, end + 1);
  return text;
}

void ForeignReader::command(const std::string& text) {
  const std::string bytes = text + "\n";
  if (write(in_, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size())) {
    throw std::runtime_error("the foreign reader has ended");
  }
}

nlohmann::json ForeignReader::index_after(uint64_t number) {
  command("end " + std::to_string(number));
  return nlohmann::json::parse(line(60'000), nullptr, false);
}

}  // namespace kvant::serve::testing
