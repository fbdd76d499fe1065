// Real redis-server processes for tests, in a folder of their own, gone at the end.
#pragma once

#include <string>
#include <vector>

#include "kvant/serve/tiers/testing/test_pages.h"

namespace kvant::serve::testing {

class RedisServers {
 public:
  static bool installed();
  // One server, or the masters of a cluster that owns all slots. Empty error(): they answer.
  RedisServers(int count, bool cluster);
  ~RedisServers();

  const std::string& error() const { return error_; }
  std::string url() const;
  int port(int index) const { return servers_[index].port; }
  // What redis-cli prints for a command to one server, without the line's end.
  std::string cli(int index, const std::string& command) const;
  void kill(int index);
  void start(int index);

 private:
  struct Server {
    int port = 0;
    int pid = 0;
  };
  bool wait_for(int index, const std::string& command, const std::string& expected) const;
  TemporaryFolder folder_;
  std::vector<Server> servers_;
  bool cluster_ = false;
  std::string error_;
};

}  // namespace kvant::serve::testing
