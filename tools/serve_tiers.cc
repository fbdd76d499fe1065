#include "tools/serve_tiers.h"

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <memory>
#include <utility>

#include "kvant/serve/tiers/disk_store.h"
#include "kvant/serve/tiers/host_store.h"
#include "kvant/serve/tiers/redis_store.h"

namespace kvant::tools {

void add_tier_options(CLI::App& app, TierOptions& options) {
  const char* group = "Tiers";
  const auto policies = CLI::IsMember({"back", "through", "selective"});
  app.add_option("--host-cache", options.host_cache,
                 "Memory for pages that the cache has no room for (default: none)")
      ->type_name("SIZE")
      ->group(group);
  app.add_option("--disk-cache", options.disk_cache,
                 "Folder for such pages; the next start finds them there (default: none)")
      ->type_name("DIR")
      ->group(group);
  app.add_option("--disk-size", options.disk_size, "What they may take on the disk")
      ->type_name("SIZE")
      ->capture_default_str()
      ->group(group);
  app.add_option("--disk-write", options.disk_write,
                 "When a page is written: 'back' when it is evicted, 'through' when it is full, "
                 "'selective' when it has been asked for twice")
      ->check(policies)
      ->capture_default_str()
      ->group(group);
  app.add_option("--remote-cache", options.remote_cache,
                 "Redis, a server or a cluster, that several servers share (default: none)")
      ->type_name("redis://HOST[:PORT]")
      ->group(group);
  app.add_option("--remote-write", options.remote_write, "As --disk-write")
      ->check(policies)
      ->capture_default_str()
      ->group(group);
  app.add_option("--remote-hours", options.remote_hours, "How long a page stays in Redis")
      ->check(CLI::Range(0.01, 24.0 * 365))
      ->capture_default_str()
      ->group(group);
  app.add_flag("--load-always", options.load_always,
               "Load a page wherever it is, even where computing it is expected to be faster")
      ->group(group);
}

Result<std::vector<serve::TierSetup>> open_tiers(Console& console, const TierOptions& options) {
  std::vector<serve::TierSetup> tiers;
  const auto add = [&](std::unique_ptr<serve::PageStore> store, serve::WritePolicy policy) {
    serve::TierSetup setup;
    setup.store = std::move(store);
    setup.options.policy = policy;
    tiers.push_back(std::move(setup));
  };
  if (!options.host_cache.empty()) {
    KVANT_ASSIGN(const int64_t bytes, parse_bytes(options.host_cache));
    add(std::make_unique<serve::HostStore>(bytes), serve::WritePolicy::kWriteBack);
  }
  if (!options.disk_cache.empty()) {
    KVANT_ASSIGN(const int64_t bytes, parse_bytes(options.disk_size));
    KVANT_ASSIGN(const serve::WritePolicy policy, serve::parse_write_policy(options.disk_write));
    KVANT_ASSIGN(auto store, serve::DiskStore::open(options.disk_cache, bytes));
    const serve::DiskStore::Recovery& found = store->recovery();
    console.note(fmt::format("{}: {} pages from earlier, {} damaged ones dropped",
                             options.disk_cache, found.pages, found.bad_slots));
    if (found.bad_files > 0) {
      console.warn(fmt::format(
          "{}: {} files are not slab files of this version or are damaged at their beginning; "
          "pages of their size are not kept until you remove them",
          options.disk_cache, found.bad_files));
    }
    add(std::move(store), policy);
  }
  if (!options.remote_cache.empty()) {
    KVANT_ASSIGN(const serve::WritePolicy policy, serve::parse_write_policy(options.remote_write));
    const auto seconds = static_cast<int64_t>(options.remote_hours * 3600);
    KVANT_ASSIGN(auto store, serve::RedisStore::create(options.remote_cache, seconds));
    if (const Status answers = store->check(); !answers) {
      console.warn(fmt::format("{}: {}; going on without it until it answers", options.remote_cache,
                               answers.error().message()));
    }
    add(std::move(store), policy);
  }
  return tiers;
}

}  // namespace kvant::tools
