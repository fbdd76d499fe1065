// The plan of a decode step: everything is read exactly once, shares are equal, and results come
// together in order. Runs on CPUs.
#include "kvant/backend/cuda/decode/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>

namespace kvant::backend::cuda {
namespace {

using cache::PageEntry;

struct Sequences {
  std::vector<cache::SequenceView> views;
  std::vector<std::vector<PageEntry>> stored, bf16;
  cache::GroupView group;
};

// Sequences of `lengths` tokens after a step of `new_tokens` each; page p of sequence s has slot
// 1000 s + p, BF16 pages those slots plus 500.
Sequences make_sequences(const std::vector<int64_t>& lengths, int new_tokens, int page_tokens,
                         int window = 0) {
  Sequences made;
  int row = 0;
  for (size_t s = 0; s < lengths.size(); ++s) {
    cache::SequenceView view;
    view.first_row = row;
    view.num_new_tokens = new_tokens;
    view.first_position = lengths[s] - new_tokens;
    const int64_t last_page = (lengths[s] - 1) / page_tokens;
    view.bf16_first_page = view.first_position / page_tokens;
    std::vector<PageEntry> stored, bf16;
    for (int64_t page = 0; page <= last_page; ++page)
      stored.push_back(PageEntry::make(cache::kKindStored, static_cast<uint32_t>(1000 * s + page)));
    for (int64_t page = view.bf16_first_page; page <= last_page; ++page)
      bf16.push_back(
          PageEntry::make(cache::kKindBf16, static_cast<uint32_t>(1000 * s + page + 500)));
    made.stored.push_back(stored);
    made.bf16.push_back(bf16);
    made.views.push_back(view);
    row += new_tokens;
  }
  for (size_t s = 0; s < lengths.size(); ++s) {
    made.views[s].stored = made.stored[s].data();
    made.views[s].bf16 = made.bf16[s].data();
  }
  made.group.page_tokens = page_tokens;
  made.group.num_kv_heads = 3;
  made.group.head_dim = 128;
  made.group.window = window;
  made.group.sequences = made.views;
  return made;
}

PlanShape shape_of(int group, int max_rows, int workers) {
  PlanShape shape;
  shape.group = group;
  shape.max_rows = max_rows;
  shape.num_workers = workers;
  shape.block_workers = 4;
  shape.stored_bytes = 9216;
  shape.bf16_bytes = 32768;
  return shape;
}

// The open page is read by 16 tokens.
int64_t cost_of(const Segment& segment, int page_tokens) {
  int64_t cost = 0;
  const int last = segment.first_position + segment.num_tokens - 1;
  for (int index = segment.page_begin; index < segment.page_end; ++index) {
    const int page = segment.first_page + index;
    if (page == last / page_tokens) {
      cost += (last % page_tokens / 16 + 1) * 16 * 32768 / page_tokens;
    } else {
      cost += page >= segment.first_bf16_page ? 32768 : 9216;
    }
  }
  return cost;
}

// Segments of each unit cover its pages once and in order; a worker's are consecutive.
void check_cover(const DecodePlan& plan, int num_workers) {
  int next_segment = 0;
  for (int w = 0; w < num_workers; ++w) {
    const WorkerStart& start = plan.workers[w];
    if (start.num_segments == 0) continue;
    EXPECT_EQ(start.first_segment, next_segment);
    next_segment += start.num_segments;
    EXPECT_EQ(start.segment.unit, plan.segments[start.first_segment].unit);
    EXPECT_EQ(start.segment.page_begin, plan.segments[start.first_segment].page_begin);
  }
  EXPECT_EQ(next_segment, static_cast<int>(plan.segments.size()));
  int unit = -1, page = 0, end = 0;
  for (const Segment& segment : plan.segments) {
    if (segment.unit != unit) {
      EXPECT_EQ(page, end) << "unit " << unit << " is not read to its end";
      EXPECT_EQ(segment.unit, unit + 1);
      unit = segment.unit;
      page = 0;
      const int own_page = segment.first_position / 64;
      end = segment.num_sink_pages + own_page + 1 - segment.first_page;
    }
    EXPECT_EQ(segment.page_begin, page);
    EXPECT_GT(segment.page_end, segment.page_begin);
    page = segment.page_end;
  }
  EXPECT_EQ(page, end);
}

TEST(DecodePlan, CoversEveryPageOnceAndEvenly) {
  for (const std::vector<int64_t>& lengths :
       {std::vector<int64_t>{1}, std::vector<int64_t>{32769}, std::vector<int64_t>{131073, 4097},
        std::vector<int64_t>(31, 4097), std::vector<int64_t>(7, 64),
        std::vector<int64_t>(64, 4100)}) {
    for (const int workers : {4, 132, 1056}) {
      const Sequences sequences = make_sequences(lengths, 1, 64);
      const PlanShape shape = shape_of(4, 8, workers);
      const DecodePlan plan = make_decode_plan(sequences.group, shape);
      check_cover(plan, workers);
      int64_t total = 0;
      std::vector<int64_t> load(static_cast<size_t>(workers));
      for (int w = 0; w < workers; ++w) {
        const WorkerStart& start = plan.workers[w];
        for (int i = 0; i < start.num_segments; ++i)
          load[w] += cost_of(plan.segments[start.first_segment + i], 64);
        total += load[w];
      }
      // Within half a page at each end of the share.
      const int64_t largest = lengths[0] == 64 ? 32768 : 9216;
      EXPECT_LE(*std::max_element(load.begin(), load.end()), total / workers + largest);
    }
  }
}

TEST(DecodePlan, PartialResultsOfBlocksAreConsecutive) {
  const Sequences sequences = make_sequences({20001, 777, 5000}, 1, 64);
  const PlanShape shape = shape_of(4, 8, 64);
  const DecodePlan plan = make_decode_plan(sequences.group, shape);
  std::vector<int> owner(plan.segments.size());
  for (int w = 0; w < shape.num_workers; ++w) {
    for (int i = 0; i < plan.workers[w].num_segments; ++i)
      owner[plan.workers[w].first_segment + i] = w;
  }
  std::map<int, std::vector<int>> blocks_of_unit, partials_of_unit;
  for (size_t i = 0; i < plan.segments.size(); ++i) {
    const Segment& segment = plan.segments[i];
    auto& blocks = blocks_of_unit[segment.unit];
    const int block = owner[i] / shape.block_workers;
    if (blocks.empty() || blocks.back() != block) {
      blocks.push_back(block);
      partials_of_unit[segment.unit].push_back(segment.partial);
    } else {
      EXPECT_EQ(segment.is_shared, 1);
      EXPECT_EQ(segment.partial, partials_of_unit[segment.unit].back());
    }
  }
  size_t num_split = 0;
  int next = 0;
  for (const auto& [unit, partials] : partials_of_unit) {
    if (partials.size() == 1) {
      EXPECT_EQ(partials[0], -1);
      continue;
    }
    for (const int partial : partials) EXPECT_EQ(partial, next++);
    EXPECT_EQ(plan.split_units[num_split].num_partials, static_cast<int>(partials.size()));
    ++num_split;
  }
  EXPECT_EQ(plan.split_units.size(), num_split);
  EXPECT_EQ(plan.num_partials, next);
  EXPECT_LE(plan.num_partials, 2 * shape.num_workers / shape.block_workers);
}

// Tiles end where pages end: all rows of a tile read the same pages in the same form.
// Bytes of each block's share.
std::vector<int64_t> block_loads(const DecodePlan& plan, const PlanShape& shape) {
  std::vector<int64_t> loads(static_cast<size_t>(shape.num_workers / shape.block_workers));
  for (int w = 0; w < shape.num_workers; ++w) {
    const WorkerStart& start = plan.workers[w];
    for (int i = 0; i < start.num_segments; ++i)
      loads[w / shape.block_workers] += cost_of(plan.segments[start.first_segment + i], 64);
  }
  return loads;
}

TEST(DecodePlan, UnitsStayInBlocksWhereThatCostsLessThanMerging) {
  PlanShape shape = shape_of(4, 8, 132 * 4);
  shape.merge_bytes = 64 << 10;
  struct Case {
    std::vector<int64_t> lengths;
    bool whole;
  };
  // Three KV heads each. 88 sequences are two units a block, 45 one for most blocks.
  for (const Case& c :
       {Case{{1}, true}, Case{{257}, true}, Case{{385, 200, 65}, true}, Case{{1025}, false},
        Case{std::vector<int64_t>(88, 1025), true}, Case{std::vector<int64_t>(45, 257), true},
        Case{std::vector<int64_t>(45, 4097), false}, Case{{131073}, false},
        Case{{131073, 257, 257}, false}}) {
    const Sequences sequences = make_sequences(c.lengths, 1, 64);
    const DecodePlan plan = make_decode_plan(sequences.group, shape);
    check_cover(plan, shape.num_workers);
    EXPECT_EQ(plan.split_units.empty(), c.whole) << c.lengths.size() << " x " << c.lengths[0];
    EXPECT_EQ(plan.num_partials == 0, c.whole);
    const std::vector<int64_t> loads = block_loads(plan, shape);
    const int64_t equal = std::accumulate(loads.begin(), loads.end(), int64_t{0}) / 132;
    EXPECT_LE(*std::max_element(loads.begin(), loads.end()),
              equal + (c.whole ? shape.merge_bytes : 2 * 32768));
    for (const Segment& segment : plan.segments) {
      if (c.whole) {
        EXPECT_EQ(segment.partial, -1);
      }
    }
  }
}

TEST(DecodePlan, WholeUnitsAreSpreadOverBlocks) {
  PlanShape shape = shape_of(4, 8, 132 * 4);
  shape.merge_bytes = 64 << 10;
  const Sequences sequences = make_sequences(std::vector<int64_t>(40, 257), 1, 64);
  const DecodePlan plan = make_decode_plan(sequences.group, shape);
  const std::vector<int64_t> loads = block_loads(plan, shape);
  // 120 units have a block each.
  EXPECT_EQ(std::count_if(loads.begin(), loads.end(), [](int64_t load) { return load > 0; }), 120);
}

// Units that each block has parts of.
std::vector<std::set<int>> block_units(const DecodePlan& plan, const PlanShape& shape) {
  std::vector<std::set<int>> units(static_cast<size_t>(shape.num_workers / shape.block_workers));
  for (int w = 0; w < shape.num_workers; ++w) {
    const WorkerStart& start = plan.workers[w];
    for (int i = 0; i < start.num_segments; ++i)
      units[w / shape.block_workers].insert(plan.segments[start.first_segment + i].unit);
  }
  return units;
}

TEST(DecodePlan, SpareBlocksStayIdleWhereThenNoneHasPartsOfTwoUnits) {
  PlanShape shape = shape_of(4, 8, 132 * 4);
  shape.merge_bytes = 64 << 10;
  shape.spare_blocks = 8;
  struct Case {
    std::vector<int64_t> lengths;
    int busy;   // blocks with work, at most
    int parts;  // blocks of a unit; 0: as without spare blocks
  };
  // Three KV heads each.
  for (const Case& c :
       {Case{std::vector<int64_t>(42, 32769), 126, 1}, Case{std::vector<int64_t>(84, 8193), 126, 1},
        Case{std::vector<int64_t>(21, 32769), 126, 2},
        Case{std::vector<int64_t>(14, 32769), 126, 3},
        Case{std::vector<int64_t>(10, 32769), 132, 0}, Case{{131073}, 132, 0}}) {
    const Sequences sequences = make_sequences(c.lengths, 1, 64);
    const DecodePlan plan = make_decode_plan(sequences.group, shape);
    check_cover(plan, shape.num_workers);
    const std::vector<int64_t> loads = block_loads(plan, shape);
    EXPECT_EQ(std::count_if(loads.begin(), loads.end(), [](int64_t load) { return load > 0; }),
              c.busy);
    const int64_t all = std::accumulate(loads.begin(), loads.end(), int64_t{0});
    EXPECT_LE(*std::max_element(loads.begin(), loads.end()), all / 124 + 2 * 32768);
    EXPECT_EQ(plan.split_units.empty(), c.parts == 1);
    if (c.parts == 0) continue;
    for (const SplitUnit& unit : plan.split_units) EXPECT_EQ(unit.num_partials, c.parts);
    std::map<int, int> blocks_of_unit;
    for (const std::set<int>& units : block_units(plan, shape)) {
      EXPECT_LE(units.size(), c.parts == 1 ? 2u : 1u);
      for (const int unit : units) ++blocks_of_unit[unit];
    }
    for (const auto& [unit, blocks] : blocks_of_unit) EXPECT_EQ(blocks, c.parts) << unit;
  }
}

TEST(DecodePlan, TilesDoNotCrossPages) {
  const Sequences sequences = make_sequences({200}, 75, 64);
  const DecodePlan plan = make_decode_plan(sequences.group, shape_of(4, 8, 4));
  check_cover(plan, 4);
  int rows = 0;
  for (const Segment& segment : plan.segments) {
    EXPECT_EQ(segment.num_rows, segment.num_tokens * 4);
    EXPECT_LE(segment.num_rows, 8);
    EXPECT_EQ(segment.first_position / 64, (segment.first_position + segment.num_tokens - 1) / 64);
    EXPECT_EQ(segment.first_bf16_page, segment.first_position / 64);
    if (segment.page_begin == 0 && segment.kv_head == 0) rows += segment.num_rows;
  }
  EXPECT_EQ(rows, 75 * 4);
}

TEST(DecodePlan, WindowsStartAtTheirFirstPageAndKeepSinks) {
  Sequences sequences = make_sequences({2000}, 1, 64, 300);
  PlanShape shape = shape_of(4, 8, 4);
  DecodePlan plan = make_decode_plan(sequences.group, shape);
  EXPECT_EQ(plan.segments[0].first_page, (1999 - 299) / 64);
  EXPECT_EQ(plan.segments[0].num_sink_pages, 0);
  shape.sink_tokens = 70;
  plan = make_decode_plan(sequences.group, shape);
  EXPECT_EQ(plan.segments[0].num_sink_pages, 2);
  check_cover(plan, 4);
}

TEST(DecodePlan, SplitsEndAtFixedPositions) {
  int64_t splits = 0, at_32k = 0;
  for (int64_t position = 0; position < int64_t{1} << 30; ++splits) {
    const int64_t end = split_end(position);
    ASSERT_GT(end, position);
    ASSERT_EQ(split_end(end - 1), end);
    ASSERT_EQ(end % 512, 0) << "pages of up to 512 tokens lie in one split";
    if (end == 32768) at_32k = splits + 1;
    position = end;
  }
  EXPECT_EQ(at_32k, 64);
  EXPECT_EQ(splits, 64 + 6 * 64 + 9 * 16);
}

// What a query's result is made of: ranges of its list of pages, in order.
std::vector<std::pair<int, int>> pieces_of(const DecodePlan& plan, int first_row, int kv_head) {
  std::vector<std::pair<int, int>> pieces;
  for (const Segment& segment : plan.segments) {
    if (segment.first_row != first_row || segment.kv_head != kv_head) continue;
    EXPECT_EQ(segment.is_shared, 0);
    EXPECT_EQ(segment.num_tokens, 1);
    pieces.emplace_back(segment.page_begin, segment.page_end);
  }
  return pieces;
}

TEST(DecodePlan, ByPositionAQuerysPiecesDependOnItsPositionOnly) {
  for (const int window : {0, 700}) {
    PlanShape shape = shape_of(4, 8, 96);
    shape.by_position = true;
    shape.most_partials = 300;
    shape.sink_tokens = window > 0 ? 70 : 0;
    const Sequences alone = make_sequences({70001}, 1, 64, window);
    const DecodePlan one = make_decode_plan(alone.group, shape);
    const auto pieces = pieces_of(one, 0, 2);
    EXPECT_EQ(one.launches.size(), window > 0 ? 1u : 2u);
    // The last tokens of a chunk, between other sequences.
    const Sequences batch = make_sequences({900, 70001, 33, 70003}, 5, 64, window);
    const DecodePlan many = make_decode_plan(batch.group, shape);
    EXPECT_EQ(pieces_of(many, 5 + 4, 2), pieces);
    EXPECT_EQ(pieces_of(many, 15 + 2, 0), pieces);

    // Every launch merges what its segments leave, and no more than it may.
    int units = 0;
    for (size_t i = 0; i < many.launches.size(); ++i) {
      const PlannedLaunch& launch = many.launches[i];
      EXPECT_EQ(launch.first_worker, static_cast<int>(i) * shape.num_workers);
      EXPECT_EQ(launch.first_split_unit, units);
      units += launch.num_split_units;
      int partials = 0;
      for (int u = launch.first_split_unit; u < units; ++u) {
        EXPECT_EQ(many.split_units[u].first_partial, partials);
        partials += many.split_units[u].num_partials;
      }
      EXPECT_LE(partials, shape.most_partials);
      EXPECT_LE(partials, many.num_partials);
      int left = 0;
      for (int w = 0; w < shape.num_workers; ++w) {
        const WorkerStart& start = many.workers[launch.first_worker + w];
        for (int s = 0; s < start.num_segments; ++s) {
          const int partial = many.segments[start.first_segment + s].partial;
          if (partial < 0) continue;
          EXPECT_EQ(partial, left++);
        }
      }
      EXPECT_EQ(left, partials);
    }
    EXPECT_EQ(units, static_cast<int>(many.split_units.size()));
  }
}

// Results of stored pages are merged apart from others.
TEST(DecodePlan, KindsOfPagesAreKeptApart) {
  for (const bool by_position : {false, true}) {
    for (const bool sink : {false, true}) {
      Sequences sequences = make_sequences({5000, 64, 1, 130}, 1, 64);
      if (sink) {
        for (auto& stored : sequences.stored)
          if (!stored.empty()) stored[0] = PageEntry::make(cache::kKindBf16, stored[0].slot);
      }
      PlanShape shape = shape_of(4, 8, 16);
      shape.values_apart = true;
      shape.by_position = by_position;
      const DecodePlan plan = make_decode_plan(sequences.group, shape);
      size_t split = 0;
      for (size_t i = 0; i < plan.segments.size();) {
        const Segment& first = plan.segments[i];
        std::vector<bool> stored;  // by partial result
        for (; i < plan.segments.size() && plan.segments[i].first_row == first.first_row &&
               plan.segments[i].kv_head == first.kv_head;
             ++i) {
          const Segment& segment = plan.segments[i];
          const auto kind_of = [&](int page) {
            return (plan.entries[(page >= segment.first_bf16_page ? segment.bf16_entries
                                                                  : segment.stored_entries) +
                                 page] &
                    0xff) == cache::kKindStored;
          };
          for (int page = segment.page_begin; page < segment.page_end; ++page)
            EXPECT_EQ(kind_of(page), kind_of(segment.page_begin));
          if (segment.partial < 0) continue;
          const auto partial = static_cast<size_t>(segment.partial - first.partial);
          if (partial == stored.size()) stored.push_back(kind_of(segment.page_begin));
          ASSERT_LT(partial, stored.size());
          EXPECT_EQ(stored[partial], kind_of(segment.page_begin));
        }
        if (first.partial < 0) continue;
        const SplitUnit& unit = plan.split_units[split++];
        EXPECT_EQ(unit.first_row, first.first_row);
        EXPECT_EQ(unit.num_partials, static_cast<int>(stored.size()));
        for (int p = 0; p < unit.num_partials; ++p)
          EXPECT_EQ(stored[p], p >= unit.first_stored && p < unit.end_stored);
      }
      EXPECT_EQ(split, plan.split_units.size());
      EXPECT_GE(split, 6u) << "the two sequences with closed pages, 3 heads each";
    }
  }
}

TEST(DecodePlan, ByPositionWorkIsEven) {
  PlanShape shape = shape_of(4, 8, 1056);
  shape.by_position = true;
  const Sequences sequences = make_sequences(std::vector<int64_t>(64, 32769), 1, 64);
  const DecodePlan plan = make_decode_plan(sequences.group, shape);
  check_cover(plan, 1056);
  ASSERT_EQ(plan.launches.size(), 1u);
  int most = 0, all = 0;
  for (const WorkerStart& start : plan.workers) {
    int pages = 0;
    for (int s = 0; s < start.num_segments; ++s) {
      const Segment& segment = plan.segments[start.first_segment + s];
      pages += segment.page_end - segment.page_begin;
    }
    most = std::max(most, pages);
    all += pages;
  }
  EXPECT_LE(most, all / 1056 + 9);
}

}  // namespace
}  // namespace kvant::backend::cuda
