// What must hold of a prefix tree between calls; tests ask after every operation.
#include <string>

#include "kvant/cache/prefix_tree.h"
#include "kvant/cache/prefix_tree_state.h"

namespace kvant::cache {

namespace {

Error violation(const std::string& what) {
  return Error(ErrorCode::kInternal, "prefix tree: " + what);
}

}  // namespace

Status PrefixTree::State::check_node(int32_t node) const {
  const TreeNode& n = nodes[node];
  const std::string name = "node " + std::to_string(node);
  if (n.root < 0 || root_of.find(roots[n.root].salt) == root_of.end())
    return violation(name + " has no root");
  if (!n.page) return violation(name + " has no page");
  const int64_t depth = n.parent < 0 ? 0 : nodes[n.parent].page.page() + 1;
  if (n.page.page() != depth) return violation(name + " holds a page of another position");
  if (n.parent >= 0 && (!nodes[n.parent].used || nodes[n.parent].root != n.root))
    return violation(name + " outlived its parent");
  if (n.key != page_key(parent_key(node), cache->fingerprint(), salt_of(node), tokens_of(node)))
    return violation(name + " has another key than its tokens");
  if (find_child(n.parent, n.root, tokens_of(node)) != node)
    return violation(name + " is not found by its tokens");
  if (n.leases < 0 || (n.parent >= 0 && nodes[n.parent].leases < n.leases))
    return violation(name + " has leases that its parent does not know of");
  for (const int g : full_groups) {
    if (!n.page.has(g)) return violation(name + " lacks a full-attention page");
  }
  return {};
}

Status PrefixTree::State::check_links() const {
  int64_t linked = 0;
  std::vector<int32_t> open;
  for (size_t root = 0; root < roots.size(); ++root) {
    const int32_t first = roots[root].first_child;
    const auto named = root_of.find(roots[root].salt);
    const bool known = named != root_of.end() && named->second == static_cast<int32_t>(root);
    if (known != (first >= 0)) return violation("a root without pages, or pages without a root");
    if (first >= 0) open.push_back(first);
  }
  while (!open.empty()) {
    const int32_t first = open.back();
    open.pop_back();
    int32_t previous = -1;
    for (int32_t node = first; node >= 0; node = nodes[node].next_sibling) {
      const TreeNode& n = nodes[node];
      if (!n.used || n.previous_sibling != previous || n.parent != nodes[first].parent)
        return violation("siblings of node " + std::to_string(node) + " are wrongly linked");
      if (++linked > stats.nodes) return violation("children are linked in a ring");
      if (n.first_child >= 0) {
        if (nodes[n.first_child].parent != node)
          return violation("node " + std::to_string(node) + " has another's child");
        open.push_back(n.first_child);
      }
      previous = node;
    }
  }
  if (linked != stats.nodes || children.size() != static_cast<size_t>(stats.nodes) ||
      nodes.size() - free_nodes.size() != static_cast<size_t>(stats.nodes))
    return violation("nodes are lost: " + std::to_string(linked) + " linked, " +
                     std::to_string(stats.nodes) + " counted");
  return {};
}

Status PrefixTree::State::check_orders() const {
  size_t in_leaves = 0, in_tops = 0, in_expiries = 0;
  for (int32_t node = 0; node < static_cast<int32_t>(nodes.size()); ++node) {
    const TreeNode& n = nodes[node];
    if (!n.used) continue;
    const std::string name = "node " + std::to_string(node);
    if (n.in_leaves != (n.leases == 0 && n.first_child < 0))
      return violation(name + (n.in_leaves ? " may not" : " cannot") + " be evicted");
    if (n.in_tops != (has_sink && n.leases == 0 && n.parent < 0))
      return violation(name + " is wrongly (not) listed among first pages");
    if (n.in_leaves && !leaves[kind(node)].contains({n.order, node}))
      return violation(name + " is not in the order of eviction");
    if (n.in_tops && !tops.contains({n.order, node}))
      return violation(name + " is not in the order of first pages");
    in_leaves += n.in_leaves ? 1 : 0;
    in_tops += n.in_tops ? 1 : 0;
    if (n.expires < TreeNode{}.expires) {
      ++in_expiries;
      if (n.expires <= now || !expiries.contains({n.expires, node}))
        return violation(name + " has expired unseen");
    }
    for (const int g : window_groups) {
      const WindowEntry& entry = window_entry(node, g);
      if (entry.listed != n.page.has(g) ||
          (entry.listed && !window_pages[g].contains({entry.order, node})))
        return violation(name + ": its window page is wrongly (not) listed");
    }
  }
  if (leaves[kFirst].size() + leaves[kRest].size() != in_leaves || tops.size() != in_tops ||
      expiries.size() != in_expiries)
    return violation("the order of eviction names nodes that are not there");
  return {};
}

Status PrefixTree::State::check_counts() const {
  int64_t leased = 0, bytes = 0;
  std::array<int64_t, 2> unleased{};
  std::vector<int64_t> held(num_groups(), 0), unused(num_groups(), 0);
  for (int32_t node = 0; node < static_cast<int32_t>(nodes.size()); ++node) {
    const TreeNode& n = nodes[node];
    if (!n.used) continue;
    if (n.leases > 0)
      ++leased;
    else
      ++unleased[kind(node)];
    bytes += node_bytes(node);
    for (int g = 0; g < num_groups(); ++g) {
      if (!n.page.has(g)) continue;
      ++held[g];
      if (window(g) > 0 && n.leases == 0) ++unused[g];
    }
  }
  if (leased != stats.leased_nodes || bytes != stats.bytes || unleased != idle ||
      held != group_pages || unused != idle_pages)
    return violation("counts of nodes, pages or bytes are wrong");
  for (int g = 0; g < num_groups(); ++g) {
    if (window_pages[g].size() != static_cast<size_t>(window(g) > 0 ? held[g] : 0))
      return violation("window pages are listed that are not there");
    if (!removed[g].empty()) return violation("removed pages were not told");
  }
  return {};
}

Status PrefixTree::check_invariants() const {
  const State& s = *state_;
  KVANT_TRY(s.check_links());
  for (int32_t node = 0; node < static_cast<int32_t>(s.nodes.size()); ++node) {
    if (s.nodes[node].used) KVANT_TRY(s.check_node(node));
  }
  KVANT_TRY(s.check_orders());
  return s.check_counts();
}

}  // namespace kvant::cache
