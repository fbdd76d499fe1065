// Where `kvant serve` keeps pages that its cache has no room for: the options, and opening what
// they name.
#pragma once

#include <string>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/serve/tiers/page_tiers.h"
#include "tools/cli_support.h"

namespace CLI {
class App;
}

namespace kvant::tools {

struct TierOptions {
  std::string host_cache;  // size; empty: none
  std::string disk_cache;  // folder; empty: none
  std::string disk_size = "16GiB";
  std::string disk_write = "back";
  std::string remote_cache;  // redis://host:port; empty: none
  std::string remote_write = "through";
  double remote_hours = 24;
  bool load_always = false;

  bool any() const { return !host_cache.empty() || leaves_process(); }
  // Others, or this server's next start, may read the pages.
  bool leaves_process() const { return !disk_cache.empty() || !remote_cache.empty(); }
};

void add_tier_options(CLI::App& app, TierOptions& options);

// From near to far. Says on `console` what was found on the disk, and if nobody answers at the
// remote end, which is no error.
Result<std::vector<serve::TierSetup>> open_tiers(Console& console, const TierOptions& options);

}  // namespace kvant::tools
