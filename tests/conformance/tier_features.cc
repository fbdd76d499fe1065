// Features of the tiers: for every format, pages that left the cache come back as they were.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kvant/cache/prefix_tree.h"
#include "kvant/serve/tiers/disk_store.h"
#include "kvant/serve/tiers/host_store.h"
#include "kvant/serve/tiers/page_tiers.h"
#include "kvant/serve/tiers/session_file.h"
#include "kvant/serve/tiers/testing/test_pages.h"
#include "tests/conformance/cache_fixture.h"
#include "tests/conformance/conformance.h"

namespace kvant::conformance {
namespace {

using cache::PrefixLease;
using cache::PrefixTree;
using cache::SequenceId;

constexpr int64_t kTokens = 75;
constexpr int64_t kPages = kTokens / kPage;

std::vector<int32_t> as_tokens(const std::vector<uint32_t>& ids) {
  return {ids.begin(), ids.end()};
}

// Computes a prompt, evicts all of it from the tree, and serves it again from the store. The
// harness compares every page that is read with what its tokens say.
void round_trip(Fixture& f, std::unique_ptr<serve::PageStore> store) {
  cache::testing::CacheHarness& h = *f.harness;
  auto tree = PrefixTree::create(h.cache());
  CHECK_OK(tree);
  std::vector<serve::TierSetup> setups;
  setups.push_back({std::move(store), {}});
  serve::PageTiers tiers(h.cache(), std::move(setups));
  (*tree)->set_listener(&tiers);
  uint64_t seed = 7;
  const std::vector<uint32_t> ids = cache::testing::random_tokens(seed, kTokens);
  const std::vector<int32_t> tokens = as_tokens(ids);
  {
    const SequenceId first = *h.add();
    PrefixLease lease;
    CHECK_OK(h.extend(first, ids));
    CHECK_OK((*tree)->insert(lease, first, tokens, ""));
    h.remove(first);
  }
  for (int c = 0; c < h.cache().num_page_classes(); ++c) (*tree)->evict(c, 1 << 20);
  EXPECT_EQ((*tree)->stats().nodes, 0);
  EXPECT_EQ(h.cache().bytes().stored_pages_now, 0);

  const auto id = tiers.prefetch({.first_page = 0,
                                  .parent_key = {},
                                  .tokens = {tokens.begin(), tokens.begin() + kPages * kPage},
                                  .salt = ""});
  tiers.wait_idle();
  {
    PrefixLease lease;
    EXPECT_EQ(tiers.install(id, **tree, lease), kPages);
  }
  const cache::PrefixMatch match = (*tree)->match(tokens, "", kTokens - 1);
  EXPECT_EQ(match.num_pages, kPages);
  const PrefixLease lease = (*tree)->acquire(match);
  const SequenceId second = *h.add();
  CHECK_OK((*tree)->attach(lease, second));
  h.note(second, std::span(ids).first(match.num_pages * kPage));
  CHECK_OK(h.extend(second, std::span(ids).subspan(match.num_pages * kPage)));
  CHECK_OK(h.extend(second, cache::testing::random_tokens(seed, 30)));
  CHECK_OK((*tree)->check_invariants());
  EXPECT_EQ(h.check(), "");
}

void tier_round_trips(const std::string& spec) {
  const serve::testing::TemporaryFolder folder;
  for (const bool on_disk : {false, true}) {
    Fixture f(spec);
    f.config.held_sink_pages = f.config.held_windows = 4;
    if (!f.create()) return;
    if (f.recent()) {  // refused by design
      const auto tree = PrefixTree::create(f.harness->cache());
      ASSERT_FALSE(tree.has_value());
      EXPECT_EQ(tree.error().code(), ErrorCode::kUnsupported);
      return;
    }
    std::unique_ptr<serve::PageStore> store = std::make_unique<serve::HostStore>(1 << 22);
    if (on_disk) {
      auto disk = serve::DiskStore::open(folder.path(), 1 << 22);
      CHECK_OK(disk);
      store = std::move(*disk);
    }
    round_trip(f, std::move(store));
  }
}

void session_goes_on(const std::string& spec) {
  const serve::testing::TemporaryFolder folder;
  const std::string path = folder.path() + "/session";
  Fixture f(spec);
  if (!f.create()) return;
  uint64_t seed = 8;
  const std::vector<uint32_t> ids = cache::testing::random_tokens(seed, kTokens);
  const SequenceId id = *f.harness->add();
  CHECK_OK(f.harness->extend(id, ids));
  const auto saved = serve::save_session(path, f.harness->cache(), id, as_tokens(ids));
  if (f.recent() && !f.config.format.is_bf16()) {  // its last pages are not closed
    EXPECT_FALSE(saved.has_value());
    return;
  }
  CHECK_OK(saved);
  Fixture other(spec);
  if (!other.create()) return;
  const SequenceId copy = *other.harness->add();
  CHECK_OK(serve::restore_session(path, other.harness->cache(), copy));
  other.harness->note(copy, std::span(ids).first(*saved));
  CHECK_OK(other.harness->extend(copy, std::span(ids).subspan(*saved)));
  EXPECT_EQ(other.harness->check(), "");
}

constexpr Feature kTierFeatures[] = {
    {"tier_round_trips", tier_round_trips},
    {"session_goes_on", session_goes_on},
};

}  // namespace

std::span<const Feature> tier_features() {
  return kTierFeatures;
}

}  // namespace kvant::conformance
