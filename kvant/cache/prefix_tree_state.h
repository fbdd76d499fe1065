// The inside of PrefixTree, shared by prefix_tree*.cc only.
#pragma once

#include <array>
#include <map>
#include <set>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kvant/cache/prefix_tree.h"

namespace kvant::cache {

struct TreeNode {
  bool used = false;
  int32_t parent = -1;  // -1: a child of its root
  int32_t root = -1;
  int32_t first_child = -1, next_sibling = -1, previous_sibling = -1;
  int32_t leases = 0;       // leases whose path the node is on
  uint32_t generation = 0;  // how often the index was given back
  uint64_t token_hash = 0;
  PageKey key{};
  HeldPage page;
  int64_t hits = 0;
  // Of the last use; what the order of eviction is made from.
  double last_use = 0;
  uint64_t stamp = 0;
  int priority = Retention::kDefaultPriority;
  double expires = std::numeric_limits<double>::infinity();
  EvictionOrder order;  // under which it is listed
  bool in_leaves = false, in_tops = false;
};

// A window group's page of a node: it can be evicted alone.
struct WindowEntry {
  EvictionOrder order;
  bool listed = false;
};

struct TreeRoot {
  std::string salt;
  int32_t first_child = -1;
};

// Where a node's page comes from: a sequence that still has it, or a held page.
struct PageSource {
  SequenceId sequence = -1;
  HeldPage* held = nullptr;
  Retention retention;
};

class StoredRuns;

struct PrefixTree::State {
  // Nodes in the order in which they are evicted.
  using Order = std::set<std::pair<EvictionOrder, int32_t>>;
  // Which full-attention pages a node frees: with +sink the first page's are of another class.
  enum Kind { kFirst = 0, kRest = 1 };

  KvCache* cache = nullptr;
  PrefixTreeOptions options;
  PageObserver* observer = nullptr;
  PageListener* listener = nullptr;
  double now = 0;
  uint64_t stamps = 0;
  bool has_sink = false;
  std::vector<int> full_groups, window_groups;

  std::vector<TreeNode> nodes;
  std::vector<uint32_t> tokens;      // [nodes][page_tokens]
  std::vector<WindowEntry> windows;  // [nodes][groups]
  std::vector<int32_t> free_nodes;
  std::vector<TreeRoot> roots;
  std::vector<int32_t> free_roots;
  std::map<std::string, int32_t, std::less<>> root_of;
  std::unordered_multimap<uint64_t, int32_t> children;  // by hash of parent and tokens

  std::array<Order, 2> leaves;      // by Kind: unleased nodes without children
  Order tops;                       // with has_sink: unleased first pages; their subtrees are too
  std::vector<Order> window_pages;  // [groups]
  std::set<std::pair<double, int32_t>> expiries;

  PrefixTreeStats stats;
  std::array<int64_t, 2> idle{};              // unleased nodes by Kind
  std::vector<int64_t> group_pages;           // [groups]: held
  std::vector<int64_t> idle_pages;            // [groups]: of unleased nodes
  std::vector<std::vector<PageKey>> removed;  // [groups]: not yet told to the observer

  int page_tokens() const { return cache->config().page_tokens; }
  int num_groups() const { return cache->num_groups(); }
  int window(int group) const { return cache->group(group).geometry.window; }
  Kind kind(int32_t node) const {
    return has_sink && nodes[node].page.page() == 0 ? kFirst : kRest;
  }
  std::span<const uint32_t> tokens_of(int32_t node) const {
    return std::span(tokens).subspan(static_cast<size_t>(node) * page_tokens(), page_tokens());
  }
  WindowEntry& window_entry(int32_t node, int group) {
    return windows[static_cast<size_t>(node) * num_groups() + group];
  }
  const WindowEntry& window_entry(int32_t node, int group) const {
    return windows[static_cast<size_t>(node) * num_groups() + group];
  }
  PageKey parent_key(int32_t node) const {
    return nodes[node].parent < 0 ? PageKey{} : nodes[nodes[node].parent].key;
  }
  std::string_view salt_of(int32_t node) const { return roots[nodes[node].root].salt; }
  int64_t page_bytes(int32_t node, int group) const {
    return cache->page_class(nodes[node].page.page_class(group)).page_bytes;
  }
  int64_t node_bytes(int32_t node) const;
  TreePage page(int32_t node) const;

  // ---- finding ----
  static uint64_t child_code(int32_t parent, int32_t root) {
    return parent >= 0 ? static_cast<uint64_t>(parent) : ~static_cast<uint64_t>(root);
  }
  static uint64_t child_hash(uint64_t code, uint64_t token_hash);
  static uint64_t hash_tokens(std::span<const uint32_t> page);
  int32_t find_root(std::string_view salt) const;  // -1: none
  int32_t find_child(int32_t parent, int32_t root, std::span<const uint32_t> page) const;

  // ---- changing ----
  int32_t root_for(std::string_view salt);
  // A leaf under `parent`, with one lease.
  int32_t add_node(int32_t parent, std::string_view salt, std::span<const uint32_t> page,
                   HeldPage held);
  // A child of the lease's path with these tokens, leased: found, with window pages that it lacks
  // taken from `source`, or new. The lease is on it then.
  Status extend(PrefixLease& lease, std::span<const uint32_t> page, std::string_view salt,
                const PageSource& source, StoredRuns& runs);
  void remove_node(int32_t node, EvictionCause cause);
  void remove_subtree(int32_t node, EvictionCause cause);
  void drop_window_page(int32_t node, int group);
  // Extends the counts by group pages that the node came to hold.
  void count_group(int32_t node, int group, int64_t sign);
  void retain(int32_t node, const Retention& retention);
  void touch(int32_t node);
  void touch_windows(int32_t node);
  void lease(int32_t node);
  void unlease(int32_t node);
  void list(int32_t node);
  void unlist(int32_t node);
  void list_window(int32_t node, int group);
  void unlist_window(int32_t node, int group);
  EvictionOrder order_of(int32_t node) const;
  void expire();
  void tell_removed();

  // ---- evicting ----
  bool frees(Kind kind, int page_class) const;
  bool evict_one(int page_class);

  // ---- checking ----
  Status check_node(int32_t node) const;
  Status check_links() const;
  Status check_orders() const;
  Status check_counts() const;
};

}  // namespace kvant::cache
