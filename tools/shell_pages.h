// Completions for shells and the manual page, made from the commands' own option parsers: a new
// option is in them without further ado.
#pragma once

#include <string>

namespace kvant::tools {

// For /usr/share/bash-completion/completions/kvant.
std::string bash_completion();
// For a folder in zsh's fpath, as _kvant.
std::string zsh_completion();
// roff, for man1/kvant.1.
std::string manual_page();

}  // namespace kvant::tools
