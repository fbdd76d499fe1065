// `kvant completion SHELL` and `kvant man`: what packages install beside the program.
#include <CLI/CLI.hpp>

#include <memory>
#include <string>

#include "tools/command.h"
#include "tools/shell_pages.h"

namespace kvant::tools {
namespace {

CommandBody define_completion(CLI::App& app) {
  auto shell = std::make_shared<std::string>();
  app.add_option("SHELL", *shell, "bash or zsh")->required()->check(CLI::IsMember({"bash", "zsh"}));
  return [shell](Console& console) {
    return console.print(*shell == "bash" ? bash_completion() : zsh_completion());
  };
}

CommandBody define_man(CLI::App&) {
  return [](Console& console) { return console.print(manual_page()); };
}

}  // namespace

const Command completion_command = {
    .name = "completion",
    .summary = "Completions for a shell, on standard output",
    .examples =
        "kvant completion bash > ~/.local/share/bash-completion/completions/kvant\n"
        "kvant completion zsh > ~/.zfunc/_kvant",
    .json = JsonOutput::kNone,
    .listed = false,
    .define = define_completion,
};

const Command man_command = {
    .name = "man",
    .summary = "The manual page, on standard output",
    .examples = "kvant man | man -l -",
    .json = JsonOutput::kNone,
    .listed = false,
    .define = define_man,
};

}  // namespace kvant::tools
