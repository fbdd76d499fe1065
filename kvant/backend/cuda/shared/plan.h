// Which pages of a step are read once for several sequences, and the work that is: host code,
// tested on CPUs.
//
// A *run* is a range of stored pages that several sequences have in common, with up to 128 query
// rows (sequences x new tokens x heads of a KV head) that read them. A unit is a run and a KV head;
// an *item* is a range of a unit's pages, the work of one block. Each item leaves partial results
// of all its rows, in the form of decode's own (decode/plan.h), which the same kernel merges, in
// the order of the pages. Decode reads each sequence from its first page that no run has.
#pragma once

#include <cstdint>
#include <vector>

#include "kvant/backend/cuda/decode/plan.h"
#include "kvant/cache/view.h"

namespace kvant::backend::cuda {

inline constexpr int kSharedPageTokens = 64;
inline constexpr int kSharedRows = 128;     // of a run
inline constexpr int kSharedHalfRows = 64;  // of a warpgroup

struct alignas(32) SharedItem {
  int32_t queries;       // of its rows: place in SharedPlan::queries
  int32_t partial_rows;  // of its rows: place in SharedPlan::partial_rows
  int32_t kv_head;
  int32_t part;         // its first partial result among those of the unit
  int32_t first_entry;  // of its pages
  int32_t num_pages;
  int32_t alternates;  // rows fit one warpgroup: the two take pages in turn and leave a result each
  int32_t padding;
};
static_assert(sizeof(SharedItem) == 32);

// A block's first item and first pages together, so that its first copies start after one load.
inline constexpr int kSharedStartEntries = 22;
struct alignas(128) SharedStart {
  SharedItem item;     // a copy of the first one
  int32_t first_item;  // its number
  int32_t num_items;   // 0: nothing to do
  uint32_t entries[kSharedStartEntries];
};
static_assert(sizeof(SharedStart) == 128);

// Nanoseconds of one multiprocessor, by which work is divided and sharing decided; measured on an
// H100 (cuda-shared-prefix.md).
struct SharedCosts {
  double page = 1130.0;          // of a run with more than 64 rows, `nvfp4`
  double half_page = 790.0;      // of a run with up to 64
  double start = 6200.0;         // of a call, whatever the shared kernel reads
  double bytes_per_ns = 25.5;    // that decode reads where memory does not limit it
  double device_bytes = 2200.0;  // a nanosecond, of the device
  double decode_start = 11100.0;
  double alone_bytes = 3800.0;  // of the device, where sequences find common pages in L2
  double alone_start = 8600.0;  // of decode on the whole device
};

struct SharedPlanShape {
  int group = 1;  // query heads per KV head
  int num_multiprocessors = 1;
  int64_t stored_bytes = 1;  // a page of one KV head, by kind
  int64_t bf16_bytes = 1;
  uint32_t kind = cache::kKindStored;  // of the pages that are shared
  double page_factor = 1.0;            // what a page costs in SharedCosts::page
  bool always = false;                 // share whether it pays or not
  int blocks = 0;                      // multiprocessors for shared pages; 0: by the costs
  SharedCosts costs;
};

struct SharedRunPages {
  std::vector<int32_t> members;  // sequences
  int num_rows = 0;
  int first_page = 0;
  int end_page = 0;
  std::vector<int32_t> first_part;  // [member][kv_head]: results of earlier runs of the sequence
};

struct SharedPlan {
  std::vector<SharedRunPages> runs;
  std::vector<ReadElsewhere> sequences;  // [sequence]; empty: nothing is shared
  std::vector<int32_t> num_parts;        // [sequence][kv_head]
  std::vector<SharedItem> items;
  std::vector<SharedStart> starts;  // [block]: the kernel's blocks; decode has the other processors
  std::vector<uint32_t> entries;    // cache::PageEntry as slot << 8 | kind
  // Place of a row's query for KV head 0, in query heads: token row * num_query_heads + head; -1
  // where the run has no such row.
  std::vector<int32_t> queries;       // [run][kSharedRows]
  std::vector<int32_t> partial_rows;  // [run][kv_head][kSharedRows]: of the unit's first part

  bool empty() const { return items.empty(); }
};

// `view` is one step of a group without window, whose stored pages have the stored kind.
SharedPlan make_shared_plan(const cache::GroupView& view, const SharedPlanShape& shape);

// Fills queries and partial_rows from the decode plan that was made with plan.sequences.
void place_shared_rows(const cache::GroupView& view, const PlanShape& shape,
                       const DecodePlan& decode, int num_query_heads, SharedPlan& plan);

}  // namespace kvant::backend::cuda
