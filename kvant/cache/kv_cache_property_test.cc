// Random operation sequences against the model of cache_harness.h: after every operation the
// cache's integrity holds, in every step every page that a query may read holds what it must, and
// steps within the configured limits never fail.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "kvant/cache/kv_cache.h"
#include "kvant/cache/testing/cache_harness.h"

namespace kvant::cache {
namespace {

using testing::CacheHarness;
using testing::NewTokens;
using testing::next_random;
using testing::random_tokens;
using testing::StepEnd;

struct Scenario {
  const char* name;
  const char* spec;
  int window;
  int page_tokens;
  int64_t max_tokens;
  int max_sequences;
  int max_step_tokens;
  int64_t max_sequence_tokens = 0;
};

// Pages held outside sequences at a time; the caches have room for so many.
constexpr int64_t kMaxHeld = 6;

constexpr Scenario kScenarios[] = {
    {"four_bit", "4bit", 0, 16, 260, 4, 90},
    {"four_bit_window", "4bit", 40, 16, 260, 4, 90},
    {"mean_window_large_pages", "k=fp8+mean,v=nvfp4+46+sink", 20, 32, 400, 3, 150},
    {"recent", "k=int8,v=int4+recent20", 0, 16, 260, 4, 90},
    {"recent_sink_window", "k=nvfp4+mean,v=nvfp4+sink+recent40", 33, 16, 300, 3, 100},
    {"plain", "bf16", 0, 16, 200, 4, 60},
    {"plain_window", "bf16", 24, 16, 200, 4, 60},
    {"short_sequences", "4bit", 40, 16, 400, 4, 90, 130},
    {"strict", "k=fp8:token,v=mxfp4+strict", 40, 16, 260, 3, 90},
    {"one_sequence", "k=int3:channel,v=nvfp4+sink", 17, 16, 250, 1, 200},
    {"tiny_steps", "4bit", 40, 16, 120, 6, 5},
    {"planned", "k=fp8:head+bias+smooth,v=fp8+bias", 40, 16, 200, 3, 64},
};

void PrintTo(const Scenario& setup, std::ostream* out) {
  *out << setup.name;
}

class KvCacheProperty : public ::testing::TestWithParam<Scenario> {
 protected:
  void SetUp() override {
    const Scenario& setup = GetParam();
    CacheConfig config;
    config.layers = {{.num_kv_heads = 1, .head_dim = 32},
                     {.num_kv_heads = 2, .head_dim = 16, .window = setup.window},
                     {.num_kv_heads = 1, .head_dim = 32}};
    plan_ = testing::make_test_plan(config.layers);
    config.plan = &plan_;
    auto format = formats::parse_cache_format(setup.spec);
    ASSERT_TRUE(format.has_value());
    config.format = *format;
    config.page_tokens = setup.page_tokens;
    config.max_tokens = setup.max_tokens;
    config.max_sequence_tokens = setup.max_sequence_tokens;
    config.held_sink_pages = kMaxHeld;
    config.held_windows = kMaxHeld;
    config.max_sequences = setup.max_sequences;
    config.max_step_tokens = setup.max_step_tokens;
    auto harness = CacheHarness::create(config);
    ASSERT_TRUE(harness.has_value()) << harness.error().message();
    harness_ = std::move(*harness);
  }

  uint64_t below(uint64_t n) { return next_random(seed_) % n; }

  SequenceId any_sequence() {
    auto it = harness_->sequences().begin();
    std::advance(it, static_cast<int64_t>(below(harness_->sequences().size())));
    return it->first;
  }

  int64_t total_tokens() const { return harness_->cache().bytes().tokens_now; }

  void do_step();
  void do_truncate();
  void do_import();
  void do_hold();
  void do_release();
  void do_attach();
  void do_move();
  // Held pages next to each other that begin at page `first`, as many as random says.
  std::vector<size_t> held_run(int64_t first);

  int64_t longest() const {
    const Scenario& setup = GetParam();
    return setup.max_sequence_tokens > 0 ? setup.max_sequence_tokens : setup.max_tokens;
  }
  // Tokens in the pool, counted as if nothing were shared.
  int64_t tokens_held() const {
    return total_tokens() + static_cast<int64_t>(held_.size()) * GetParam().page_tokens;
  }
  bool recent() const { return harness_->config().format.recent_tokens > 0; }

  formats::QuantPlan plan_;
  struct Held {
    HeldPage page;
    std::vector<uint32_t> tokens;
  };
  std::unique_ptr<CacheHarness> harness_;
  std::vector<Held> held_;  // dies before the harness
  uint64_t seed_ = 20;
  int committed_ = 0, refused_ = 0, imported_ = 0, attached_ = 0, moved_ = 0;
};

void KvCacheProperty::do_step() {
  std::vector<NewTokens> batch;
  int64_t room = GetParam().max_step_tokens;
  int64_t new_tokens = 0;
  bool fits = true;
  for (const auto& [id, tokens] : harness_->sequences()) {
    if (below(3) == 0 || room == 0) continue;
    // Single tokens, small and large chunks.
    const uint64_t kind = below(3);
    int64_t n = kind == 0 ? 1 : 1 + static_cast<int64_t>(below(kind == 1 ? 10 : 100));
    n = std::min(n, room);
    room -= n;
    new_tokens += n;
    if (static_cast<int64_t>(tokens.size()) + n > longest()) fits = false;
    batch.push_back({id, random_tokens(seed_, n)});
  }
  if (batch.empty()) return;
  const CacheBytes before = harness_->cache().bytes();
  const int64_t tokens_before = tokens_held();
  std::vector<StepSequence> items;
  for (const NewTokens& item : batch)
    items.push_back({item.id, static_cast<int32_t>(item.tokens.size())});
  const auto needed = harness_->cache().needed_pages(items);
  EXPECT_EQ(needed.has_value(), fits);
  bool enough = fits;
  for (int c = 0; needed && c < harness_->cache().num_page_classes(); ++c)
    enough = enough && (*needed)[c] <= harness_->cache().page_class(c).free_pages;
  const Status status = harness_->step(batch, below(5) == 0 ? StepEnd::kAbort : StepEnd::kCommit);
  EXPECT_EQ(status.has_value(), enough) << "needed_pages says what begin_step does";
  if (status) {
    EXPECT_TRUE(fits);
    ++committed_;
    return;
  }
  ASSERT_EQ(status.error().code(), ErrorCode::kResourceExhausted) << status.error().message();
  EXPECT_TRUE(!fits || tokens_before + new_tokens > GetParam().max_tokens)
      << "a step within the limits failed: " << status.error().message();
  const CacheBytes after = harness_->cache().bytes();
  EXPECT_EQ(before.stored_pages_now, after.stored_pages_now);
  EXPECT_EQ(before.bf16_pages_now, after.bf16_pages_now);
  ++refused_;
}

void KvCacheProperty::do_truncate() {
  const SequenceId id = any_sequence();
  const int64_t length = static_cast<int64_t>(harness_->tokens(id).size());
  const int64_t t = GetParam().page_tokens;
  // Mostly a few tokens, as speculative decoding does.
  const int64_t target = below(4) == 0 ? static_cast<int64_t>(below(length + 1))
                                       : std::max<int64_t>(0, length - 1 - below(8));
  const auto remain = harness_->truncate(id, target);
  ASSERT_TRUE(remain.has_value());
  EXPECT_LE(*remain, std::min(target, length));
  if (length % t != 0 && target >= length / t * t) {
    EXPECT_EQ(*remain, std::min(target, length)) << "truncation within the open page is exact";
  }
}

// Exports every page of a sequence and imports them as a new one.
void KvCacheProperty::do_import() {
  const SequenceId source = any_sequence();
  const std::vector<uint32_t> tokens = harness_->tokens(source);
  const int64_t t = GetParam().page_tokens;
  const int64_t pages = static_cast<int64_t>(tokens.size()) / t;
  const auto copy = harness_->add();
  if (!copy) return;
  const bool recent = harness_->config().format.recent_tokens > 0;
  for (int64_t page = 0; page < pages; ++page) {
    const auto objects = harness_->export_page(source, page);
    if (!objects) {
      EXPECT_TRUE(recent) << objects.error().message();
      break;
    }
    const Status status =
        harness_->import_page(*copy, *objects, std::span(tokens).subspan(page * t, t));
    if (!status && status.error().code() == ErrorCode::kResourceExhausted) break;
    if (recent) {
      ASSERT_FALSE(status.has_value());
      EXPECT_EQ(status.error().code(), ErrorCode::kUnsupported);
      break;
    }
    ASSERT_TRUE(status.has_value()) << status.error().message();
    ++imported_;
  }
  // A sequence whose import stopped early may lack pages of its window; it is given up like that.
  if (static_cast<int64_t>(harness_->tokens(*copy).size()) < pages * t) harness_->remove(*copy);
}

void KvCacheProperty::do_hold() {
  const SequenceId source = any_sequence();
  const std::vector<uint32_t>& tokens = harness_->tokens(source);
  const int64_t t = GetParam().page_tokens;
  const int64_t pages = static_cast<int64_t>(tokens.size()) / t;
  EXPECT_FALSE(harness_->cache().hold_page(source, pages).has_value()) << "not full";
  if (pages == 0 || static_cast<int64_t>(held_.size()) == kMaxHeld) return;
  const int64_t page = static_cast<int64_t>(below(pages));
  auto held = harness_->cache().hold_page(source, page);
  if (recent() && !held) {
    EXPECT_EQ(held.error().code(), ErrorCode::kUnsupported);
    return;
  }
  ASSERT_TRUE(held.has_value()) << held.error().message();
  EXPECT_EQ(held->page(), page);
  held_.push_back({std::move(*held), {tokens.begin() + page * t, tokens.begin() + (page + 1) * t}});
}

void KvCacheProperty::do_release() {
  if (held_.empty()) return;
  const size_t i = below(held_.size());
  std::swap(held_[i], held_.back());
  if (below(4) == 0) {
    for (int g = 0; g < harness_->cache().num_groups(); ++g) {
      if (harness_->cache().group(g).geometry.window > 0) held_.back().page.drop(g);
    }
    return;
  }
  held_.pop_back();
}

std::vector<size_t> KvCacheProperty::held_run(int64_t first) {
  std::vector<size_t> run;
  while (run.empty() || below(6) != 0) {
    std::vector<size_t> fitting;
    for (size_t i = 0; i < held_.size(); ++i) {
      if (held_[i].page.page() == first + static_cast<int64_t>(run.size())) fitting.push_back(i);
    }
    if (fitting.empty()) break;
    run.push_back(fitting[below(fitting.size())]);
  }
  return run;
}

// Appends held pages to a sequence that is cut to a page boundary, or to a new one.
void KvCacheProperty::do_attach() {
  const int64_t t = GetParam().page_tokens;
  SequenceId id = any_sequence();
  if (below(2) == 0) {
    const auto fresh = harness_->add();
    if (!fresh) return;
    id = *fresh;
  }
  const int64_t cut = static_cast<int64_t>(harness_->tokens(id).size()) / t * t;
  ASSERT_TRUE(harness_->truncate(id, cut).has_value());
  const int64_t length = static_cast<int64_t>(harness_->tokens(id).size());
  if (length % t != 0) return;
  const std::vector<size_t> run = held_run(length / t);
  std::vector<const HeldPage*> pages;
  std::vector<uint32_t> tokens;
  for (const size_t i : run) {
    pages.push_back(&held_[i].page);
    tokens.insert(tokens.end(), held_[i].tokens.begin(), held_[i].tokens.end());
  }
  const CacheBytes before = harness_->cache().bytes();
  const Status status = harness_->attach(id, pages, tokens);
  const bool room = length + static_cast<int64_t>(tokens.size()) <= longest();
  ASSERT_EQ(status.has_value(), room) << (status ? "" : status.error().message());
  if (!room) return;
  EXPECT_LE(harness_->cache().bytes().stored_pages_now, before.stored_pages_now);
  EXPECT_LE(harness_->cache().bytes().bf16_pages_now, before.bf16_pages_now);
  attached_ += static_cast<int>(run.size());
  // As after an import, a sequence that lacks pages of its window is given up.
  const StepSequence item{id, 1};
  const auto needed = harness_->cache().needed_pages(std::span(&item, 1));
  if (!needed && needed.error().code() == ErrorCode::kInvalidArgument) harness_->remove(id);
}

// A held page leaves as page objects and comes back.
void KvCacheProperty::do_move() {
  if (held_.empty()) return;
  Held& held = held_[below(held_.size())];
  auto objects = harness_->export_held(held.page, held.tokens);
  ASSERT_TRUE(objects.has_value()) << objects.error().message();
  const int64_t page = held.page.page();
  std::vector<bool> had;
  for (int g = 0; g < harness_->cache().num_groups(); ++g) had.push_back(held.page.has(g));
  held.page = {};
  const bool own_layout = below(2) == 0;
  for (auto& object : *objects) {
    if (object.empty() || !own_layout) continue;
    auto converted = harness_->cache().convert_object(object, harness_->config().layout);
    ASSERT_TRUE(converted.has_value()) << converted.error().message();
    EXPECT_EQ(*harness_->cache().convert_object(*converted, Layout::kPlanar), object);
    object = std::move(*converted);
  }
  const std::vector<std::span<const std::byte>> spans(objects->begin(), objects->end());
  auto back = harness_->cache().import_held(spans);
  if (!back) {
    // Its slot was shared, so that giving it up freed nothing.
    ASSERT_EQ(back.error().code(), ErrorCode::kResourceExhausted) << back.error().message();
    std::swap(held, held_.back());
    held_.pop_back();
    return;
  }
  EXPECT_EQ(back->page(), page);
  for (int g = 0; g < harness_->cache().num_groups(); ++g) EXPECT_EQ(back->has(g), had[g]);
  held.page = std::move(*back);
  ++moved_;
}

TEST_P(KvCacheProperty, RandomOperationsKeepContentAndIntegrity) {
  constexpr int kOperations = 2000;
  for (int i = 0; i < kOperations; ++i) {
    SCOPED_TRACE("operation " + std::to_string(i));
    const uint64_t choice = below(100);
    if (harness_->sequences().empty() || choice < 10) {
      (void)harness_->add();
    } else if (choice < 60) {
      do_step();
    } else if (choice < 65) {
      do_hold();
    } else if (choice < 67) {
      do_release();
    } else if (choice < 71) {
      do_attach();
    } else if (choice < 73) {
      do_move();
    } else if (choice < 81) {
      do_truncate();
    } else if (choice < 88) {
      (void)harness_->fork(any_sequence());
    } else if (choice < 91) {
      do_import();
    } else {
      harness_->remove(any_sequence());
    }
    ASSERT_EQ(harness_->check(), "");
    if (HasFatalFailure() || HasNonfatalFailure()) return;
  }
  EXPECT_GT(committed_, kOperations / 5);
  EXPECT_GT(refused_, 0);
  if (GetParam().max_sequences > 1 && harness_->config().format.recent_tokens == 0) {
    EXPECT_GT(imported_, 0);
  }
  if (!recent()) {
    EXPECT_GT(attached_, 10);
    EXPECT_GT(moved_, 10);
  }
  while (!harness_->sequences().empty()) harness_->remove(any_sequence());
  EXPECT_EQ(harness_->cache().bytes().held_pages_now, static_cast<int64_t>(held_.size()));
  EXPECT_EQ(harness_->check(), "");
  held_.clear();
  EXPECT_EQ(harness_->cache().bytes().held_bytes_now, 0);
  EXPECT_EQ(harness_->cache().bytes().stored_pages_now, 0);
  EXPECT_EQ(harness_->cache().bytes().bf16_pages_now, 0);
  EXPECT_EQ(harness_->check(), "");
}

INSTANTIATE_TEST_SUITE_P(Scenarios, KvCacheProperty, ::testing::ValuesIn(kScenarios),
                         [](const auto& scenario) { return std::string(scenario.param.name); });

}  // namespace
}  // namespace kvant::cache
