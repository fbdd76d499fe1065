// Runs the `kvant` program as a user does, for the end-to-end tests. Linux; single-thread.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

namespace kvant::testing {

struct ProgramResult {
  int exit_code = -1;  // 128 + signal if a signal ended it
  std::string out;
  std::string err;
};

struct ProgramOptions {
  std::string input;            // stdin
  std::string stdout_to;        // a file for stdout instead of ProgramResult::out, e.g. "/dev/full"
  int close_stdout_after = -1;  // closes the reading end of stdout after that many bytes; -1: never
  int interrupt_after_ms = -1;  // sends SIGINT after that time, with stdin still open; -1: never
  std::function<bool()> interrupt_when;  // sends SIGINT as soon as it is true, asked every 20 ms
  int timeout_ms = 300'000;              // then the program is killed and exit_code is 137
  std::vector<std::string> environment;  // "NAME=value", added
};

// Runs build/kvant (the path is compiled in) with `arguments`.
ProgramResult run_kvant(const std::vector<std::string>& arguments,
                        const ProgramOptions& options = {});

// The commands that `kvant --help` lists, from its text.
std::vector<std::string> command_names(const std::string& help);

// The model files that tests use: a name of scripts/fetch_model.sh ("smollm2", "gemma3", "qwen")
// gives the path in $KVANT_MODEL_DIR or models/, or "" if that model has not been fetched: skip the
// test then.
std::string model_path(const std::string& name);

}  // namespace kvant::testing
