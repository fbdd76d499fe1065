// The tiers below the prefix tree, from near to far: what is written to which, and what is loaded
// instead of computed.
//
// The engine thread calls everything (single-thread); tiers work on threads of their own. The tree
// reports pages here (PageListener); a request asks for what the tree lacks with `prefetch` when it
// is queued, and `install` puts what has come by then into the tree. Host memory keeps pages in the
// cache's own layout, disk and remote stores in the planar one.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kvant/cache/eviction_policy.h"
#include "kvant/cache/kv_cache.h"
#include "kvant/cache/page_events.h"
#include "kvant/cache/prefix_tree.h"
#include "kvant/serve/tiers/tier.h"

namespace kvant::serve {

struct TierSetup {
  std::unique_ptr<PageStore> store;
  TierOptions options;
};

struct PrefetchRequest {
  int64_t first_page = 0;       // pages before it are in the tree
  cache::PageKey parent_key{};  // key of the page before it
  std::vector<int32_t> tokens;  // whole pages from first_page on
  std::string salt;
};

struct PrefetchStats {
  int64_t prefetches = 0;
  int64_t skipped_by_cost = 0;                           // computing was expected to be faster
  int64_t failed_pages = 0;                              // promised by a tier and not delivered
  std::array<int64_t, cache::kNumMedia> late_answers{};  // by medium: nobody waited for them
  std::array<int64_t, cache::kNumMedia> loaded_pages{};  // by medium
  std::array<int64_t, cache::kNumMedia> loaded_tokens{};
};

class PageTiers final : public cache::PageListener {
 public:
  PageTiers(cache::KvCache& cache, std::vector<TierSetup> tiers);
  ~PageTiers() override;

  // Not owned, may be null. Told at once of the pages that tiers kept from earlier, where their
  // parents were kept too. A page is told when it is given to a tier, while its parent is known,
  // and taken back should the tier fail; a page whose parent is gone from everywhere is of no use
  // to anybody and not told. Pages in remote stores are not told: others write and expire them.
  // Each page is told with the salt of its sequence, as the tree tells it. A store does not keep
  // salts: what a sequence of a salt that is not known left there from earlier is told once a
  // request of that salt finds it.
  void set_observer(cache::PageObserver* observer);
  // Salts of sequences that tiers may have kept from earlier, those without one apart; before
  // set_observer.
  void set_known_salts(std::vector<std::string> salts) { known_salts_ = std::move(salts); }
  // Called on tiers' threads when poll has something to do.
  void set_wakeup(const std::function<void()>& wakeup);
  // What computing costs, against which loading is judged; without it everything found is loaded.
  void set_costs(const cache::EvictionCosts& costs) { costs_ = costs; }

  // ---- from the tree ----
  void page_inserted(const cache::TreePage& page) override;
  void page_hit(const cache::TreePage& page) override;
  void page_evicted(const cache::TreePage& page, cache::EvictionCause cause, int group) override;
  // Offers every page of the tree to the nearest tier that outlives the process, before a planned
  // stop.
  void store_all(const cache::PrefixTree& tree);

  // ---- loading ----
  using PrefetchId = uint64_t;
  // Asks all tiers for the pages, and loads the longest run of them from which a sequence can go
  // on, if that is expected to be faster than computing it.
  PrefetchId prefetch(PrefetchRequest request);
  bool ready(PrefetchId id) const;
  // Pages that are being loaded or have come.
  int64_t expected_pages(PrefetchId id) const;
  // Ends a prefetch. Puts the pages that have come into the tree behind the lease, which is
  // extended over them, and evicts others for them. Returns how many. A page that does not fit ends
  // it: then match again, as window groups may lack pages at that length.
  int64_t install(PrefetchId id, cache::PrefixTree& tree, cache::PrefixLease& lease);
  void cancel(PrefetchId id);
  // The same because it takes too long: counts what has not come as late.
  void give_up(PrefetchId id);

  // Takes in what tiers have done; once a step.
  void poll();
  // Until all tiers are idle and everything is taken in; for tests and a planned stop.
  void wait_idle();
  Status clear();

  int num_tiers() const { return static_cast<int>(tiers_.size()); }
  const Tier& tier(int index) const { return *tiers_[index]; }
  const PrefetchStats& prefetch_stats() const { return stats_; }

 private:
  struct Prefetch {
    PrefetchRequest request;
    std::vector<cache::PageKey> keys;  // [pages]
    std::vector<int> source;           // [pages][groups]: tier, -1: none
    std::vector<ObjectBytes> objects;  // [pages][groups]
    int64_t num_pages = 0;             // to load
    int probes_left = 0;
    int64_t gets_left = 0;
    std::vector<int64_t> answers_left;  // [tiers]: both
    bool ready() const { return probes_left == 0 && gets_left == 0; }
  };

  int num_groups() const { return cache_.num_groups(); }
  PageName name(const Prefetch& prefetch, int64_t index) const {
    return {prefetch.keys[index / num_groups()], static_cast<uint32_t>(index % num_groups())};
  }
  // The largest number of pages, at most `limit`, for which `has(page, group)` holds wherever a
  // sequence of that length reads.
  template <typename Has>
  int64_t usable_pages(const Prefetch& prefetch, int64_t limit, Has has) const;
  bool is_read(const Prefetch& prefetch, int64_t page, int group, int64_t num_pages) const;
  int64_t object_bytes(int64_t page, int group) const;
  void choose(uint64_t id, Prefetch& prefetch);
  bool make_room(cache::PrefixTree& tree, std::span<const std::span<const std::byte>> objects,
                 int64_t page) const;
  void offer(const cache::TreePage& page, std::span<const size_t> tiers, int group);
  // Gives an object to a tier unless that has it; `salt` of its sequence, where it is known.
  void give(size_t tier, const PageName& name, const ObjectBytes& object,
            std::optional<std::string_view> salt);
  void forget(size_t tier, const PageName& name);
  std::optional<std::string> known_salt(const cache::PageObjectHeader& header) const;
  // The salt of the page before it, if that is known: in the tree or in a tier.
  std::optional<std::string> parent_salt(const cache::PageKey& parent_key, uint32_t group) const;
  void take_in(size_t tier, Tier::Completion completion);
  // Tells that the tier holds a page, unless it has been told, or its salt or parent is unknown.
  // `root_salt` of a page that begins a sequence: without it, the known one that the key speaks of.
  void tell_stored(size_t tier, const cache::PageObjectHeader& header,
                   std::optional<std::string_view> root_salt);
  void tell_found(size_t tier, const Prefetch& prefetch, const std::vector<bool>& found);

  cache::KvCache& cache_;
  std::vector<std::unique_ptr<Tier>> tiers_;
  struct KeyHash {
    size_t operator()(const cache::PageKey& key) const { return PageNameHash()({key, 0}); }
  };
  std::unordered_map<cache::PageKey, std::string, KeyHash> in_tree_;  // to its salt
  // What tiers but remote ones hold or were given, as told to the observer, and its salt: [tiers].
  std::vector<std::unordered_map<PageName, std::string, PageNameHash>> held_;
  std::vector<std::pair<size_t, cache::PageObjectHeader>> kept_;  // from earlier, not yet told
  std::vector<std::string> known_salts_;
  cache::PageObserver* observer_ = nullptr;
  cache::EvictionCosts costs_{.token_seconds = 0, .token_context_seconds = 0};
  std::map<PrefetchId, Prefetch> prefetches_;
  PrefetchId next_id_ = 1;
  PrefetchStats stats_;
};

}  // namespace kvant::serve
