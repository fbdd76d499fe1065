// Work of one decode step of one layer group, cut into equal shares: host code, tested on CPUs.
//
// A *query tile* is up to 8 or 16 query rows (tokens x heads of one KV head) of one sequence whose
// tokens lie in one page, so that all of them read the same pages in the same form. A *unit* is a
// tile and a KV head. A *worker* is a team of warps; each gets a run of consecutive pages of
// consecutive units, cut so that all workers read about the same number of bytes. Each piece of a
// unit that a worker gets is a *segment*. A unit of one segment is written to the output at once.
// Others leave partial results: those of the workers of one block are merged in the block, one per
// block remains, and a second kernel merges these. Both merge in the order of the pages: results
// depend on the plan only, never on timing. Where it takes no longer than the second kernel would,
// each unit stays within a block, and there is no second kernel. Where a few blocks without work
// make it possible, blocks have whole units or equal parts of a single one.
//
// With PlanShape::by_position (--deterministic) the plan of a query depends on its position only: a
// tile is one token, and units are cut where split_end() says, each piece a segment with a partial
// result of its own. What else is in the step decides only which worker does which segment.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kvant/cache/view.h"

namespace kvant::backend::cuda {

// A segment as the kernel reads it; 64 bytes.
struct alignas(64) Segment {
  int32_t first_row;  // of the tile's first token, in the step's activations
  int32_t num_rows;   // tokens of the tile x query heads per KV head
  int32_t kv_head;
  int32_t partial;         // where the block's result goes; -1: the unit ends in the output
  int32_t first_position;  // of the tile's first token (positions are below 2^31)
  int32_t num_tokens;      // of the tile
  int32_t page_begin;      // [page_begin, page_end) of the tile's list of pages: first
  int32_t page_end;        //   num_sink_pages pages from 0, then those from first_page
  int32_t num_sink_pages;
  int32_t first_page;
  int32_t first_bf16_page;  // this page and later ones are read from the BF16 table
  int32_t first_new_page;   // this page and later ones may be written in this step
  int32_t stored_entries;   // page p is entries[stored_entries + p]
  int32_t bf16_entries;     // page p is entries[bf16_entries + p]
  int32_t unit;             // number of the unit; with values_apart three for each
  int32_t is_shared;        // other workers of the block have segments of the unit
};
static_assert(sizeof(Segment) == 64);

// A worker's first segment and first pages together, so that its first copies start after one load.
inline constexpr int kStartEntries = 14;
struct alignas(128) WorkerStart {
  Segment segment;                  // a copy of the first one
  int32_t first_segment;            // its number
  int32_t num_segments;             // 0: nothing to do
  uint32_t entries[kStartEntries];  // of its first pages
};
static_assert(sizeof(WorkerStart) == 128);

// A unit whose blocks' results must be merged.
struct SplitUnit {
  int32_t first_row;
  int32_t num_rows;
  int32_t kv_head;
  int32_t first_partial;
  int32_t num_partials;
  // Of these, those of pages as stored, [first, end): only with PlanShape::values_apart.
  int32_t first_stored;
  int32_t end_stored;
};

// Pages of a sequence that another kernel reads, whose results join those of its units: all before
// `first_page` but sink pages. Their partial results come first; results [kv_head] in number.
struct ReadElsewhere {
  int32_t first_page = 0;  // 0: none
  int32_t num_sink_pages = 0;
  const int32_t* num_partials = nullptr;
};

struct PlanShape {
  int group = 1;             // query heads per KV head
  int max_rows = 8;          // of a tile: 8 or 16, at least `group`
  int num_workers = 1;       // teams on the device
  int block_workers = 1;     // of a block; divides num_workers
  int sink_tokens = 0;       // AttentionParams::sink_tokens
  int64_t stored_bytes = 1;  // a page of one KV head, by kind: the cost of reading it whole
  int64_t bf16_bytes = 1;
  int64_t change_bytes = 0;  // what a worker could read while it goes from one unit to the next
  int64_t merge_bytes = 0;   // what a block could read while results of blocks are merged
  // Blocks that may get no work where the others then have no parts of two units: the device's
  // memory is busy without them.
  int spare_blocks = 0;
  std::span<const ReadElsewhere> elsewhere = {};  // [sequence], or empty
  // No segment has both pages as stored and pages in BF16: stored values are rotated back, or get
  // their bias, when results are merged.
  bool values_apart = false;
  bool by_position = false;
  int most_partials = 1 << 20;  // of a launch, with by_position; a unit's may be more
};

// With by_position: the first position after the split that `position` is in. Splits are 512 tokens
// long up to 32k, from there on a 64th of the power of two below them (beyond 2M a 16th), so that
// shorter contexts have work for all workers and longer ones few results to merge: 592 up to 2^30.
int64_t split_end(int64_t position);

// Query tiles in the order of their units: the unit of KV head h is first_unit + h.
struct PlannedTile {
  int32_t sequence;
  int32_t first_row;
  int32_t num_rows;
  int32_t first_unit;
};

// What runs at a time: a worker table and the units that it leaves to be merged.
struct PlannedLaunch {
  int32_t first_worker = 0;  // num_workers of them
  int32_t first_split_unit = 0;
  int32_t num_split_units = 0;
  int32_t most_rows = 1;      // of a split unit
  int32_t most_partials = 1;  // likewise
};

struct DecodePlan {
  std::vector<uint32_t> entries;  // cache::PageEntry as slot << 8 | kind
  std::vector<Segment> segments;
  std::vector<WorkerStart> workers;  // [launch][num_workers]
  std::vector<SplitUnit> split_units;
  std::vector<PlannedLaunch> launches;  // one after the other; several only with by_position
  int num_partials = 0;                 // of the largest launch
  std::vector<PlannedTile> tiles;
  std::vector<int32_t> first_partials;  // [unit]; -1: it ends in the output
};

// `view` is one step; its tables must name every page that its queries read.
DecodePlan make_decode_plan(const cache::GroupView& view, const PlanShape& shape);

}  // namespace kvant::backend::cuda
