// Requests at random against a small cache: after every operation the invariants hold, hits are
// what a search through all pages finds, a reader of the events knows exactly the tree's pages, and
// every page that a query reads holds what its tokens say.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kvant/cache/prefix_tree.h"
#include "kvant/cache/testing/cache_harness.h"
#include "kvant/cache/testing/tree_mirror.h"

namespace kvant::cache {
namespace {

using testing::CacheHarness;
using testing::NewTokens;
using testing::next_random;
using testing::TreeMirror;

struct Scenario {
  std::string name;
  std::string spec;
  int window = 0;
  EvictionPolicy policy = EvictionPolicy::kLru;
};

std::vector<Scenario> scenarios() {
  std::vector<Scenario> list = {
      {"four_bit", "4bit"},
      {"four_bit_window", "4bit", 40},
      {"four_bit_window_priority", "4bit", 40, EvictionPolicy::kPriority},
      {"four_bit_cost", "4bit", 0, EvictionPolicy::kCostAware},
      {"plain_window", "bf16", 24},
      {"sink_window_cost", "k=nvfp4+mean,v=nvfp4+sink", 33, EvictionPolicy::kCostAware},
  };
  // Every element format on the side or sides that it is for.
  for (const formats::FormatInfo& info : formats::all_formats()) {
    const std::string base(info.name);
    std::string name = base;
    std::replace(name.begin(), name.end(), ':', '_');
    for (const std::string& spec : {base, "k=" + base + ",v=int8", "k=int8,v=" + base}) {
      const auto format = formats::parse_cache_format(spec);
      if (!format || !formats::check_cache_format(*format)) continue;
      list.push_back({"format_" + name, spec, 24});
      break;
    }
  }
  return list;
}

void PrintTo(const Scenario& scenario, std::ostream* out) {
  *out << scenario.name;
}

constexpr int kPageTokens = 16;
constexpr int kMaxSequences = 4;
constexpr int64_t kMaxTokens = 400;

// Keeps the objects of evicted pages, as a tier does.
class Shelf final : public PageListener {
 public:
  explicit Shelf(KvCache& cache) : cache_(cache) {}
  void page_inserted(const TreePage&) override {}
  void page_hit(const TreePage& page) override { EXPECT_GT(page.hits, 0); }
  void page_evicted(const TreePage& page, EvictionCause cause, int group) override {
    if (cause == EvictionCause::kCleared) return;
    auto& objects = objects_[page.key];
    objects.resize(cache_.num_groups());
    KvCache::PageIdentity identity{};
    std::ranges::copy(page.key, identity.key);
    std::ranges::copy(page.parent_key, identity.parent_key);
    identity.token_ids = page.token_ids;
    for (int g = 0; g < cache_.num_groups(); ++g) {
      if ((group >= 0 && g != group) || !page.held.has(g)) continue;
      auto object = cache_.export_held(page.held, g, identity);
      ASSERT_TRUE(object.has_value()) << object.error().message();
      objects[g] = std::move(*object);
    }
  }
  const std::vector<std::vector<std::byte>>* find(const PageKey& key) const {
    const auto found = objects_.find(key);
    // With only a window page there is nothing to begin from.
    return found == objects_.end() || found->second[0].empty() ? nullptr : &found->second;
  }
  void trim() {
    if (objects_.size() > 200) objects_.clear();
  }

 private:
  KvCache& cache_;
  std::map<PageKey, std::vector<std::vector<std::byte>>> objects_;
};

class PrefixTreeProperty : public ::testing::TestWithParam<Scenario> {
 protected:
  struct Request {
    SequenceId id = 0;
    std::string salt;
    std::vector<int32_t> tokens;  // all that it will have
    PrefixLease lease;
  };

  void SetUp() override {
    CacheConfig config;
    config.layers = {{.num_kv_heads = 1, .head_dim = 32}};
    if (GetParam().window > 0)
      config.layers.push_back({.num_kv_heads = 2, .head_dim = 16, .window = GetParam().window});
    plan_ = testing::make_test_plan(config.layers);
    config.plan = &plan_;
    config.format = *formats::parse_cache_format(GetParam().spec);
    config.page_tokens = kPageTokens;
    config.max_tokens = kMaxTokens;
    config.max_sequence_tokens = 160;
    config.max_sequences = kMaxSequences;
    config.max_step_tokens = 80;
    config.held_sink_pages = 3;
    config.held_windows = 4;
    auto harness = CacheHarness::create(config);
    ASSERT_TRUE(harness.has_value()) << harness.error().message();
    h_ = std::move(*harness);
    auto tree = PrefixTree::create(h_->cache(), {.policy = GetParam().policy});
    ASSERT_TRUE(tree.has_value()) << tree.error().message();
    tree_ = std::move(*tree);
    shelf_ = std::make_unique<Shelf>(h_->cache());
    tree_->set_observer(&mirror_);
    tree_->set_listener(shelf_.get());
  }

  uint64_t below(uint64_t n) { return next_random(seed_) % n; }
  KvCache& cache() { return h_->cache(); }

  std::vector<int32_t> random_prompt();
  int64_t searched_match(const std::vector<int32_t>& tokens, const std::string& salt);
  void start();
  void load_from_shelf(Request& request);
  void step();
  void finish(size_t index);
  void fork();
  void truncate();
  void evict();
  void check();

  formats::QuantPlan plan_;
  TreeMirror mirror_;
  std::unique_ptr<CacheHarness> h_;
  std::unique_ptr<Shelf> shelf_;
  std::unique_ptr<PrefixTree> tree_;
  std::vector<Request> requests_;  // dies before the tree
  uint64_t seed_ = 3;
  double now_ = 0;
  int hits_ = 0, loads_ = 0, evictions_ = 0, steps_ = 0;
};

// Few different pages, so that prompts share beginnings.
std::vector<int32_t> PrefixTreeProperty_tokens(uint64_t& seed, int64_t pages, int rest) {
  std::vector<int32_t> tokens;
  for (int64_t page = 0; page < pages; ++page) {
    const int32_t variant = static_cast<int32_t>(next_random(seed) % (page == 0 ? 5 : 2));
    for (int i = 0; i < kPageTokens; ++i) tokens.push_back(variant * 50 + i);
  }
  for (int i = 0; i < rest; ++i)
    tokens.push_back(900 + static_cast<int32_t>(next_random(seed) % 9));
  return tokens;
}

std::vector<int32_t> PrefixTreeProperty::random_prompt() {
  return PrefixTreeProperty_tokens(seed_, static_cast<int64_t>(below(8)),
                                   1 + static_cast<int>(below(30)));
}

// The longest usable prefix by looking at every page of the tree.
int64_t PrefixTreeProperty::searched_match(const std::vector<int32_t>& tokens,
                                           const std::string& salt) {
  std::map<PageKey, std::vector<bool>> pages;
  tree_->for_each_page([&](const TreePage& page) {
    std::vector<bool> has;
    for (int g = 0; g < cache().num_groups(); ++g) has.push_back(page.held.has(g));
    pages[page.key] = has;
  });
  std::vector<std::vector<bool>> chain;
  PageKey key{};
  for (size_t page = 0; (page + 1) * kPageTokens < tokens.size(); ++page) {
    const std::vector<uint32_t> ids(tokens.begin() + page * kPageTokens,
                                    tokens.begin() + (page + 1) * kPageTokens);
    key = page_key(key, cache().fingerprint(), salt, ids);
    const auto found = pages.find(key);
    if (found == pages.end()) break;
    chain.push_back(found->second);
  }
  for (int64_t n = static_cast<int64_t>(chain.size()); n > 0; --n) {
    bool usable = true;
    for (int g = 0; g < cache().num_groups(); ++g) {
      const int window = cache().group(g).geometry.window;
      // A query at position n * t reads the keys j > n * t - window.
      const int64_t first =
          window == 0 ? 0 : std::max<int64_t>(0, n * kPageTokens - window + 1) / kPageTokens;
      for (int64_t page = first; page < n; ++page) usable = usable && chain[page][g];
    }
    if (usable) return n;
  }
  return 0;
}

void PrefixTreeProperty::load_from_shelf(Request& request) {
  while ((request.lease.num_pages() + 1) * kPageTokens <
         static_cast<int64_t>(request.tokens.size())) {
    const int64_t page = request.lease.num_pages();
    const auto ids = std::span(request.tokens).subspan(page * kPageTokens, kPageTokens);
    const PageKey key = page_key(tree_->key(request.lease), cache().fingerprint(), request.salt,
                                 std::vector<uint32_t>(ids.begin(), ids.end()));
    const auto* objects = shelf_->find(key);
    if (objects == nullptr) return;
    const std::vector<std::span<const std::byte>> spans(objects->begin(), objects->end());
    auto held = cache().import_held(spans);
    if (!held) {
      ASSERT_EQ(held.error().code(), ErrorCode::kResourceExhausted) << held.error().message();
      return;
    }
    const Status status = tree_->insert_held(request.lease, std::move(*held), ids, request.salt);
    ASSERT_TRUE(status.has_value()) << status.error().message();
    ++loads_;
  }
}

void PrefixTreeProperty::start() {
  Request request;
  request.salt = below(4) == 0 ? "tenant" : "";
  request.tokens = random_prompt();
  const int64_t limit = static_cast<int64_t>(request.tokens.size()) - 1;
  const PrefixMatch match = tree_->match(request.tokens, request.salt, limit);
  EXPECT_EQ(match.num_pages, searched_match(request.tokens, request.salt));
  const auto id = h_->add();
  if (!id) return;
  request.id = *id;
  request.lease = tree_->acquire(match);
  if (below(2) == 0) load_from_shelf(request);
  // What was loaded may lack window pages that were not on the shelf.
  while (request.lease.num_pages() > match.num_pages &&
         tree_->match(request.tokens, request.salt, limit).num_pages < request.lease.num_pages())
    tree_->truncate(request.lease, request.lease.num_pages() - 1);
  const Status attached = tree_->attach(request.lease, request.id);
  ASSERT_TRUE(attached.has_value()) << attached.error().message();
  const int64_t hit = request.lease.num_pages() * kPageTokens;
  const std::vector<uint32_t> ids(request.tokens.begin(), request.tokens.begin() + hit);
  h_->note(request.id, ids);
  tree_->count_query(limit + 1, hit);
  if (hit > 0) ++hits_;
  requests_.push_back(std::move(request));
}

void PrefixTreeProperty::step() {
  std::vector<NewTokens> batch;
  std::vector<StepSequence> items;
  int64_t room = 80;
  for (Request& request : requests_) {
    const int64_t length = cache().length(request.id);
    const int64_t n = std::min<int64_t>({room, static_cast<int64_t>(request.tokens.size()) - length,
                                         below(2) == 0 ? 1 : 1 + static_cast<int64_t>(below(60))});
    if (n < 1) continue;
    room -= n;
    const auto first = request.tokens.begin() + length;
    batch.push_back({request.id, {first, first + n}});
    items.push_back({request.id, static_cast<int32_t>(n)});
  }
  if (batch.empty()) return;
  const auto needed = cache().needed_pages(items);
  ASSERT_TRUE(needed.has_value()) << needed.error().message();
  const bool enough = tree_->make_room(*needed);
  const Status status = h_->step(batch);
  ASSERT_EQ(status.has_value(), enough) << (status ? "" : status.error().message());
  if (!enough) {
    EXPECT_EQ(status.error().code(), ErrorCode::kResourceExhausted);
    int64_t tokens = cache().bytes().tokens_now;
    for (const StepSequence& item : items) tokens += item.num_new_tokens;
    // Forks share pages that the sum counts twice, but so does the limit.
    EXPECT_GT(tokens + kMaxSequences * kPageTokens, kMaxTokens)
        << "the tree alone kept a step within the limits from running";
    finish(below(requests_.size()));
    return;
  }
  ++steps_;
  for (Request& request : requests_) {
    if (below(4) == 0) continue;
    const Status inserted =
        tree_->insert(request.lease, request.id, request.tokens, request.salt,
                      {.priority = static_cast<int>(below(100)),
                       .seconds = below(2) == 0 ? 1e9 : static_cast<double>(below(50))});
    ASSERT_TRUE(inserted.has_value()) << inserted.error().message();
  }
}

void PrefixTreeProperty::finish(size_t index) {
  h_->remove(requests_[index].id);
  std::swap(requests_[index], requests_.back());
  requests_.pop_back();
}

void PrefixTreeProperty::fork() {
  if (requests_.empty()) return;
  const size_t index = below(requests_.size());
  const auto id = h_->fork(requests_[index].id);
  if (!id) return;
  const Request& source = requests_[index];
  Request copy{*id, source.salt, source.tokens, tree_->share(source.lease)};
  // Another continuation.
  copy.tokens.resize(cache().length(*id));
  const std::vector<int32_t> more = PrefixTreeProperty_tokens(seed_, 1, 5);
  copy.tokens.insert(copy.tokens.end(), more.begin(), more.end());
  if (copy.tokens.size() > 160) copy.tokens.resize(160);
  requests_.push_back(std::move(copy));
}

void PrefixTreeProperty::truncate() {
  if (requests_.empty()) return;
  Request& request = requests_[below(requests_.size())];
  const int64_t length = cache().length(request.id);
  const auto remain = h_->truncate(request.id, static_cast<int64_t>(below(length + 1)));
  ASSERT_TRUE(remain.has_value());
  tree_->truncate(request.lease, *remain / kPageTokens);
  request.tokens.resize(*remain);
  const std::vector<int32_t> more = PrefixTreeProperty_tokens(seed_, 1, 3);
  request.tokens.insert(request.tokens.end(), more.begin(), more.end());
  if (request.tokens.size() > 160) request.tokens.resize(160);
}

void PrefixTreeProperty::evict() {
  const int page_class = static_cast<int>(below(cache().num_page_classes()));
  const int64_t free = cache().page_class(page_class).free_pages;
  const int64_t wanted = 1 + static_cast<int64_t>(below(4));
  const int64_t at_least = tree_->evictable_pages(page_class);
  // Idle pages may be shared by sequences that did not lease them; then nothing is freed.
  const bool reached = tree_->evict(page_class, free + wanted);
  EXPECT_EQ(reached, cache().page_class(page_class).free_pages >= free + wanted);
  if (at_least == 0 && GetParam().window == 0) {
    EXPECT_FALSE(reached);
  }
  if (reached) ++evictions_;
}

void PrefixTreeProperty::check() {
  ASSERT_EQ(h_->check(), "");
  const Status status = tree_->check_invariants();
  ASSERT_TRUE(status.has_value()) << status.error().message();
  ASSERT_EQ(mirror_.error(), "");
  TreeMirror::Pages expected;
  tree_->for_each_page([&](const TreePage& page) {
    for (int g = 0; g < cache().num_groups(); ++g) {
      if (!page.held.has(g)) continue;
      expected[{Medium::kDevice, g, page.key}] = {
          page.parent_key, {page.token_ids.begin(), page.token_ids.end()}, std::string(page.salt)};
    }
  });
  ASSERT_EQ(mirror_.pages(), expected);
  ASSERT_EQ(cache().bytes().held_pages_now, tree_->stats().nodes);
  ASSERT_EQ(cache().bytes().held_bytes_now, tree_->stats().bytes);
}

TEST_P(PrefixTreeProperty, RequestsShareEvictAndLoad) {
  constexpr int kOperations = 800;
  for (int i = 0; i < kOperations; ++i) {
    SCOPED_TRACE("operation " + std::to_string(i));
    const uint64_t choice = below(100);
    if (requests_.empty() || choice < 20) {
      start();
    } else if (choice < 60) {
      step();
    } else if (choice < 75) {
      finish(below(requests_.size()));
    } else if (choice < 80) {
      fork();
    } else if (choice < 86) {
      truncate();
    } else if (choice < 92) {
      evict();
    } else if (choice < 98) {
      now_ += static_cast<double>(below(20));
      tree_->set_time(now_);
      shelf_->trim();
    } else {
      while (!requests_.empty()) finish(0);
      if (below(3) == 0) {
        ASSERT_TRUE(tree_->clear().has_value());
      }
    }
    check();
    if (HasFatalFailure() || HasNonfatalFailure()) return;
  }
  EXPECT_GT(steps_, 50);
  EXPECT_GT(hits_, 20);
  EXPECT_GT(loads_, 5);
  EXPECT_GT(evictions_, 3);
  while (!requests_.empty()) finish(0);
  ASSERT_TRUE(tree_->clear().has_value());
  check();
  EXPECT_EQ(cache().bytes().stored_pages_now, 0);
  EXPECT_EQ(cache().bytes().bf16_pages_now, 0);
}

INSTANTIATE_TEST_SUITE_P(Scenarios, PrefixTreeProperty, ::testing::ValuesIn(scenarios()),
                         [](const auto& scenario) { return scenario.param.name; });

}  // namespace
}  // namespace kvant::cache
