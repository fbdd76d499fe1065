// The prefix cache: closed pages under the token ids that made them, for sequences to share.
//
// A node is one closed page of every layer group (a window group's may be gone), named by its page
// key and found by its tokens, which are compared and not only hashed. Requests of one salt
// (tenant) see only pages of that salt. Used by the engine thread only (single-thread), beside the
// KvCache whose pages it holds and that must outlive it.
//
// A request's way: match, acquire (its lease keeps the path), make_room, attach, then insert after
// steps that closed pages; the lease's end gives the path back to eviction, tail first.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/cache/eviction_policy.h"
#include "kvant/cache/fingerprint.h"
#include "kvant/cache/kv_cache.h"
#include "kvant/cache/page_events.h"

namespace kvant::cache {

class PrefixTree;

struct PrefixTreeOptions {
  EvictionPolicy policy = EvictionPolicy::kLru;
  EvictionCosts costs = {};
};

// A path from the root that a request may use. Valid until the tree next changes: acquire it.
struct PrefixMatch {
  int32_t node = -1;  // its last page; -1: nothing matched
  uint32_t generation = 0;
  int64_t num_pages = 0;
};

// Keeps a path of the tree from being evicted. Gives it back when destroyed, before the tree.
class PrefixLease {
 public:
  PrefixLease() = default;
  PrefixLease(PrefixLease&& other) noexcept { swap(other); }
  PrefixLease& operator=(PrefixLease&& other) noexcept {
    PrefixLease(std::move(other)).swap(*this);
    return *this;
  }
  ~PrefixLease();
  int64_t num_pages() const { return num_pages_; }

 private:
  friend class PrefixTree;
  void swap(PrefixLease& other) noexcept {
    std::swap(tree_, other.tree_);
    std::swap(node_, other.node_);
    std::swap(num_pages_, other.num_pages_);
  }
  PrefixTree* tree_ = nullptr;
  int32_t node_ = -1;
  int64_t num_pages_ = 0;
};

// Why pages left the tree.
enum class EvictionCause {
  kPages,    // room for other pages
  kSink,     // room for another BF16 first page: its whole subtree goes
  kWindow,   // a window group's page alone; the node stays
  kCleared,  // clear()
};
inline constexpr int kNumEvictionCauses = 4;
std::string_view eviction_cause_name(EvictionCause cause);

struct PrefixTreeStats {
  int64_t queries = 0, query_tokens = 0, hit_tokens = 0;  // count_query
  int64_t hits = 0;                                       // queries with a token hit
  int64_t inserted_pages = 0;                             // nodes
  std::array<int64_t, kNumEvictionCauses> evicted{};      // nodes; kWindow: pages
  int64_t nodes = 0, leased_nodes = 0, bytes = 0;         // now
};

// A node, for listeners; valid during the call.
struct TreePage {
  PageKey key;
  PageKey parent_key;
  std::span<const uint32_t> token_ids;
  const HeldPage& held;
  std::string_view salt;
  int64_t hits;  // requests that were served from it
};

// Lower tiers: which pages are worth keeping elsewhere. Must not change the tree.
class PageListener {
 public:
  virtual ~PageListener() = default;
  virtual void page_inserted(const TreePage& page) = 0;
  virtual void page_hit(const TreePage& page) = 0;
  // Before its memory is given back: that of one layer group with kWindow, of all otherwise (-1).
  virtual void page_evicted(const TreePage& page, EvictionCause cause, int group) = 0;
};

class PrefixTree {
 public:
  // kUnsupported with +recentN: no sequence can go on from its closed pages (codecs.md section 3).
  static Result<std::unique_ptr<PrefixTree>> create(KvCache& cache,
                                                    const PrefixTreeOptions& options = {});
  ~PrefixTree();

  // Neither is owned; null: none.
  void set_observer(PageObserver* observer);
  void set_listener(PageListener* listener);
  // The tree's clock, seconds, never backwards; once a step is enough.
  void set_time(double seconds);
  void set_costs(const EvictionCosts& costs);

  // The longest prefix of whole pages, at most `max_tokens` long, that a sequence can go on from:
  // every full-attention page, and the pages that each window group needs there. Give at most
  // tokens.size() - 1, as the last token of a prompt must be computed for its logits. O(pages).
  PrefixMatch match(std::span<const int32_t> tokens, std::string_view salt,
                    int64_t max_tokens) const;
  // Counts one request: what it asked for and what it got. Not for resumed ones.
  void count_query(int64_t query_tokens, int64_t hit_tokens);
  // Zeros for a match of nothing: the parent key of a first page.
  PageKey key(const PrefixMatch& match) const;
  PageKey key(const PrefixLease& lease) const;

  PrefixLease acquire(const PrefixMatch& match);
  PrefixLease share(const PrefixLease& lease);  // for a fork of the sequence
  // Shares the leased pages from the sequence's length on with it.
  Status attach(const PrefixLease& lease, SequenceId id);
  // Adds every closed page of the sequence that the tree lacks, and extends the lease over them;
  // where the tree has the page already, its copy stays. `tokens` are those of the sequence, at
  // least as many as it holds. O(new pages).
  Status insert(PrefixLease& lease, SequenceId id, std::span<const int32_t> tokens,
                std::string_view salt, const Retention& retention = {});
  // The same for the page right behind the lease, loaded from elsewhere.
  Status insert_held(PrefixLease& lease, HeldPage page, std::span<const int32_t> page_tokens,
                     std::string_view salt, const Retention& retention = {});
  // Gives pages back from the tail, for a sequence truncated into them.
  void truncate(PrefixLease& lease, int64_t num_pages);

  // Gives pages back until `num_free` of the class are free; false if that cannot be reached.
  // Leaves first, never a leased page. O(log n) each.
  bool evict(int page_class, int64_t num_free);
  // The same for every class; `needed` as of KvCache::needed_pages.
  bool make_room(std::span<const int64_t> needed);
  // Pages of the class that evict could free, at least: of a window group perhaps more.
  int64_t evictable_pages(int page_class) const;
  // Forgets everything; kInvalidArgument while leases are out.
  Status clear();

  PrefixTreeStats stats() const;
  int64_t group_pages(int group) const;  // pages of one layer group that the tree holds
  // Calls `visit` for every page, parents before children.
  template <typename Visit>
  void for_each_page(Visit visit) const {
    for (const int32_t node : in_order()) visit(page(node));
  }
  // kInternal names the first violation: links, keys, order of eviction, counts, held pages.
  Status check_invariants() const;

 private:
  friend class PrefixLease;
  PrefixTree() = default;
  std::vector<int32_t> in_order() const;
  TreePage page(int32_t node) const;
  void release(PrefixLease& lease);
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvant::cache
