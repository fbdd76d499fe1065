// The order of eviction, and who goes (ADR 0008).
#include <algorithm>

#include "kvant/base/check.h"
#include "kvant/cache/prefix_tree.h"
#include "kvant/cache/prefix_tree_state.h"

namespace kvant::cache {

std::string_view eviction_cause_name(EvictionCause cause) {
  constexpr std::string_view kNames[kNumEvictionCauses] = {"pages", "sink", "window", "cleared"};
  return kNames[static_cast<size_t>(cause)];
}

int64_t PrefixTree::State::node_bytes(int32_t node) const {
  int64_t bytes = 0;
  for (int g = 0; g < num_groups(); ++g) {
    if (nodes[node].page.has(g)) bytes += page_bytes(node, g);
  }
  return bytes;
}

TreePage PrefixTree::State::page(int32_t node) const {
  const TreeNode& n = nodes[node];
  return {n.key, parent_key(node), tokens_of(node), n.page, salt_of(node), n.hits};
}

// ---- lists ----

EvictionOrder PrefixTree::State::order_of(int32_t node) const {
  const TreeNode& n = nodes[node];
  const PageFacts facts{.last_use = n.last_use,
                        .priority = n.priority,
                        .first_position = n.page.page() * page_tokens(),
                        .page_tokens = page_tokens(),
                        .bytes = node_bytes(node)};
  return eviction_order(options.policy, options.costs, facts, n.stamp);
}

void PrefixTree::State::list(int32_t node) {
  TreeNode& n = nodes[node];
  if (n.leases > 0) return;
  const bool leaf = n.first_child < 0;
  const bool top = has_sink && n.parent < 0;
  if (!leaf && !top) return;
  n.order = order_of(node);
  if (leaf) leaves[kind(node)].emplace(n.order, node);
  if (top) tops.emplace(n.order, node);
  n.in_leaves = leaf;
  n.in_tops = top;
}

void PrefixTree::State::unlist(int32_t node) {
  TreeNode& n = nodes[node];
  if (n.in_leaves) leaves[kind(node)].erase({n.order, node});
  if (n.in_tops) tops.erase({n.order, node});
  n.in_leaves = n.in_tops = false;
}

void PrefixTree::State::list_window(int32_t node, int group) {
  WindowEntry& entry = window_entry(node, group);
  entry.order = order_of(node);
  entry.listed = true;
  window_pages[group].emplace(entry.order, node);
}

void PrefixTree::State::unlist_window(int32_t node, int group) {
  WindowEntry& entry = window_entry(node, group);
  if (!entry.listed) return;
  window_pages[group].erase({entry.order, node});
  entry.listed = false;
}

void PrefixTree::State::touch(int32_t node) {
  unlist(node);
  nodes[node].last_use = now;
  nodes[node].stamp = ++stamps;
  list(node);
}

void PrefixTree::State::touch_windows(int32_t node) {
  for (const int g : window_groups) {
    if (!window_entry(node, g).listed) continue;
    unlist_window(node, g);
    list_window(node, g);
  }
}

void PrefixTree::State::count_group(int32_t node, int group, int64_t sign) {
  group_pages[group] += sign;
  stats.bytes += sign * page_bytes(node, group);
  if (window(group) == 0) return;
  if (nodes[node].leases == 0) idle_pages[group] += sign;
  if (sign > 0)
    list_window(node, group);
  else
    unlist_window(node, group);
}

void PrefixTree::State::retain(int32_t node, const Retention& retention) {
  TreeNode& n = nodes[node];
  const double expires = now + retention.seconds;
  const int priority = std::clamp(retention.priority, 0, 100);
  // What is asked for more strongly, or as strongly for longer, wins.
  if (priority < n.priority || (priority == n.priority && expires <= n.expires)) return;
  unlist(node);
  if (n.expires < TreeNode{}.expires) expiries.erase({n.expires, node});
  n.priority = priority;
  n.expires = expires;
  if (expires < TreeNode{}.expires) expiries.emplace(expires, node);
  list(node);
}

void PrefixTree::State::expire() {
  while (!expiries.empty() && expiries.begin()->first <= now) {
    const int32_t node = expiries.begin()->second;
    expiries.erase(expiries.begin());
    unlist(node);
    nodes[node].priority = std::min(nodes[node].priority, Retention::kDefaultPriority);
    nodes[node].expires = TreeNode{}.expires;
    list(node);
    touch_windows(node);
  }
}

// ---- removal ----

void PrefixTree::State::drop_window_page(int32_t node, int group) {
  if (listener != nullptr) listener->page_evicted(page(node), EvictionCause::kWindow, group);
  if (observer != nullptr) removed[group].push_back(nodes[node].key);
  count_group(node, group, -1);
  nodes[node].page.drop(group);
  ++stats.evicted[static_cast<size_t>(EvictionCause::kWindow)];
}

void PrefixTree::State::remove_node(int32_t node, EvictionCause cause) {
  KVANT_CHECK(nodes[node].leases == 0 && nodes[node].first_child < 0,
              "only leaves that nobody uses are evicted");
  if (listener != nullptr) listener->page_evicted(page(node), cause, -1);
  TreeNode& n = nodes[node];
  unlist(node);
  for (int g = 0; g < num_groups(); ++g) {
    if (!n.page.has(g)) continue;
    count_group(node, g, -1);
    if (observer != nullptr && cause != EvictionCause::kCleared) removed[g].push_back(n.key);
  }
  --idle[kind(node)];
  if (n.expires < TreeNode{}.expires) expiries.erase({n.expires, node});
  const auto [begin, end] =
      children.equal_range(child_hash(child_code(n.parent, n.root), n.token_hash));
  children.erase(std::find_if(begin, end, [&](const auto& child) { return child.second == node; }));

  const int32_t parent = n.parent, root = n.root;
  if (parent >= 0) unlist(parent);
  if (n.previous_sibling >= 0)
    nodes[n.previous_sibling].next_sibling = n.next_sibling;
  else
    (parent < 0 ? roots[root].first_child : nodes[parent].first_child) = n.next_sibling;
  if (n.next_sibling >= 0) nodes[n.next_sibling].previous_sibling = n.previous_sibling;
  n.page = {};
  n.used = false;
  ++n.generation;
  free_nodes.push_back(node);
  if (parent >= 0) list(parent);
  if (roots[root].first_child < 0) {
    root_of.erase(roots[root].salt);
    roots[root] = {};
    free_roots.push_back(root);
  }
  --stats.nodes;
  ++stats.evicted[static_cast<size_t>(cause)];
}

void PrefixTree::State::remove_subtree(int32_t node, EvictionCause cause) {
  // Deepest first, without recursion: a path may have thousands of pages.
  int32_t at = node;
  while (true) {
    while (nodes[at].first_child >= 0) at = nodes[at].first_child;
    const int32_t parent = nodes[at].parent;
    remove_node(at, cause);
    if (at == node) return;
    at = parent;
  }
}

void PrefixTree::State::tell_removed() {
  if (observer == nullptr) return;
  for (const std::vector<int>* groups : {&window_groups, &full_groups}) {
    for (const int g : *groups) {
      if (removed[g].empty()) continue;
      observer->pages_removed(
          {.medium = Medium::kDevice, .group = g, .window = window(g), .keys = removed[g]});
      removed[g].clear();
    }
  }
}

// ---- eviction ----

bool PrefixTree::State::frees(Kind kind, int page_class) const {
  return std::ranges::any_of(full_groups, [&](int g) {
    return cache->closed_page_class(g, kind == kFirst ? 0 : 1) == page_class;
  });
}

bool PrefixTree::State::evict_one(int page_class) {
  struct Victim {
    EvictionOrder order;
    int32_t node = -1;
    int window_group = -1;
    bool subtree = false;
  };
  Victim victim;
  const auto consider = [&](const Victim& other) {
    if (victim.node < 0 || other.order < victim.order) victim = other;
  };
  const auto consider_first = [&](const Order& order, bool subtree) {
    if (!order.empty()) consider({order.begin()->first, order.begin()->second, -1, subtree});
  };
  const bool rest = frees(kRest, page_class);
  if (rest) consider_first(leaves[kRest], false);
  if (has_sink && frees(kFirst, page_class)) {
    if (rest)
      consider_first(leaves[kFirst], false);
    else
      consider_first(tops, true);
  }
  for (const int g : window_groups) {
    if (cache->closed_page_class(g, 1) != page_class) continue;
    // Pages that running sequences read now would not be freed.
    for (const auto& [order, node] : window_pages[g]) {
      if (!nodes[node].page.sole_holder(g)) continue;
      consider({order, node, g, false});
      break;
    }
  }
  if (victim.node < 0) return false;
  if (victim.window_group >= 0)
    drop_window_page(victim.node, victim.window_group);
  else if (victim.subtree)
    remove_subtree(victim.node, EvictionCause::kSink);
  else
    remove_node(victim.node, EvictionCause::kPages);
  return true;
}

bool PrefixTree::evict(int page_class, int64_t num_free) {
  State& s = *state_;
  bool enough = true;
  while (enough && s.cache->page_class(page_class).free_pages < num_free)
    enough = s.evict_one(page_class);
  s.tell_removed();
  return enough;
}

bool PrefixTree::make_room(std::span<const int64_t> needed) {
  bool enough = true;
  for (size_t c = 0; c < needed.size(); ++c) {
    if (needed[c] > 0 && !evict(static_cast<int>(c), needed[c])) enough = false;
  }
  return enough;
}

int64_t PrefixTree::evictable_pages(int page_class) const {
  const State& s = *state_;
  int64_t pages = 0;
  for (const int g : s.full_groups) {
    if (s.cache->closed_page_class(g, 1) == page_class) pages += s.idle[State::kRest];
    const int first = s.cache->closed_page_class(g, 0);
    if (s.has_sink && first == page_class) pages += s.idle[State::kFirst];
  }
  for (const int g : s.window_groups) {
    if (s.cache->closed_page_class(g, 1) == page_class) pages += s.idle_pages[g];
  }
  return pages;
}

Status PrefixTree::clear() {
  State& s = *state_;
  if (s.stats.leased_nodes > 0) {
    return Error(ErrorCode::kInvalidArgument,
                 "the prefix cache cannot be cleared while requests use " +
                     std::to_string(s.stats.leased_nodes) + " of its pages; end them first");
  }
  for (size_t root = 0; root < s.roots.size(); ++root) {
    while (s.roots[root].first_child >= 0)
      s.remove_subtree(s.roots[root].first_child, EvictionCause::kCleared);
  }
  if (s.observer != nullptr) s.observer->all_cleared(Medium::kDevice);
  return {};
}

// ---- facts ----

PrefixTreeStats PrefixTree::stats() const {
  return state_->stats;
}
int64_t PrefixTree::group_pages(int group) const {
  return state_->group_pages[group];
}
TreePage PrefixTree::page(int32_t node) const {
  return state_->page(node);
}

std::vector<int32_t> PrefixTree::in_order() const {
  const State& s = *state_;
  std::vector<int32_t> order;
  for (const TreeRoot& root : s.roots) {
    for (int32_t top = root.first_child; top >= 0; top = s.nodes[top].next_sibling)
      order.push_back(top);
  }
  for (size_t i = 0; i < order.size(); ++i) {
    for (int32_t child = s.nodes[order[i]].first_child; child >= 0;
         child = s.nodes[child].next_sibling)
      order.push_back(child);
  }
  return order;
}

}  // namespace kvant::cache
