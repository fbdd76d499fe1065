// What a reader of events knows of the cache: every page, by medium, group and key. Refuses what a
// router would refuse: a page stored twice, a child before its parent, a removal of what is not
// there.
#pragma once

#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "kvant/cache/page_events.h"

namespace kvant::cache::testing {

class TreeMirror final : public PageObserver {
 public:
  struct Page {
    PageKey parent{};
    std::vector<uint32_t> tokens;
    std::string salt;
    bool operator==(const Page&) const = default;
  };
  using Pages = std::map<std::tuple<Medium, int, PageKey>, Page>;

  void pages_stored(const StoredPages& stored) override {
    PageKey parent = stored.parent_key;
    const size_t t = stored.keys.empty() ? 0 : stored.token_ids.size() / stored.keys.size();
    if (stored.keys.empty()) fail("an empty run");
    for (size_t i = 0; i < stored.keys.size(); ++i) {
      // A page of any group names the parent: window groups may have dropped theirs.
      if (stored.window == 0 && parent != PageKey{} && !knows(stored.group, parent))
        fail("a page before its parent");
      const auto tokens = stored.token_ids.subspan(i * t, t);
      const bool fresh =
          pages_
              .emplace(std::tuple(stored.medium, stored.group, stored.keys[i]),
                       Page{parent, {tokens.begin(), tokens.end()}, std::string(stored.salt)})
              .second;
      if (!fresh) fail("a page stored twice");
      parent = stored.keys[i];
    }
    runs_.push_back(stored.keys.size());
  }

  void pages_removed(const RemovedPages& removed) override {
    for (const PageKey& key : removed.keys) {
      if (pages_.erase({removed.medium, removed.group, key}) == 0) fail("a removal of nothing");
    }
  }

  void all_cleared(Medium medium) override {
    std::erase_if(pages_, [&](const auto& page) { return std::get<0>(page.first) == medium; });
  }

  const Pages& pages() const { return pages_; }
  const std::vector<size_t>& runs() const { return runs_; }  // lengths, in order
  const std::string& error() const { return error_; }

 private:
  // At any medium.
  bool knows(int group, const PageKey& key) const {
    for (int medium = 0; medium < kNumMedia; ++medium) {
      if (pages_.contains({static_cast<Medium>(medium), group, key})) return true;
    }
    return false;
  }
  void fail(const std::string& what) {
    if (error_.empty()) error_ = what;
  }
  Pages pages_;
  std::vector<size_t> runs_;
  std::string error_;
};

}  // namespace kvant::cache::testing
