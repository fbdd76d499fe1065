// Finding, leasing and adding pages (ADR 0008). Eviction is in prefix_tree_evict.cc.
#include "kvant/cache/prefix_tree.h"

#include <xxhash.h>

#include <algorithm>
#include <limits>
#include <string>

#include "kvant/base/check.h"
#include "kvant/cache/prefix_tree_state.h"

namespace kvant::cache {

namespace {

// Token ids are not negative; keys and page objects hold them as u32.
std::span<const uint32_t> as_u32(std::span<const int32_t> tokens) {
  return {reinterpret_cast<const uint32_t*>(tokens.data()), tokens.size()};
}

}  // namespace

PrefixLease::~PrefixLease() {
  if (tree_ != nullptr) tree_->release(*this);
}

Result<std::unique_ptr<PrefixTree>> PrefixTree::create(KvCache& cache,
                                                       const PrefixTreeOptions& options) {
  if (cache.config().format.recent_tokens > 0) {
    return Error(ErrorCode::kUnsupported,
                 "the prefix cache cannot serve a format with +recentN: its last pages are BF16 "
                 "and belong to one sequence. Leave +recentN out, or turn the prefix cache off");
  }
  std::unique_ptr<PrefixTree> tree(new PrefixTree());
  tree->state_ = std::make_unique<State>();
  State& s = *tree->state_;
  s.cache = &cache;
  s.options = options;
  for (int g = 0; g < cache.num_groups(); ++g) {
    (s.window(g) == 0 ? s.full_groups : s.window_groups).push_back(g);
    if (cache.closed_page_class(g, 0) != cache.closed_page_class(g, 1)) s.has_sink = true;
  }
  s.window_pages.resize(cache.num_groups());
  s.group_pages.resize(cache.num_groups());
  s.idle_pages.resize(cache.num_groups());
  s.removed.resize(cache.num_groups());
  return tree;
}

PrefixTree::~PrefixTree() = default;

void PrefixTree::set_observer(PageObserver* observer) {
  state_->observer = observer;
}
void PrefixTree::set_listener(PageListener* listener) {
  state_->listener = listener;
}
void PrefixTree::set_time(double seconds) {
  state_->now = std::max(state_->now, seconds);
  state_->expire();
}
void PrefixTree::set_costs(const EvictionCosts& costs) {
  state_->options.costs = costs;
}

// ---- finding ----

uint64_t PrefixTree::State::hash_tokens(std::span<const uint32_t> page) {
  return XXH3_64bits(page.data(), page.size_bytes());
}

uint64_t PrefixTree::State::child_hash(uint64_t code, uint64_t token_hash) {
  return XXH3_64bits_withSeed(&code, sizeof(code), token_hash);
}

int32_t PrefixTree::State::find_root(std::string_view salt) const {
  const auto found = root_of.find(salt);
  return found == root_of.end() ? -1 : found->second;
}

int32_t PrefixTree::State::find_child(int32_t parent, int32_t root,
                                      std::span<const uint32_t> page) const {
  const uint64_t hash = child_hash(child_code(parent, root), hash_tokens(page));
  const auto [begin, end] = children.equal_range(hash);
  for (auto it = begin; it != end; ++it) {
    const TreeNode& node = nodes[it->second];
    if (node.parent != parent || node.root != root) continue;
    if (std::ranges::equal(tokens_of(it->second), page)) return it->second;
  }
  return -1;
}

PrefixMatch PrefixTree::match(std::span<const int32_t> tokens, std::string_view salt,
                              int64_t max_tokens) const {
  const State& s = *state_;
  const int64_t t = s.page_tokens();
  const std::span<const uint32_t> ids = as_u32(tokens);
  const int64_t limit = std::min(static_cast<int64_t>(ids.size()), max_tokens) / t;
  PrefixMatch best;
  const int32_t root = s.find_root(salt);
  if (root < 0) return best;
  std::vector<int64_t> run(s.num_groups(), 0);  // pages of each window group in a row, up to here
  int32_t node = -1;
  for (int64_t page = 0; page < limit; ++page) {
    node = s.find_child(node, root, ids.subspan(page * t, t));
    if (node < 0) break;
    bool usable = true;
    for (const int g : s.window_groups) {
      run[g] = s.nodes[node].page.has(g) ? run[g] + 1 : 0;
      if (page + 1 - s.cache->first_needed_page(g, page + 1) > run[g]) usable = false;
    }
    if (usable) best = {node, s.nodes[node].generation, page + 1};
  }
  return best;
}

void PrefixTree::count_query(int64_t query_tokens, int64_t hit_tokens) {
  PrefixTreeStats& stats = state_->stats;
  ++stats.queries;
  stats.query_tokens += query_tokens;
  stats.hit_tokens += hit_tokens;
  if (hit_tokens > 0) ++stats.hits;
}

PageKey PrefixTree::key(const PrefixMatch& match) const {
  return match.node < 0 ? PageKey{} : state_->nodes[match.node].key;
}
PageKey PrefixTree::key(const PrefixLease& lease) const {
  return lease.node_ < 0 ? PageKey{} : state_->nodes[lease.node_].key;
}

// ---- leases ----

void PrefixTree::State::lease(int32_t node) {
  TreeNode& n = nodes[node];
  if (n.leases++ > 0) return;
  unlist(node);
  --idle[kind(node)];
  ++stats.leased_nodes;
  for (const int g : window_groups) idle_pages[g] -= n.page.has(g) ? 1 : 0;
}

void PrefixTree::State::unlease(int32_t node) {
  TreeNode& n = nodes[node];
  touch(node);
  if (--n.leases > 0) return;
  ++idle[kind(node)];
  --stats.leased_nodes;
  for (const int g : window_groups) idle_pages[g] += n.page.has(g) ? 1 : 0;
  list(node);
}

PrefixLease PrefixTree::acquire(const PrefixMatch& match) {
  State& s = *state_;
  PrefixLease lease;
  lease.tree_ = this;
  lease.num_pages_ = match.num_pages;
  lease.node_ = match.node;
  if (match.node >= 0) {
    KVANT_CHECK(s.nodes[match.node].generation == match.generation,
                "a match is acquired before the tree changes");
  }
  for (int32_t node = match.node; node >= 0; node = s.nodes[node].parent) s.lease(node);
  return lease;
}

PrefixLease PrefixTree::share(const PrefixLease& lease) {
  const uint32_t generation = lease.node_ < 0 ? 0 : state_->nodes[lease.node_].generation;
  return acquire({lease.node_, generation, lease.num_pages_});
}

void PrefixTree::truncate(PrefixLease& lease, int64_t num_pages) {
  State& s = *state_;
  while (lease.num_pages_ > std::max<int64_t>(0, num_pages)) {
    const int32_t parent = s.nodes[lease.node_].parent;
    s.unlease(lease.node_);
    lease.node_ = parent;
    --lease.num_pages_;
  }
}

void PrefixTree::release(PrefixLease& lease) {
  truncate(lease, 0);
  lease.tree_ = nullptr;
}

Status PrefixTree::attach(const PrefixLease& lease, SequenceId id) {
  State& s = *state_;
  const int64_t first = s.cache->length(id) / s.page_tokens();
  std::vector<const HeldPage*> pages(std::max<int64_t>(0, lease.num_pages_ - first));
  std::vector<int32_t> path(pages.size());
  int32_t node = lease.node_;
  for (size_t i = pages.size(); i-- > 0; node = s.nodes[node].parent) {
    path[i] = node;
    pages[i] = &s.nodes[node].page;
  }
  if (pages.empty()) return {};
  KVANT_TRY(s.cache->attach_pages(id, pages));
  for (size_t i = path.size(); i-- > 0;) {
    ++s.nodes[path[i]].hits;
    s.touch(path[i]);
    s.touch_windows(path[i]);
    if (s.listener != nullptr) s.listener->page_hit(s.page(path[i]));
  }
  return {};
}

// ---- adding ----

// Collects what becomes reusable, so that consecutive pages are told as one run and every page
// after its parent: runs of full-attention groups first, in their order.
class StoredRuns {
 public:
  StoredRuns(PageObserver* observer, const KvCache& cache, std::string_view salt,
             std::span<const uint32_t> tokens, int64_t first_page = 0)
      : observer_(observer),
        cache_(cache),
        salt_(salt),
        tokens_(tokens),
        first_page_(first_page),
        open_(cache.num_groups()) {}

  // Page `page` of the sequence is new in the group.
  void add(int group, int64_t page, const PageKey& parent_key, const PageKey& key) {
    if (observer_ == nullptr) return;
    Run& run = open_[group];
    if (!run.keys.empty() && run.first_page + static_cast<int64_t>(run.keys.size()) != page)
      close(group);
    if (run.keys.empty()) {
      run.group = group;
      run.first_page = page;
      run.parent_key = parent_key;
    }
    run.keys.push_back(key);
  }

  void tell() {
    if (observer_ == nullptr) return;
    for (int g = 0; g < cache_.num_groups(); ++g) close(g);
    for (const bool windowed : {false, true}) {
      for (const Run& run : done_) {
        const int window = cache_.group(run.group).geometry.window;
        if ((window > 0) != windowed) continue;
        const int64_t t = cache_.config().page_tokens;
        observer_->pages_stored(
            {.medium = Medium::kDevice,
             .group = run.group,
             .window = window,
             .parent_key = run.parent_key,
             .keys = run.keys,
             .token_ids = tokens_.subspan((run.first_page - first_page_) * t,
                                          static_cast<int64_t>(run.keys.size()) * t),
             .salt = salt_});
      }
    }
  }

 private:
  struct Run {
    int group = 0;
    int64_t first_page = 0;
    PageKey parent_key{};
    std::vector<PageKey> keys;
  };

  void close(int group) {
    if (!open_[group].keys.empty()) done_.push_back(std::move(open_[group]));
    open_[group] = {};
  }

  PageObserver* observer_;
  const KvCache& cache_;
  std::string_view salt_;
  std::span<const uint32_t> tokens_;  // from page first_page_ on
  int64_t first_page_;
  std::vector<Run> open_;  // [groups]
  std::vector<Run> done_;
};

int32_t PrefixTree::State::root_for(std::string_view salt) {
  const int32_t found = find_root(salt);
  if (found >= 0) return found;
  int32_t root;
  if (free_roots.empty()) {
    root = static_cast<int32_t>(roots.size());
    roots.emplace_back();
  } else {
    root = free_roots.back();
    free_roots.pop_back();
  }
  roots[root] = {std::string(salt), -1};
  root_of.emplace(salt, root);
  return root;
}

int32_t PrefixTree::State::add_node(int32_t parent, std::string_view salt,
                                    std::span<const uint32_t> page, HeldPage held) {
  const int32_t root = root_for(salt);
  int32_t node;
  if (free_nodes.empty()) {
    node = static_cast<int32_t>(nodes.size());
    nodes.emplace_back();
    tokens.resize(tokens.size() + page_tokens());
    windows.resize(windows.size() + num_groups());
  } else {
    node = free_nodes.back();
    free_nodes.pop_back();
  }
  std::ranges::copy(page, tokens.begin() + static_cast<int64_t>(node) * page_tokens());
  TreeNode& n = nodes[node];
  const uint32_t generation = n.generation;
  n = {};
  n.used = true;
  n.generation = generation;
  n.parent = parent;
  n.root = root;
  n.token_hash = hash_tokens(page);
  n.page = std::move(held);
  n.key = page_key(parent < 0 ? PageKey{} : nodes[parent].key, cache->fingerprint(),
                   roots[root].salt, page);
  if (parent >= 0) unlist(parent);
  int32_t& first = parent < 0 ? roots[root].first_child : nodes[parent].first_child;
  n.next_sibling = first;
  if (first >= 0) nodes[first].previous_sibling = node;
  first = node;
  if (parent >= 0) list(parent);
  children.emplace(child_hash(child_code(parent, root), n.token_hash), node);
  ++stats.nodes;
  ++stats.inserted_pages;
  ++stats.leased_nodes;
  n.leases = 1;
  n.priority = -1;  // retain sets it
  for (int g = 0; g < num_groups(); ++g) {
    if (n.page.has(g)) count_group(node, g, 1);
  }
  return node;
}

Status PrefixTree::insert(PrefixLease& lease, SequenceId id, std::span<const int32_t> tokens,
                          std::string_view salt, const Retention& retention) {
  State& s = *state_;
  const int64_t t = s.page_tokens();
  const int64_t full = s.cache->length(id) / t;
  const std::span<const uint32_t> ids = as_u32(tokens);
  if (static_cast<int64_t>(ids.size()) < full * t) {
    return Error(ErrorCode::kInvalidArgument, std::to_string(ids.size()) +
                                                  " tokens were given for a sequence of " +
                                                  std::to_string(s.cache->length(id)));
  }
  if (lease.tree_ == nullptr) lease.tree_ = this;
  truncate(lease, full);
  if (lease.node_ >= 0) {
    const std::span<const uint32_t> last = ids.subspan((lease.num_pages_ - 1) * t, t);
    if (s.salt_of(lease.node_) != salt || !std::ranges::equal(s.tokens_of(lease.node_), last)) {
      return Error(ErrorCode::kInvalidArgument,
                   "the lease is on other tokens or another salt than the sequence; truncate it "
                   "when the sequence is truncated");
    }
  }
  StoredRuns runs(s.observer, *s.cache, salt, ids);
  const PageSource source{.sequence = id, .retention = retention};
  Status status;
  while (status && lease.num_pages_ < full)
    status = s.extend(lease, ids.subspan(lease.num_pages_ * t, t), salt, source, runs);
  runs.tell();
  return status;
}

Status PrefixTree::insert_held(PrefixLease& lease, HeldPage page,
                               std::span<const int32_t> page_tokens, std::string_view salt,
                               const Retention& retention) {
  State& s = *state_;
  const std::span<const uint32_t> ids = as_u32(page_tokens);
  if (!page || page.page() != lease.num_pages_ || static_cast<int>(ids.size()) != s.page_tokens()) {
    return Error(ErrorCode::kInvalidArgument, "page " + std::to_string(lease.num_pages_) +
                                                  " with its " + std::to_string(s.page_tokens()) +
                                                  " tokens goes behind the lease");
  }
  if (lease.node_ >= 0 && s.salt_of(lease.node_) != salt)
    return Error(ErrorCode::kInvalidArgument, "the lease is of another salt than the page");
  if (lease.tree_ == nullptr) lease.tree_ = this;
  StoredRuns runs(s.observer, *s.cache, salt, ids, lease.num_pages_);
  KVANT_TRY(s.extend(lease, ids, salt, {.held = &page, .retention = retention}, runs));
  runs.tell();
  return {};
}

Status PrefixTree::State::extend(PrefixLease& lease_of, std::span<const uint32_t> page,
                                 std::string_view salt, const PageSource& source,
                                 StoredRuns& runs) {
  const int64_t number = lease_of.num_pages_;
  const PageKey parent = lease_of.node_ < 0 ? PageKey{} : nodes[lease_of.node_].key;
  const int32_t root = find_root(salt);
  int32_t node = root < 0 ? -1 : find_child(lease_of.node_, root, page);
  std::vector<bool> had(num_groups(), false);
  if (node < 0) {
    HeldPage held;
    if (source.held != nullptr) {
      held = std::move(*source.held);
    } else {
      KVANT_ASSIGN(held, cache->hold_page(source.sequence, number));
    }
    node = add_node(lease_of.node_, salt, page, std::move(held));
    if (listener != nullptr) listener->page_inserted(this->page(node));
  } else {
    lease(node);
    HeldPage& held = nodes[node].page;
    for (int g = 0; g < num_groups(); ++g) had[g] = held.has(g);
    if (source.held != nullptr) {
      held.take_missing(*source.held);
    } else if (const Status status = cache->complete_page(held, source.sequence); !status) {
      unlease(node);
      return status.error();
    }
    for (const int g : window_groups) {
      if (!had[g] && held.has(g)) count_group(node, g, 1);
    }
  }
  touch(node);
  retain(node, source.retention);
  for (int g = 0; g < num_groups(); ++g) {
    if (!had[g] && nodes[node].page.has(g)) runs.add(g, number, parent, nodes[node].key);
  }
  lease_of.node_ = node;
  ++lease_of.num_pages_;
  return {};
}

}  // namespace kvant::cache
