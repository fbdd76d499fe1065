#include "kvant/serve/tiers/testing/redis_servers.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>

namespace kvant::serve::testing {

namespace {

// A port that is free together with its cluster bus port, 10,000 above.
int free_port(int from) {
  const auto is_free = [](int port) {
    const int socket = ::socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    const bool free =
        ::bind(socket, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
    ::close(socket);
    return free;
  };
  int port = from;
  while (!is_free(port) || !is_free(port + 10000)) ++port;
  return port;
}

std::string output_of(const std::string& command) {
  std::string output;
  FILE* const pipe = ::popen((command + " 2>&1").c_str(), "r");
  if (pipe == nullptr) return output;
  char buffer[256];
  while (std::fgets(buffer, sizeof(buffer), pipe) != nullptr) output += buffer;
  ::pclose(pipe);
  while (!output.empty() && (output.back() == '\n' || output.back() == '\r')) output.pop_back();
  return output;
}

}  // namespace

bool RedisServers::installed() {
  return !output_of("command -v redis-server").empty() &&
         !output_of("command -v redis-cli").empty();
}

RedisServers::RedisServers(int count, bool cluster) : cluster_(cluster) {
  int port = 21000 + static_cast<int>(::getpid() % 200) * 50;
  for (int i = 0; i < count; ++i) {
    port = free_port(port);
    servers_.push_back({port++, 0});
    start(i);
  }
  for (int i = 0; i < count; ++i) {
    if (!wait_for(i, "PING", "PONG")) error_ = "redis-server does not answer";
  }
  if (!cluster || !error_.empty()) return;
  std::string create = "redis-cli --cluster create";
  for (const Server& server : servers_) {
    create += " 127.0.0.1:";
    create += std::to_string(server.port);
  }
  const std::string said = output_of(create + " --cluster-yes");
  for (int i = 0; i < count; ++i) {
    if (!wait_for(i, "CLUSTER INFO", "cluster_state:ok")) error_ = "no cluster: " + said;
  }
}

RedisServers::~RedisServers() {
  for (size_t i = 0; i < servers_.size(); ++i) kill(static_cast<int>(i));
}

std::string RedisServers::url() const {
  std::string url;
  for (const Server& server : servers_) {
    url += url.empty() ? "redis://127.0.0.1:" : ",127.0.0.1:";
    url += std::to_string(server.port);
  }
  return url;
}

std::string RedisServers::cli(int index, const std::string& command) const {
  std::string line("redis-cli -p ");
  line += std::to_string(servers_[index].port);
  line += ' ';
  line += command;
  return output_of(line);
}

bool RedisServers::wait_for(int index, const std::string& command,
                            const std::string& expected) const {
  for (int i = 0; i < 200; ++i) {
    if (cli(index, command).find(expected) != std::string::npos) return true;
    ::usleep(50000);
  }
  return false;
}

void RedisServers::kill(int index) {
  Server& server = servers_[index];
  if (server.pid <= 0) return;
  ::kill(server.pid, SIGKILL);
  ::waitpid(server.pid, nullptr, 0);
  server.pid = 0;
}

void RedisServers::start(int index) {
  Server& server = servers_[index];
  const std::string port = std::to_string(server.port);
  const std::string nodes = "nodes-" + port + ".conf";
  server.pid = ::fork();
  if (server.pid != 0) return;
  const int null = ::open("/dev/null", O_RDWR);
  ::dup2(null, 1);
  ::dup2(null, 2);
  if (::chdir(folder_.path().c_str()) != 0) ::_exit(1);
  ::execlp("redis-server", "redis-server", "--port", port.c_str(), "--bind", "127.0.0.1", "--save",
           "", "--appendonly", "no", "--cluster-enabled", cluster_ ? "yes" : "no",
           "--cluster-config-file", nodes.c_str(), "--cluster-node-timeout", "1000",
           "--cluster-require-full-coverage", "no", nullptr);
  ::_exit(1);
}

}  // namespace kvant::serve::testing
