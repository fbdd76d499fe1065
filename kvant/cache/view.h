// What attention kernels see of the cache in one step: plain data, no ownership, no virtual calls.
//
// A step processes, for each of its sequences, `num_new_tokens` new tokens that start at
// `first_position`. Per layer group the cache hands out one GroupView; a backend's append, close
// and attention operators need nothing else. All pointers are in the backend's memory except the
// tables, which are in host memory (a device backend copies them once per step).
//
// The rule of closed pages (codecs.md section 1): a query in page p reads page j in BF16 if
// p - j <= recent_pages, and as stored otherwise. With recent_pages = 0 that is its own page only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kvant/formats/codec.h"
#include "kvant/formats/sections.h"
#include "kvant/formats/spec.h"

namespace kvant::cache {

// The order of elements inside a unit's sections (layout.h defines them exactly).
enum class Layout : uint32_t { kPlanar = 0, kCpu = 1, kSm90 = 2 };

// Names one page: which kind (index into GroupView::kinds), which slot of that kind's slab.
struct PageEntry {
  uint32_t kind : 8;
  uint32_t slot : 24;

  static constexpr uint32_t kNoSlot = 0xffffff;
  static constexpr PageEntry none() { return {0xff, kNoSlot}; }
  static constexpr PageEntry make(uint32_t kind, uint32_t slot) {
    return {kind & 0xff, slot & kNoSlot};
  }
  bool valid() const { return slot != kNoSlot; }
  bool operator==(const PageEntry& other) const { return kind == other.kind && slot == other.slot; }
};
static_assert(sizeof(PageEntry) == 4);

// Terms of one layer that the kernels fold into queries, scores and outputs: one per KV head.
struct LayerParams {
  std::span<const formats::SideParams> k;  // [num_kv_heads]
  std::span<const formats::SideParams> v;
};

// One kind of page of a group, e.g. "as stored" or BF16. `units[l]` is where the units of the
// group's l-th layer lie in a page: unit address = base + slot * page_bytes + layer_offset[l] +
// head * units[l].bytes
struct PageKind {
  std::byte* base = nullptr;
  int64_t page_bytes = 0;
  Layout layout = Layout::kPlanar;
  std::span<const int64_t> layer_offset;          // [layers of the group]
  std::span<const formats::UnitSections> units;   // [layers of the group]
  std::span<const formats::SideFormat> k_format;  // [layers of the group]
  std::span<const formats::SideFormat> v_format;

  std::byte* unit(PageEntry entry, int group_layer, int kv_head) const {
    return base + static_cast<int64_t>(entry.slot) * page_bytes + layer_offset[group_layer] +
           kv_head * units[group_layer].bytes;
  }
};

// Kinds every group has, in this order; further kinds (demoted pages) may follow.
inline constexpr uint32_t kKindBf16 = 0;     // open, sink and recent pages: plain BF16
inline constexpr uint32_t kKindStored = 1;   // closed pages in the group's format
inline constexpr uint32_t kKindStaging = 2;  // BF16 of pages that fill within one step; one layer
                                             // at a time: layer_offset is 0 for every layer

// One sequence in one step, seen by one layer group.
struct SequenceView {
  int32_t first_row = 0;       // its first row in the batch's activations
  int32_t num_new_tokens = 0;  // rows [first_row, first_row + num_new_tokens)
  int64_t first_position = 0;  // position of the first new token = tokens already in the cache
  int32_t recent_pages = 0;    // see above
  int64_t first_page = 0;      // pages before it have left the window and are not valid
  const PageEntry* stored = nullptr;  // [page]: for pages that some query of the step reads as
                                      // stored (sink pages: kind kKindBf16)
  int64_t bf16_first_page = 0;
  const PageEntry* bf16 = nullptr;  // [page - bf16_first_page]: up to the last page of the step
};

// A page to encode in this step, once its last token is appended in a layer.
struct CloseItem {
  PageEntry source;  // kind kKindBf16 or kKindStaging
  PageEntry target;  // kind kKindStored (pages that stay BF16 are never staged nor closed)
};

struct GroupView {
  int page_tokens = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int window = 0;       // 0: full attention; else a query at i reads keys j with j > i - window
  bool strict = false;  // +strict: rows pass through the codec when they enter the open page
  std::span<const PageKind> kinds;
  std::span<const SequenceView> sequences;
  std::span<const CloseItem> closes;
  std::span<const LayerParams> layers;  // [layers of the group]
};

}  // namespace kvant::cache
