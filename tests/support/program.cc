#include "tests/support/program.h"

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <sstream>
#include <stdexcept>

#include <fcntl.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

namespace kvant::testing {
namespace {

using Clock = std::chrono::steady_clock;

struct Pipe {
  int read_end = -1;
  int write_end = -1;
  Pipe() {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) throw std::runtime_error("pipe2 failed");
    read_end = ends[0];
    write_end = ends[1];
  }
  ~Pipe() {
    close_end(read_end);
    close_end(write_end);
  }
  static void close_end(int& end) {
    if (end >= 0) ::close(end);
    end = -1;
  }
};

[[noreturn]] void exec_kvant(const std::vector<std::string>& arguments,
                             const ProgramOptions& options) {
  for (const std::string& variable : options.environment)
    putenv(const_cast<char*>(variable.c_str()));
  std::vector<char*> argv = {const_cast<char*>(KVANT_PROGRAM)};
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  execv(KVANT_PROGRAM, argv.data());
  _exit(127);
}

// Moves bytes until both outputs are closed; feeds stdin without blocking on it.
void pump(Pipe& in, Pipe& out, Pipe& err, const ProgramOptions& options, pid_t child,
          ProgramResult& result) {
  const Clock::time_point start = Clock::now();
  size_t fed = 0;
  bool interrupted = false;
  const auto elapsed_ms = [&] {
    return std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - start).count();
  };
  const auto interrupt_now = [&] {
    return (options.interrupt_after_ms >= 0 && elapsed_ms() >= options.interrupt_after_ms) ||
           (options.interrupt_when && options.interrupt_when());
  };
  while (out.read_end >= 0 || err.read_end >= 0) {
    const bool keep_stdin_open = options.interrupt_after_ms >= 0 && !interrupted;
    if (fed == options.input.size() && !keep_stdin_open) Pipe::close_end(in.write_end);
    if (!interrupted && interrupt_now()) {
      kill(child, SIGINT);
      interrupted = true;
    }
    if (elapsed_ms() > options.timeout_ms) kill(child, SIGKILL);
    const bool feed = in.write_end >= 0 && fed < options.input.size();
    pollfd polled[3] = {{out.read_end, POLLIN, 0},
                        {err.read_end, POLLIN, 0},
                        {feed ? in.write_end : -1, POLLOUT, 0}};
    poll(polled, 3, 20);
    char buffer[65536];
    for (int i = 0; i < 2; ++i) {
      if ((polled[i].revents & (POLLIN | POLLHUP)) == 0) continue;
      int& fd = i == 0 ? out.read_end : err.read_end;
      const ssize_t count = read(fd, buffer, sizeof(buffer));
      if (count > 0) {
        (i == 0 ? result.out : result.err).append(buffer, static_cast<size_t>(count));
      } else if (count == 0) {
        Pipe::close_end(fd);
      }
    }
    if (options.close_stdout_after >= 0 &&
        result.out.size() >= static_cast<size_t>(options.close_stdout_after)) {
      Pipe::close_end(out.read_end);
    }
    if ((polled[2].revents & (POLLOUT | POLLERR)) != 0) {
      const ssize_t count =
          write(in.write_end, options.input.data() + fed, options.input.size() - fed);
      if (count > 0) fed += static_cast<size_t>(count);
      if (count < 0 && errno == EPIPE) fed = options.input.size();
    }
  }
}

}  // namespace

ProgramResult run_kvant(const std::vector<std::string>& arguments, const ProgramOptions& options) {
  std::signal(SIGPIPE, SIG_IGN);
  Pipe in, out, err;
  // A full pipe must not block the writer of stdin while the program waits for its reader.
  fcntl(in.write_end, F_SETFL, O_NONBLOCK);
  const pid_t child = fork();
  if (child < 0) throw std::runtime_error("fork failed");
  if (child == 0) {
    std::signal(SIGPIPE, SIG_DFL);
    const int stdout_fd = options.stdout_to.empty()
                              ? out.write_end
                              : open(options.stdout_to.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    dup2(in.read_end, STDIN_FILENO);
    dup2(stdout_fd, STDOUT_FILENO);
    dup2(err.write_end, STDERR_FILENO);
    exec_kvant(arguments, options);
  }
  Pipe::close_end(in.read_end);
  Pipe::close_end(out.write_end);
  Pipe::close_end(err.write_end);
  ProgramResult result;
  pump(in, out, err, options, child, result);
  int status = 0;
  waitpid(child, &status, 0);
  result.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return result;
}

std::vector<std::string> command_names(const std::string& help) {
  std::istringstream lines(help);
  std::vector<std::string> names;
  bool inside = false;
  for (std::string line; std::getline(lines, line);) {
    if (line == "Commands:") {
      inside = true;
    } else if (line.empty()) {
      inside = false;
    } else if (inside) {
      std::istringstream(line) >> names.emplace_back();
    }
  }
  return names;
}

std::string model_path(const std::string& name) {
  const char* folder = std::getenv("KVANT_MODEL_DIR");
  const std::string file = name == "smollm2"  ? "SmolLM2-135M-Instruct.Q4_1.gguf"
                           : name == "gemma3" ? "gemma-3-270m-q4_k_m.gguf"
                           : name == "qwen"   ? "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
                                            : throw std::invalid_argument("unknown model " + name);
  const std::string path =
      std::string(folder != nullptr && *folder != '\0' ? folder : KVANT_SOURCE_DIR "/models") +
      "/" + file;
  return std::filesystem::exists(path) ? path : "";
}

}  // namespace kvant::testing
