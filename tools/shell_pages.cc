#include "tools/shell_pages.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <string_view>
#include <utility>
#include <vector>

#include "kvant/formats/spec.h"
#include "tools/command_app.h"

namespace kvant::tools {
namespace {

// One option of a command, as pages need it.
struct OptionFacts {
  std::vector<std::string> names;  // "-p", "--prompt"; empty: a positional
  std::string positional;          // its name, if it is one
  std::string help;
  bool takes_value = false;
};

struct CommandFacts {
  std::string name;  // "bench model"
  std::string summary;
  std::string examples;  // lines; of the whole command
  std::vector<OptionFacts> options;
};

OptionFacts facts_of(const CLI::Option& option) {
  OptionFacts facts;
  for (const std::string& name : option.get_snames()) facts.names.push_back("-" + name);
  for (const std::string& name : option.get_lnames()) facts.names.push_back("--" + name);
  if (facts.names.empty()) facts.positional = option.get_name(true);
  facts.help = option.get_description();
  facts.takes_value = option.get_items_expected_max() > 0;
  return facts;
}

std::vector<OptionFacts> options_of(const CLI::App& app) {
  std::vector<OptionFacts> all;
  for (const CLI::Option* option : app.get_options()) {
    if (!option->get_group().empty()) all.push_back(facts_of(*option));  // no group: hidden
  }
  return all;
}

// Commands and nested commands; a nested one also takes the options of its command.
std::vector<CommandFacts> all_facts() {
  std::vector<CommandFacts> all;
  for (const Command* command : commands()) {
    if (!command->listed) continue;
    const ParsedCommand parsed(*command);
    const std::string name(command->name), examples(command->examples);
    const std::vector<OptionFacts> own = options_of(parsed.app);
    all.push_back({name, std::string(command->summary), examples, own});
    for (const CLI::App* nested :
         parsed.app.get_subcommands([](const CLI::App*) { return true; })) {
      std::vector<OptionFacts> options = options_of(*nested);
      for (const OptionFacts& option : own) {
        const auto same = [&](const OptionFacts& other) { return other.names == option.names; };
        if (!option.names.empty() && std::none_of(options.begin(), options.end(), same)) {
          options.push_back(option);
        }
      }
      all.push_back({name + " " + nested->get_name(), nested->get_description(), "", options});
    }
  }
  return all;
}

bool is_nested(const CommandFacts& command) {
  return command.name.find(' ') != std::string::npos;
}

std::string top_names() {
  std::string names;
  for (const CommandFacts& command : all_facts()) {
    if (!is_nested(command)) names += (names.empty() ? "" : " ") + command.name;
  }
  return names + " help";
}

std::string nested_names(std::string_view command) {
  std::string names;
  for (const CommandFacts& other : all_facts()) {
    if (other.name.starts_with(std::string(command) + " ")) {
      names += (names.empty() ? "" : " ") + other.name.substr(command.size() + 1);
    }
  }
  return names;
}

// What may follow an option, where that is a list; "" for anything else.
std::string known_values(const OptionFacts& option) {
  const auto named = [&](const char* name) {
    return std::find(option.names.begin(), option.names.end(), name) != option.names.end();
  };
  std::string values;
  const auto add = [&](std::string_view value) {
    if (!values.empty()) values += ' ';
    values += value;
  };
  if (named("--kv")) {
    for (const formats::Preset& preset : formats::all_presets()) add(preset.name);
    for (const formats::FormatInfo& format : formats::all_formats()) {
      // Bases that need both sides named are not formats of their own.
      if (formats::parse_cache_format(format.name)) add(format.name);
    }
  } else if (named("--device")) {
    values = "cpu cuda reference";
  } else if (named("--page-tokens")) {
    values = "16 32 64 128";
  }
  return values;
}

std::string replace_all(std::string text, std::string_view what, std::string_view by) {
  for (size_t at = 0; (at = text.find(what, at)) != std::string::npos; at += by.size()) {
    text.replace(at, what.size(), by);
  }
  return text;
}

// ---- zsh ----

// In a specification inside single quotes.
std::string zsh_text(std::string text) {
  text = replace_all(std::move(text), "'", "'\\''");
  for (const char* special : {"[", "]", ":"}) {
    text = replace_all(std::move(text), special, std::string("\\") + special);
  }
  return replace_all(std::move(text), "\n", " ");
}

std::string zsh_specification(const OptionFacts& option, const std::string& name) {
  const std::string values = known_values(option);
  std::string text = fmt::format("{}[{}]", name, zsh_text(option.help));
  if (!option.takes_value) return text;
  return text + (values.empty() ? ":value:_files" : fmt::format(":value:({})", zsh_text(values)));
}

std::string zsh_function(const CommandFacts& command) {
  std::string text =
      fmt::format("    ({})\n      _arguments -s \\\n", replace_all(command.name, " ", "\\ "));
  for (const OptionFacts& option : command.options) {
    for (const std::string& name : option.names) {
      text += fmt::format("        '*{}' \\\n", zsh_specification(option, name));
    }
  }
  const std::string nested = nested_names(command.name);
  text += nested.empty() ? "        '*:file:_files'\n"
                         : fmt::format("        '1:command:({})' '*:file:_files'\n", nested);
  return text + "      ;;\n";
}

// ---- roff ----

std::string roff(std::string text) {
  text = replace_all(std::move(text), "\\", "\\e");
  text = replace_all(std::move(text), "-", "\\-");
  if (text.starts_with(".") || text.starts_with("'")) text = "\\&" + text;
  return replace_all(std::move(text), "\n", "\n.br\n");
}

std::string roff_option(const OptionFacts& option) {
  std::string names;
  for (const std::string& name : option.names) {
    if (!names.empty()) names += ", ";
    names += "\\fB" + roff(name) + "\\fR";
  }
  if (option.names.empty()) names = "\\fI" + roff(option.positional) + "\\fR";
  if (option.takes_value && !option.names.empty()) names += " \\fIVALUE\\fR";
  return fmt::format(".TP\n{}\n{}\n", names, roff(option.help));
}

std::string roff_command(const CommandFacts& command) {
  std::string text =
      fmt::format(".SS \"kvant {}\"\n{}.\n", roff(command.name), roff(command.summary));
  for (const OptionFacts& option : command.options) {
    if (is_nested(command) && option.names.size() == 1 &&
        (option.names[0] == "--json" || option.names[0] == "--quiet")) {
      continue;  // with its command
    }
    text += roff_option(option);
  }
  if (command.examples.empty()) return text;
  return text + ".PP\nExamples:\n.PP\n.nf\n.RS\n" +
         replace_all(roff(command.examples), "\n.br\n", "\n") + "\n.RE\n.fi\n";
}

}  // namespace

std::string bash_completion() {
  std::string text =
      "# bash completion for kvant; made by `kvant completion bash`\n"
      "_kvant() {\n"
      "  local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]}\n"
      "  local command=${COMP_WORDS[1]} nested=${COMP_WORDS[2]} words=''\n"
      "  COMPREPLY=()\n"
      "  if [ \"$COMP_CWORD\" -eq 1 ]; then\n";
  text += fmt::format(
      "    mapfile -t COMPREPLY < <(compgen -W '{} --help --version' -- \"$current\")\n",
      top_names());
  text += "    return\n  fi\n  case $previous in\n";
  std::map<std::string, std::string> values;  // by option
  for (const CommandFacts& command : all_facts()) {
    for (const OptionFacts& option : command.options) {
      for (const std::string& name : option.names) {
        if (!known_values(option).empty()) values[name] = known_values(option);
      }
    }
  }
  for (const auto& [name, list] : values) {
    text += fmt::format(
        "    {}) mapfile -t COMPREPLY < <(compgen -W '{}' -- \"$current\"); return ;;\n", name,
        list);
  }
  text += "  esac\n  case \"$command $nested\" in\n";
  // Nested commands first: their pattern is the narrower one.
  const std::vector<CommandFacts> all = all_facts();
  for (const bool nested : {true, false}) {
    for (const CommandFacts& command : all) {
      if (is_nested(command) != nested) continue;
      std::string words = "--help";
      for (const OptionFacts& option : command.options) {
        for (const std::string& name : option.names) {
          if (name != "--help") words += " " + name;
        }
      }
      const std::string inner = nested_names(command.name);
      text += nested ? fmt::format("    '{}') words='{}' ;;\n", command.name, words)
                     : fmt::format("    '{} '*) words='{}{}{}' ;;\n", command.name, words,
                                   inner.empty() ? "" : " ", inner);
    }
  }
  text += fmt::format("    'help '*) words='{}' ;;\n", top_names());
  return text +
         "  esac\n"
         "  mapfile -t COMPREPLY < <(compgen -W \"$words\" -- \"$current\")\n"
         "  case $current in -*) return ;; esac\n"
         "  local file\n"
         "  while IFS= read -r file; do COMPREPLY+=(\"$file\"); done < <(compgen -f -- "
         "\"$current\")\n"
         "  compopt -o filenames 2>/dev/null\n"
         "}\n"
         "complete -F _kvant kvant\n";
}

std::string zsh_completion() {
  const std::vector<CommandFacts> all = all_facts();
  std::string text =
      "#compdef kvant\n# made by `kvant completion zsh`\n\n_kvant() {\n  local -a commands\n"
      "  commands=(\n";
  for (const CommandFacts& command : all) {
    if (is_nested(command)) continue;
    text += fmt::format("    '{}:{}'\n", command.name, zsh_text(command.summary));
  }
  text +=
      "  )\n  if (( CURRENT == 2 )); then\n    _describe command commands\n    return\n  fi\n"
      "  local command=$words[2]\n  shift words\n  (( CURRENT-- ))\n"
      "  if (( CURRENT > 2 )); then\n    case \"$command $words[2]\" in\n";
  std::string list;
  for (const CommandFacts& command : all) {
    if (is_nested(command))
      list += (list.empty() ? "" : "|") + replace_all(command.name, " ", "\\ ");
  }
  text += fmt::format(
      "      ({})\n        command=\"$command $words[2]\"; shift words; (( CURRENT-- )) ;;\n"
      "    esac\n  fi\n  case $command in\n",
      list);
  for (const CommandFacts& command : all) text += zsh_function(command);
  return text + "  esac\n}\n\n_kvant \"$@\"\n";
}

std::string manual_page() {
  std::string text = fmt::format(
      ".\\\" made by `kvant man`\n.TH KVANT 1 \"\" \"kvant {}\" \"User commands\"\n"
      ".SH NAME\nkvant \\- language models with a key/value cache of 2 to 8 bits\n"
      ".SH SYNOPSIS\n.B kvant\n.I COMMAND\n.RI [ OPTIONS ]\n"
      ".SH DESCRIPTION\nkvant runs language models with a quantised key/value cache and computes\n"
      "attention directly on the quantised bytes, on CPUs and NVIDIA GPUs.\n"
      "Results go to standard output, messages to standard error.\n.SH COMMANDS\n",
      KVANT_VERSION);
  for (const CommandFacts& command : all_facts()) text += roff_command(command);
  text += ".SH \"EXIT STATUS\"\n";
  const std::pair<int, const char*> codes[] = {
      {kExitOk, "success, or the reader of the output went away"},
      {kExitUsage, "a wrong command, option, format string or value"},
      {kExitData, "a file's bytes are not what they claim to be"},
      {kExitNoInput, "a file, tensor or name does not exist"},
      {kExitUnavailable, "well-formed, but not supported by this build or machine"},
      {kExitSoftware, "a bug in kvant"},
      {kExitOs, "the accelerator or its driver failed"},
      {kExitIo, "reading or writing failed"},
      {kExitTempFail, "out of memory or pages: try again with less"},
      {kExitInterrupted, "ended by Ctrl-C"}};
  for (const auto& [code, meaning] : codes) {
    text += fmt::format(".TP\n.B {}\n{}\n", code, roff(meaning));
  }
  return text +
         ".SH ENVIRONMENT\n.TP\n.B KVANT_CPU_LEVEL\n"
         "the SIMD level to use at most: scalar, avx2, avx512 or amx\n";
}

}  // namespace kvant::tools
