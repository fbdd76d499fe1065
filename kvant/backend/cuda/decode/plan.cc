#include "kvant/backend/cuda/decode/plan.h"

#include <algorithm>
#include <bit>

#include "kvant/base/check.h"

namespace kvant::backend::cuda {
namespace {

using cache::GroupView;
using cache::PageEntry;
using cache::SequenceView;

// Blocks that have equal parts of a unit. With more of them each has so few pages that a page more
// or less counts (2x32k with eight each was 2 % slower).
constexpr int kMostParts = 4;

uint32_t pack(PageEntry entry) {
  return entry.slot << 8 | entry.kind;
}

// A tile, as a segment that still covers all its pages, and what reading it costs.
struct Tile {
  Segment all;
  int num_bf16 = 0;      // its last pages, read from the BF16 table
  int first_stored = 0;  // [first_stored, end_stored) of its list are pages as stored
  int end_stored = 0;
  int64_t own_cost = 0;  // bytes of one KV head: of the page that its tokens lie in, and the change
  int64_t cost = 0;      // of all
  ReadElsewhere elsewhere;
};

int page_number(const Segment& tile, int index) {
  return index < tile.num_sink_pages ? index : tile.first_page + index - tile.num_sink_pages;
}

uint32_t page_entry(const Segment& tile, int index, const std::vector<uint32_t>& entries) {
  const int page = page_number(tile, index);
  return entries[(page >= tile.first_bf16_page ? tile.bf16_entries : tile.stored_entries) + page];
}

int64_t page_cost(const Segment& tile, int index, const std::vector<uint32_t>& entries,
                  const PlanShape& shape) {
  const bool stored = (page_entry(tile, index, entries) & 0xff) == cache::kKindStored;
  return stored ? shape.stored_bytes : shape.bf16_bytes;
}

// The tile's own page is read by 16 tokens, up to its last token.
int64_t own_page_cost(const Segment& tile, int page_tokens, const PlanShape& shape) {
  const int last = (tile.first_position + tile.num_tokens - 1) % page_tokens;
  return shape.bf16_bytes * (last / 16 * 16 + 16) / page_tokens;
}

class Planner {
 public:
  Planner(const GroupView& view, const PlanShape& shape) : view_(view), shape_(shape) {
    KVANT_CHECK(shape.group >= 1 && shape.group <= shape.max_rows, "a tile holds a token's heads");
  }

  DecodePlan make() {
    for (size_t i = 0; i < view_.sequences.size(); ++i) {
      if (view_.sequences[i].num_new_tokens == 0) continue;
      sequence_ = static_cast<int32_t>(i);
      elsewhere_ = shape_.elsewhere.empty() ? ReadElsewhere{} : shape_.elsewhere[i];
      add_sequence(view_.sequences[i]);
    }
    if (shape_.by_position) {
      cut_by_position();
    } else {
      cut();
    }
    return std::move(plan_);
  }

 private:
  void add_sequence(const SequenceView& sequence) {
    const int64_t last_position = sequence.first_position + sequence.num_new_tokens - 1;
    const int last_page = static_cast<int>(last_position / view_.page_tokens);
    const int first_page = static_cast<int>(sequence.first_page);
    Segment tile{};
    tile.stored_entries = static_cast<int>(plan_.entries.size()) - first_page;
    // Pages that some query reads as stored: those before the last query's BF16 pages.
    const int stored_end = std::max(first_page, last_page - sequence.recent_pages);
    for (int page = first_page; page < stored_end; ++page)
      plan_.entries.push_back(pack(sequence.stored[page]));
    const int bf16_first = static_cast<int>(sequence.bf16_first_page);
    tile.bf16_entries = static_cast<int>(plan_.entries.size()) - bf16_first;
    for (int page = bf16_first; page <= last_page; ++page)
      plan_.entries.push_back(pack(sequence.bf16[page - bf16_first]));
    tile.first_new_page = static_cast<int>(sequence.first_position / view_.page_tokens);

    const int tile_tokens = shape_.by_position ? 1 : shape_.max_rows / shape_.group;
    for (int64_t position = sequence.first_position; position <= last_position;) {
      const int64_t page_end = (position / view_.page_tokens + 1) * view_.page_tokens;
      const int64_t end = std::min({position + tile_tokens, page_end, last_position + 1});
      tile.first_row = sequence.first_row + static_cast<int>(position - sequence.first_position);
      tile.first_position = static_cast<int>(position);
      tile.num_tokens = static_cast<int>(end - position);
      tile.num_rows = tile.num_tokens * shape_.group;
      add_tile(tile, sequence, first_page);
      position = end;
    }
  }

  void add_tile(const Segment& start, const SequenceView& sequence, int first_page) {
    Segment tile = start;
    const int own_page = tile.first_position / view_.page_tokens;
    tile.first_bf16_page = std::max(first_page, own_page - sequence.recent_pages);
    tile.first_page = first_page;
    if (view_.window > 0) {
      const int first_key = std::max(0, tile.first_position - view_.window + 1);
      tile.first_page = std::max(first_page, first_key / view_.page_tokens);
      const int sink_pages = (shape_.sink_tokens + view_.page_tokens - 1) / view_.page_tokens;
      if (first_page == 0) tile.num_sink_pages = std::min(sink_pages, tile.first_page);
    }
    if (elsewhere_.first_page > 0) {
      tile.first_page = elsewhere_.first_page;
      tile.num_sink_pages = elsewhere_.num_sink_pages;
    }
    tile.page_begin = 0;
    tile.page_end = tile.num_sink_pages + own_page + 1 - tile.first_page;
    Tile entry;
    entry.all = tile;
    entry.num_bf16 = own_page + 1 - std::max(tile.first_bf16_page, tile.first_page);
    entry.elsewhere = elsewhere_;
    // Only the first page (a sink) and those of the BF16 table differ from the rest.
    const int num_stored = tile.page_end - entry.num_bf16;
    entry.own_cost = own_page_cost(tile, view_.page_tokens, shape_) + shape_.change_bytes;
    entry.cost = entry.own_cost + (entry.num_bf16 - 1) * shape_.bf16_bytes +
                 num_stored * shape_.stored_bytes;
    entry.end_stored = num_stored;
    if (num_stored > 0) {
      entry.cost += page_cost(tile, 0, plan_.entries, shape_) - shape_.stored_bytes;
      entry.first_stored =
          (page_entry(tile, 0, plan_.entries) & 0xff) == cache::kKindStored ? 0 : 1;
    }
    plan_.tiles.push_back({sequence_, tile.first_row, tile.num_rows,
                           static_cast<int32_t>(tiles_.size()) * view_.num_kv_heads});
    tiles_.push_back(entry);
  }

  // Pages [0, result) of a tile cost at least `bytes`, rounded to the nearer page.
  int pages_of(const Tile& tile, int64_t bytes) const {
    if (bytes <= 0) return 0;
    if (bytes >= tile.cost) return tile.all.page_end;
    const int64_t first = page_cost(tile.all, 0, plan_.entries, shape_);
    const int num_stored = tile.all.page_end - tile.num_bf16;
    const int64_t own_start = tile.cost - tile.own_cost;
    if (bytes >= own_start)
      return tile.all.page_end - (2 * (bytes - own_start) >= tile.own_cost ? 0 : 1);
    const int64_t stored_cost = own_start - (tile.num_bf16 - 1) * shape_.bf16_bytes;
    if (bytes >= stored_cost) {
      return num_stored +
             static_cast<int>((bytes - stored_cost + shape_.bf16_bytes / 2) / shape_.bf16_bytes);
    }
    if (bytes < first) return 2 * bytes >= first ? 1 : 0;
    return 1 + static_cast<int>((bytes - first + shape_.stored_bytes / 2) / shape_.stored_bytes);
  }

  int num_blocks() const { return shape_.num_workers / shape_.block_workers; }

  // Where each worker's share of the bytes of all units ends: all shares are equal, or those of a
  // block's workers, where no block has parts of two units.
  std::vector<int64_t> share_ends() const {
    const auto num_workers = static_cast<size_t>(shape_.num_workers);
    int64_t total = 0;
    for (const Tile& tile : tiles_) total += tile.cost * view_.num_kv_heads;
    std::vector<int64_t> block_ends = unit_blocks(total);
    std::vector<int64_t> ends(num_workers);
    if (block_ends.empty()) {
      // total < 2^45 bytes, workers < 2^13: no overflow.
      for (size_t w = 0; w < num_workers; ++w)
        ends[w] = total * static_cast<int64_t>(w + 1) / shape_.num_workers;
      return ends;
    }
    const auto in_block = static_cast<size_t>(shape_.block_workers);
    block_ends.resize(static_cast<size_t>(num_blocks()), total);
    for (size_t w = 0; w < num_workers; ++w) {
      const size_t block = w / in_block;
      const int64_t begin = block == 0 ? 0 : block_ends[block - 1];
      ends[w] = begin + (block_ends[block] - begin) * static_cast<int64_t>(w % in_block + 1) /
                            shape_.block_workers;
    }
    return ends;
  }

  // Ends of blocks of whole units, or of equal parts of one; none if that takes longer than equal
  // shares and merging the results of blocks.
  std::vector<int64_t> unit_blocks(int64_t total) const {
    if (shape_.merge_bytes == 0 || shape_.values_apart || !shape_.elsewhere.empty()) return {};
    const int64_t equal = total / num_blocks();
    const int64_t spared = total / (num_blocks() - shape_.spare_blocks);
    std::vector<int64_t> ends =
        smallest_blocks(equal, std::max(equal + shape_.merge_bytes, spared), 1);
    if (ends.empty()) ends = smallest_blocks(equal, spared, kMostParts);
    return ends;
  }

  // The largest block as small as can be between `low` and `high`, with units in up to so many
  // parts; none if it is larger.
  std::vector<int64_t> smallest_blocks(int64_t low, int64_t high, int most_parts) const {
    for (const Tile& tile : tiles_) low = std::max(low, (tile.cost + most_parts - 1) / most_parts);
    if (low > high) return {};
    std::vector<int64_t> best = fill_blocks(high);
    for (int i = 0; !best.empty() && i < 5; ++i) {
      const int64_t middle = (low + high) / 2;
      std::vector<int64_t> ends = fill_blocks(middle);
      if (ends.empty()) {
        low = middle;
      } else {
        high = middle;
        best = std::move(ends);
      }
    }
    return best;
  }

  // Fills one block after the other with whole units of at most `limit` bytes together, or, where a
  // unit is larger, as many blocks as it needs with equal parts of it; empty if there are too few.
  std::vector<int64_t> fill_blocks(int64_t limit) const {
    std::vector<int64_t> ends;
    int64_t begin = 0, done = 0;
    for (const Tile& tile : tiles_) {
      const int64_t parts = (tile.cost + limit - 1) / limit;
      for (int head = 0; head < view_.num_kv_heads; ++head) {
        if (done > begin && done + tile.cost - begin > limit) ends.push_back(begin = done);
        for (int64_t part = 1; part < parts; ++part)
          ends.push_back(done + tile.cost * part / parts);
        done += tile.cost;
        if (parts > 1) ends.push_back(begin = done);
      }
    }
    if (done > begin) ends.push_back(done);
    return ends.size() > static_cast<size_t>(num_blocks()) ? std::vector<int64_t>{} : ends;
  }

  // Walks units and workers side by side; both ends of a worker's share are absolute, so that
  // rounding to pages does not add up.
  void cut() {
    const std::vector<int64_t> ends = share_ends();
    int64_t done = 0;  // cost of all units before this one
    int worker = 0;
    int unit = 0;
    for (const Tile& tile : tiles_) {
      for (int head = 0; head < view_.num_kv_heads; ++head, ++unit) {
        const size_t first_segment = plan_.segments.size();
        int page = 0;
        for (;;) {
          const bool last_worker = worker + 1 == shape_.num_workers;
          const int end =
              last_worker ? tile.all.page_end : std::max(page, pages_of(tile, ends[worker] - done));
          if (end > page) {
            Segment segment = tile.all;
            segment.kv_head = head;
            segment.unit = unit;
            segment.page_begin = page;
            segment.page_end = end;
            add_segment(segment, tile, worker);
            page = end;
          }
          if (page == tile.all.page_end && (last_worker || ends[worker] > done + tile.cost)) break;
          ++worker;
          if (page == tile.all.page_end) break;
        }
        done += tile.cost;
        const ReadElsewhere& elsewhere = tile.elsewhere;
        number_partials(first_segment, tile,
                        elsewhere.first_page > 0 ? elsewhere.num_partials[head] : 0);
      }
    }
    start_workers(0);
  }

  // The page after `index` at which other kinds of pages begin that are to be kept apart.
  int end_of_kind(const Tile& tile, int index) const {
    if (shape_.values_apart) {
      for (const int change : {tile.first_stored, tile.end_stored})
        if (index < change) return change;
    }
    return tile.all.page_end;
  }
  static bool is_stored(const Tile& tile, int index) {
    return index >= tile.first_stored && index < tile.end_stored;
  }

  // In pieces of one kind, if kinds are kept apart: sinks, stored pages, others in BF16.
  void add_segment(const Segment& whole, const Tile& tile, int worker) {
    Segment segment = whole;
    const int end = segment.page_end;
    const int unit = segment.unit;
    while (segment.page_begin < end) {
      segment.page_end = std::min(end, end_of_kind(tile, segment.page_begin));
      if (shape_.values_apart) {
        segment.unit = 3 * unit + (is_stored(tile, segment.page_begin)      ? 1
                                   : segment.page_begin < tile.first_stored ? 0
                                                                            : 2);
      }
      plan_.segments.push_back(segment);
      owners_.push_back(worker);
      segment.page_begin = segment.page_end;
    }
  }

  // Every split is a segment; launches hold as many units as leave `most_partials` results.
  void cut_by_position() {
    size_t first_segment = 0;
    int partials = 0;  // of this launch
    int unit = 0;
    for (const Tile& tile : tiles_) {
      const std::vector<int> ends = splits_of(tile);
      const bool merged = ends.size() > 1 || transforms_values(tile);
      const int results = merged ? static_cast<int>(ends.size()) : 0;
      for (int head = 0; head < view_.num_kv_heads; ++head, ++unit) {
        if (partials > 0 && partials + results > shape_.most_partials) {
          end_launch(first_segment);
          first_segment = plan_.segments.size();
          partials = 0;
        }
        if (merged) {
          SplitUnit split{tile.all.first_row, tile.all.num_rows, head, partials, results, 0, 0};
          for (int i = 0; transforms_values(tile) && i < results; ++i)
            add_stored(split, tile, i > 0 ? ends[i - 1] : 0, i);
          plan_.split_units.push_back(split);
        }
        Segment segment = tile.all;
        segment.kv_head = head;
        segment.unit = unit;
        for (const int end : ends) {
          segment.page_end = end;
          segment.partial = results > 0 ? partials++ : -1;
          plan_.segments.push_back(segment);
          segment.page_begin = end;
        }
        plan_.num_partials = std::max(plan_.num_partials, partials);
      }
    }
    end_launch(first_segment);
  }

  // Ends of the splits in a tile's list of pages.
  std::vector<int> splits_of(const Tile& tile) const {
    std::vector<int> ends;
    int64_t until = 0;
    int same_kind = 0;
    for (int index = 0; index < tile.all.page_end; ++index) {
      const int64_t position = int64_t{page_number(tile.all, index)} * view_.page_tokens;
      if (position < until && index < same_kind) continue;
      if (index > 0) ends.push_back(index);
      until = split_end(position);
      same_kind = end_of_kind(tile, index);
    }
    ends.push_back(tile.all.page_end);
    return ends;
  }

  bool transforms_values(const Tile& tile) const {
    return shape_.values_apart && tile.first_stored < tile.end_stored;
  }
  // Result number `partial` of the unit begins with page `index`.
  static void add_stored(SplitUnit& unit, const Tile& tile, int index, int partial) {
    if (!is_stored(tile, index)) return;
    if (unit.end_stored == 0) unit.first_stored = partial;
    unit.end_stored = partial + 1;
  }

  // Gives the segments from `first_segment` on to workers, in order and by the bytes they read.
  void end_launch(size_t first_segment) {
    std::vector<int64_t> costs;
    int64_t total = 0;
    for (size_t i = first_segment; i < plan_.segments.size(); ++i) {
      const Segment& segment = plan_.segments[i];
      const int first_bf16 = segment.num_sink_pages - segment.first_page +
                             std::max(segment.first_bf16_page, segment.first_page);
      const int num_bf16 = std::max(0, segment.page_end - std::max(segment.page_begin, first_bf16));
      costs.push_back(num_bf16 * shape_.bf16_bytes +
                      (segment.page_end - segment.page_begin - num_bf16) * shape_.stored_bytes +
                      shape_.change_bytes);
      if (page_number(segment, segment.page_end - 1) == segment.first_position / view_.page_tokens)
        costs.back() += own_page_cost(segment, view_.page_tokens, shape_) - shape_.bf16_bytes;
      total += costs.back();
    }
    int64_t done = 0;
    for (const int64_t cost : costs) {
      const int64_t worker = (done + cost / 2) * shape_.num_workers / total;
      owners_.push_back(static_cast<int>(std::min<int64_t>(worker, shape_.num_workers - 1)));
      done += cost;
    }
    start_workers(first_segment);
  }

  // One partial result per block of a unit that several blocks share, after those of elsewhere.
  void number_partials(size_t first, const Tile& tile, int num_elsewhere) {
    const size_t end = plan_.segments.size();
    const auto block_of = [&](size_t i) { return owners_[i] / shape_.block_workers; };
    const bool split =
        num_elsewhere > 0 || transforms_values(tile) || block_of(first) != block_of(end - 1);
    // Segments that a block merges.
    const auto together = [&](size_t a, size_t b) {
      return block_of(a) == block_of(b) && plan_.segments[a].unit == plan_.segments[b].unit;
    };
    const Segment& unit = plan_.segments[first];
    SplitUnit merged{unit.first_row, unit.num_rows, unit.kv_head, plan_.num_partials, 0, 0, 0};
    plan_.first_partials.push_back(split ? merged.first_partial : -1);
    plan_.num_partials += num_elsewhere;
    for (size_t i = first; i < end; ++i) {
      Segment& segment = plan_.segments[i];
      const bool follows = i > first && together(i - 1, i);
      const bool precedes = i + 1 < end && together(i, i + 1);
      segment.is_shared = follows || precedes ? 1 : 0;
      if (split && !follows) ++plan_.num_partials;
      segment.partial = split ? plan_.num_partials - 1 : -1;
      if (transforms_values(tile))
        add_stored(merged, tile, segment.page_begin, segment.partial - merged.first_partial);
    }
    merged.num_partials = plan_.num_partials - merged.first_partial;
    if (split) plan_.split_units.push_back(merged);
  }

  // A launch of all segments from `first_segment` on.
  void start_workers(size_t first_segment) {
    PlannedLaunch launch;
    launch.first_worker = static_cast<int32_t>(plan_.workers.size());
    if (!plan_.launches.empty()) {
      const PlannedLaunch& before = plan_.launches.back();
      launch.first_split_unit = before.first_split_unit + before.num_split_units;
    }
    launch.num_split_units =
        static_cast<int32_t>(plan_.split_units.size()) - launch.first_split_unit;
    for (int i = 0; i < launch.num_split_units; ++i) {
      const SplitUnit& unit = plan_.split_units[launch.first_split_unit + i];
      launch.most_rows = std::max(launch.most_rows, unit.num_rows);
      launch.most_partials = std::max(launch.most_partials, unit.num_partials);
    }
    plan_.launches.push_back(launch);
    plan_.workers.resize(plan_.workers.size() + static_cast<size_t>(shape_.num_workers));
    for (size_t i = first_segment; i < plan_.segments.size(); ++i) {
      WorkerStart& start = plan_.workers[launch.first_worker + owners_[i]];
      if (start.num_segments++ > 0) continue;
      start.segment = plan_.segments[i];
      start.first_segment = static_cast<int32_t>(i);
      for (int k = 0; k < kStartEntries; ++k) {
        const int index = start.segment.page_begin + k;
        if (index < start.segment.page_end)
          start.entries[k] = page_entry(start.segment, index, plan_.entries);
      }
    }
  }

  const GroupView& view_;
  const PlanShape& shape_;
  DecodePlan plan_;
  std::vector<Tile> tiles_;
  std::vector<int> owners_;  // worker of each segment
  int32_t sequence_ = 0;     // of the tiles that are added
  ReadElsewhere elsewhere_;
};

}  // namespace

int64_t split_end(int64_t position) {
  constexpr int64_t kFirst = 32768;
  if (position < kFirst) return position / 512 * 512 + 512;
  const int octave = static_cast<int>(std::bit_width(static_cast<uint64_t>(position))) - 1;
  const int64_t length = int64_t{1} << (octave - (octave < 21 ? 6 : 4));
  return position / length * length + length;
}

DecodePlan make_decode_plan(const GroupView& view, const PlanShape& shape) {
  return Planner(view, shape).make();
}

}  // namespace kvant::backend::cuda
