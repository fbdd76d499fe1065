// The plan of shared prefixes: with decode's plan every page of every sequence is read exactly
// once, results have places of their own in the order of the pages, and shares are equal. Runs on
// CPUs.
#include "kvant/backend/cuda/shared/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <string>

namespace kvant::backend::cuda {
namespace {

using cache::PageEntry;

constexpr int kPageTokens = 64;
constexpr int kHeads = 3;  // KV heads

uint32_t pack(PageEntry entry) {
  return uint32_t{entry.slot} << 8 | entry.kind;
}

// Page tables that a test writes.
class Batch {
 public:
  explicit Batch(int group = 4) : group_(group) {}

  // A sequence with its first `common` pages from `parent`, `own` further pages and an open one
  // with `open` tokens, the last `new_tokens` of them new.
  void add(int parent, int common, int own, int new_tokens = 1, int open = 1) {
    std::vector<PageEntry> stored;
    for (int page = 0; page < common; ++page) stored.push_back(stored_[parent][page]);
    for (int page = 0; page < own; ++page)
      stored.push_back(PageEntry::make(cache::kKindStored, next_slot_++));
    cache::SequenceView view;
    view.first_row = num_rows_;
    view.num_new_tokens = new_tokens;
    view.first_position = static_cast<int64_t>(stored.size()) * kPageTokens + open - new_tokens;
    view.bf16_first_page = static_cast<int64_t>(stored.size());
    num_rows_ += new_tokens;
    stored_.push_back(stored);
    bf16_.push_back(PageEntry::make(cache::kKindBf16, next_slot_++));
    views_.push_back(view);
  }
  PageEntry& page(size_t sequence, size_t page) { return stored_[sequence][page]; }

  const cache::GroupView& view() {
    for (size_t s = 0; s < views_.size(); ++s) {
      views_[s].stored = stored_[s].data();
      views_[s].bf16 = &bf16_[s];
    }
    view_.page_tokens = kPageTokens;
    view_.num_kv_heads = kHeads;
    view_.head_dim = 128;
    view_.sequences = views_;
    return view_;
  }
  void set_window(int window) { view_.window = window; }
  int group() const { return group_; }

 private:
  int group_;
  uint32_t next_slot_ = 0;
  int num_rows_ = 0;
  std::vector<cache::SequenceView> views_;
  std::vector<std::vector<PageEntry>> stored_;
  std::vector<PageEntry> bf16_;
  cache::GroupView view_;
};

SharedPlanShape shape_of(const Batch& batch, int num_blocks) {
  SharedPlanShape shape;
  shape.group = batch.group();
  shape.num_multiprocessors = num_blocks;
  shape.stored_bytes = 9216;
  shape.bf16_bytes = 32768;
  shape.always = true;
  return shape;
}

PlanShape decode_shape(const Batch& batch, const SharedPlan& plan) {
  PlanShape shape;
  shape.group = batch.group();
  shape.max_rows = batch.group() > 8 ? 16 : 8;
  shape.num_workers = 64;
  shape.block_workers = 4;
  shape.stored_bytes = 9216;
  shape.bf16_bytes = 32768;
  shape.elsewhere = plan.sequences;
  return shape;
}

// Pages by result: what each partial result of a query row covers.
using Pages = std::vector<uint32_t>;

struct Read {
  std::map<int64_t, Pages> results;  // by place in partial results: row of a partial
  std::map<int, int> pages_of_block;
};

Read read_items(const SharedPlan& plan, int max_rows) {
  Read read;
  int next_item = 0;
  for (size_t b = 0; b < plan.starts.size(); ++b) {
    const SharedStart& start = plan.starts[b];
    if (start.num_items == 0) continue;
    EXPECT_EQ(start.first_item, next_item);
    EXPECT_EQ(std::memcmp(&start.item, &plan.items[start.first_item], sizeof(SharedItem)), 0);
    next_item += start.num_items;
    for (int i = 0; i < start.num_items; ++i) {
      const SharedItem& item = plan.items[start.first_item + i];
      EXPECT_GT(item.num_pages, 0);
      read.pages_of_block[static_cast<int>(b)] += item.num_pages;
      for (int page = 0; page < item.num_pages; ++page) {
        const uint32_t entry = plan.entries[item.first_entry + page];
        if (i == 0 && page < kSharedStartEntries) {
          EXPECT_EQ(start.entries[page], entry);
        }
        const int part = item.part + (item.alternates != 0 ? page % 2 : 0);
        for (int row = 0; row < kSharedRows; ++row) {
          const int32_t place = plan.partial_rows[item.partial_rows + row];
          EXPECT_EQ(place < 0, plan.queries[item.queries + row] < 0);
          EXPECT_TRUE(place < 0 || item.alternates == 0 || row < kSharedHalfRows);
          if (place >= 0)
            read.results[place + static_cast<int64_t>(part) * max_rows].push_back(entry);
        }
      }
    }
  }
  EXPECT_EQ(next_item, static_cast<int>(plan.items.size()));
  return read;
}

// The pages of each result of a unit, decode's among them, are those of its sequence, each once.
// The first results are shared ones and their pages come in order.
void check_step(Batch& batch, const SharedPlan& plan) {
  const cache::GroupView& view = batch.view();
  const PlanShape shape = decode_shape(batch, plan);
  const DecodePlan decode = make_decode_plan(view, shape);
  SharedPlan placed = plan;
  const int query_heads = kHeads * batch.group();
  place_shared_rows(view, shape, decode, query_heads, placed);
  Read read = read_items(placed, shape.max_rows);
  std::set<int32_t> queries;
  for (const int32_t query : placed.queries)
    if (query >= 0) queries.insert(query);

  std::map<int, Pages> decode_pages;
  for (const Segment& segment : decode.segments) {
    for (int i = segment.page_begin; i < segment.page_end; ++i) {
      const int page =
          i < segment.num_sink_pages ? i : segment.first_page + i - segment.num_sink_pages;
      if (page >= segment.first_bf16_page) continue;
      decode_pages[segment.unit].push_back(decode.entries[segment.stored_entries + page]);
    }
  }
  size_t num_results = 0;
  for (const PlannedTile& tile : decode.tiles) {
    const cache::SequenceView& sequence = view.sequences[tile.sequence];
    const int parts_at = tile.sequence * kHeads;
    for (int head = 0; head < kHeads; ++head) {
      const int unit = tile.first_unit + head;
      const int parts =
          plan.sequences[tile.sequence].first_page > 0 ? plan.num_parts[parts_at + head] : 0;
      for (int row = 0; row < tile.num_rows; ++row) {
        Pages pages = decode_pages[unit];
        size_t first_page = 0;  // of the last result
        for (int part = 0; part < parts; ++part) {
          const int64_t at =
              static_cast<int64_t>(decode.first_partials[unit] + part) * shape.max_rows + row;
          const Pages& more = read.results[at];
          pages.insert(pages.end(), more.begin(), more.end());
          ++num_results;
          if (more.empty()) continue;  // of a page alone, and two warpgroups
          const auto* found =
              std::find_if(sequence.stored, sequence.stored + sequence.bf16_first_page,
                           [&](PageEntry entry) { return pack(entry) == more.front(); });
          EXPECT_GE(static_cast<size_t>(found - sequence.stored), first_page);
          first_page = static_cast<size_t>(found - sequence.stored);
        }
        if (parts > 0) {
          const int32_t query =
              (tile.first_row + row / batch.group()) * query_heads + row % batch.group();
          EXPECT_TRUE(queries.count(query)) << query;
        }
        Pages expected;
        for (int64_t page = 0; page < sequence.bf16_first_page; ++page)
          expected.push_back(pack(sequence.stored[page]));
        std::sort(pages.begin(), pages.end());
        std::sort(expected.begin(), expected.end());
        EXPECT_EQ(pages, expected) << "sequence " << tile.sequence << ", head " << head;
      }
    }
  }
  EXPECT_EQ(num_results, read.results.size()) << "results that nobody merges";
  // Results of a unit lie side by side, shared ones first.
  for (const SplitUnit& unit : decode.split_units)
    EXPECT_LE(unit.first_partial + unit.num_partials, decode.num_partials);
}

TEST(SharedPlan, NothingWithoutCommonPages) {
  Batch batch;
  batch.add(0, 0, 100);
  EXPECT_TRUE(make_shared_plan(batch.view(), shape_of(batch, 132)).empty());
  for (int s = 0; s < 10; ++s) batch.add(0, 0, 100);
  EXPECT_TRUE(make_shared_plan(batch.view(), shape_of(batch, 132)).empty());
  for (int s = 0; s < 10; ++s) batch.add(0, 50, 50);
  EXPECT_FALSE(make_shared_plan(batch.view(), shape_of(batch, 132)).empty());
  batch.set_window(500);
  EXPECT_TRUE(make_shared_plan(batch.view(), shape_of(batch, 132)).empty());
}

TEST(SharedPlan, OnlyWhereItPays) {
  const auto shares = [](int count, int pages) {
    Batch batch;
    for (int s = 0; s < count; ++s) batch.add(0, s > 0 ? pages : 0, s > 0 ? 1 : pages + 1);
    SharedPlanShape shape = shape_of(batch, 132);
    shape.always = false;
    return !make_shared_plan(batch.view(), shape).empty();
  };
  EXPECT_TRUE(shares(32, 256));
  EXPECT_FALSE(shares(32, 1)) << "too few pages";
  EXPECT_FALSE(shares(1, 256));
  EXPECT_TRUE(shares(256, 256));
}

TEST(SharedPlan, ReadsEveryPageOnce) {
  for (const int count : {2, 5, 16, 17, 32, 33, 100}) {
    for (const int pages : {1, 7, 256}) {
      for (const int blocks : {1, 7, 132}) {
        for (const int group : {1, 4, 7, 16}) {
          if (pages > 7 && count > 33) continue;  // the same, slowly
          Batch batch(group);
          // Ragged: the last sequence has nothing of its own but the open page.
          for (int s = 0; s < count; ++s)
            batch.add(0, s > 0 ? pages : 0, s > 0 ? (count - 1 - s) % 5 : pages + 2, 1, 1 + s % 60);
          SharedPlanShape shape = shape_of(batch, blocks);
          const SharedPlan plan = make_shared_plan(batch.view(), shape);
          EXPECT_FALSE(plan.empty());
          SCOPED_TRACE(std::to_string(count) + " sequences, " + std::to_string(pages) + " pages, " +
                       std::to_string(blocks) + " blocks, group " + std::to_string(group));
          check_step(batch, plan);
        }
      }
    }
  }
}

TEST(SharedPlan, NestedAndSeveralGroups) {
  Batch batch;
  batch.add(0, 0, 300);                                   // 0
  for (int s = 1; s < 20; ++s) batch.add(0, 100, s % 3);  // common with 0 up to 100
  for (int s = 20; s < 40; ++s) batch.add(0, 250, 3);     // and up to 250
  batch.add(0, 0, 80);                                    // 40: strangers
  for (int s = 41; s < 50; ++s) batch.add(40, 80, 10 + s);
  batch.add(0, 0, 30);
  SharedPlanShape shape = shape_of(batch, 132);
  const SharedPlan plan = make_shared_plan(batch.view(), shape);
  ASSERT_FALSE(plan.empty());
  EXPECT_EQ(plan.sequences[1].first_page, 100);
  EXPECT_EQ(plan.sequences[0].first_page, 250);
  EXPECT_EQ(plan.sequences[25].first_page, 250);
  EXPECT_EQ(plan.sequences[45].first_page, 80);
  EXPECT_EQ(plan.sequences[50].first_page, 0);
  check_step(batch, plan);
}

TEST(SharedPlan, SinkPagesAreEachSequencesOwn) {
  Batch batch;
  batch.add(0, 0, 50);
  batch.page(0, 0) = PageEntry::make(cache::kKindBf16, 5000);
  for (int s = 0; s < 9; ++s) batch.add(0, 40, 3);
  const SharedPlan plan = make_shared_plan(batch.view(), shape_of(batch, 132));
  ASSERT_FALSE(plan.empty());
  EXPECT_EQ(plan.sequences[3].num_sink_pages, 1);
  EXPECT_EQ(plan.runs[0].first_page, 1);
  check_step(batch, plan);
}

// A page of another kind ends what is shared.
TEST(SharedPlan, StopsAtPagesOfOtherKinds) {
  Batch batch;
  batch.add(0, 0, 50);
  batch.page(0, 20) = PageEntry::make(cache::kKindBf16, 5000);
  for (int s = 0; s < 9; ++s) batch.add(0, 40, 3);
  for (int s = 0; s < 9; ++s) batch.add(0, 48, 3);
  const SharedPlan plan = make_shared_plan(batch.view(), shape_of(batch, 132));
  ASSERT_FALSE(plan.empty());
  for (const ReadElsewhere& sequence : plan.sequences) EXPECT_EQ(sequence.first_page, 20);
  check_step(batch, plan);
}

TEST(SharedPlan, SeveralNewTokens) {
  Batch batch(4);
  batch.add(0, 0, 50, 5, 5);
  for (int s = 0; s < 9; ++s) batch.add(0, 40, 3, 1 + s % 5, 5 + s);
  const SharedPlan plan = make_shared_plan(batch.view(), shape_of(batch, 132));
  ASSERT_FALSE(plan.empty());
  check_step(batch, plan);
}

TEST(SharedPlan, SharesAreEqualAndTheSameEveryTime) {
  Batch batch;
  for (int s = 0; s < 32; ++s) batch.add(0, s > 0 ? 256 : 0, s > 0 ? 16 : 272);
  const SharedPlanShape shape = shape_of(batch, 132);
  const SharedPlan plan = make_shared_plan(batch.view(), shape);
  ASSERT_EQ(plan.runs.size(), 1u);
  int most = 0;
  for (const SharedStart& start : plan.starts) most = std::max(most, start.item.num_pages);
  const int blocks = static_cast<int>(plan.starts.size());
  EXPECT_LT(blocks, 132) << "decode needs some";
  EXPECT_LE(most, (256 * kHeads + blocks - 1) / blocks + 1);
  const SharedPlan again = make_shared_plan(batch.view(), shape);
  ASSERT_EQ(again.items.size(), plan.items.size());
  EXPECT_EQ(
      std::memcmp(again.items.data(), plan.items.data(), plan.items.size() * sizeof(SharedItem)),
      0);
  check_step(batch, plan);
}

}  // namespace
}  // namespace kvant::backend::cuda
