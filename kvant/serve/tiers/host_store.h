// Pages in host memory, least recently used out first. Single-thread.
#pragma once

#include <list>
#include <unordered_map>
#include <vector>

#include "kvant/serve/tiers/page_store.h"

namespace kvant::serve {

class HostStore final : public PageStore {
 public:
  explicit HostStore(int64_t limit_bytes) : limit_bytes_(limit_bytes) {}

  cache::Medium medium() const override { return cache::Medium::kHost; }
  Result<ObjectBytes> get(const PageName& name) override;
  Result<Put> put(const PageName& name, const ObjectBytes& object) override;
  bool contains(const PageName& name) override { return pages_.contains(name); }
  void remove(const PageName& name) override;
  Status clear() override;
  StoreUsage usage() const override {
    return {static_cast<int64_t>(pages_.size()), bytes_, limit_bytes_};
  }
  std::vector<EvictedPage> take_evicted() override { return std::exchange(evicted_, {}); }

 private:
  struct Page {
    ObjectBytes object;
    std::list<PageName>::iterator use;
  };
  const int64_t limit_bytes_;
  int64_t bytes_ = 0;
  std::unordered_map<PageName, Page, PageNameHash> pages_;
  std::list<PageName> uses_;  // least recently used first
  std::vector<EvictedPage> evicted_;
};

}  // namespace kvant::serve
