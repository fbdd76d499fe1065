// Pages in a Redis server or cluster that several servers share: one key for each page object, with
// the page key as its hash tag, so that the objects of one page lie on one node. Values expire; the
// server's own eviction (allkeys-lru) bounds its memory. Single-thread.
#pragma once

#include <memory>
#include <string>

#include "kvant/serve/tiers/page_store.h"
#include "kvant/serve/tiers/redis_client.h"

namespace kvant::serve {

class RedisStore final : public PageStore {
 public:
  // kInvalidArgument for a bad URL; a server that does not answer is no error, but misses.
  static Result<std::unique_ptr<RedisStore>> create(std::string_view url,
                                                    int64_t lifetime_seconds = 24 * 3600,
                                                    const RedisOptions& options = {});
  // Whether a node answers, for a word to the user at start.
  Status check() { return client_.check(); }
  const RedisClient::Stats& client_stats() const { return client_.stats(); }
  // kvant:{<key in hex>}:<group>
  static std::string redis_key(const PageName& name);

  cache::Medium medium() const override { return cache::Medium::kRemote; }
  Result<ObjectBytes> get(const PageName& name) override;
  Result<Put> put(const PageName& name, const ObjectBytes& object) override;
  bool contains(const PageName& name) override;
  void remove(const PageName& name) override;
  // Others use the pages as well: they stay.
  Status clear() override { return {}; }
  StoreUsage usage() const override { return {}; }
  std::vector<Result<ObjectBytes>> get_many(std::span<const PageName> names) override;
  std::vector<Held> contains_many(std::span<const PageName> names) override;

 private:
  RedisStore(RedisUrl url, int64_t lifetime_seconds, const RedisOptions& options)
      : client_(std::move(url), options), lifetime_ms_(lifetime_seconds * 1000) {}
  // The same command for every name.
  std::vector<Result<RedisReply>> each(std::string_view command, std::span<const PageName> names);

  RedisClient client_;
  const int64_t lifetime_ms_;
};

}  // namespace kvant::serve
