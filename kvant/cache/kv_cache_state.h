// The inside of KvCache, shared by kv_cache*.cc only.
//
// Page tables: per group and sequence two arrays over absolute page indices. Entries are meaningful
// for pages in [first_page, num_pages of the sequence):
//   stored[j]  the encoded page (owns a reference), or the BF16 page that stands for it (plain
//   groups and
//              sink pages: an alias of bf16[j] without a reference of its own), or none
//   bf16[j]    the BF16 page (owns a reference), or, within a step only, a staging page, or none
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "kvant/base/memory.h"
#include "kvant/cache/cache_plan.h"
#include "kvant/cache/kv_cache.h"
#include "kvant/cache/page_object.h"
#include "kvant/cache/page_pool.h"

namespace kvant::cache {

struct SequenceState {
  bool used = false;
  int64_t length = 0;
};

struct GroupState {
  PageEntry* stored = nullptr;      // [max_sequences][pages_per_sequence]
  PageEntry* bf16 = nullptr;        // the same
  std::vector<int64_t> first_page;  // [max_sequences]: pages before it have left the window
  int64_t stored_in_use = 0, bf16_in_use = 0;
  std::array<PageKind, 3> kinds;
  std::vector<formats::SideParams> k_params, v_params;  // [layers of the group][num_kv_heads]
  std::vector<LayerParams> layer_params;                // [layers of the group]
  // Of the running step:
  std::vector<SequenceView> sequences;
  std::vector<CloseItem> closes;
  GroupView view;
};

// What one sequence's new tokens do to the pages of one group.
struct StepPages {
  int64_t first = 0;  // page of the first new token
  int64_t begin = 0;  // pages [begin, end) begin in this step
  int64_t end = 0;
  int64_t close_begin = 0;  // pages [close_begin, close_end) are encoded in this step
  int64_t close_end = 0;

  bool staged(int64_t page) const {
    return page >= begin && page >= close_begin && page < close_end;
  }
};
StepPages step_pages(const GroupPlan& group, int page_tokens, int64_t length, int64_t new_tokens);

struct KvCache::State {
  CacheConfig config;
  CachePlan plan;
  Buffer tables;
  Buffer staging;
  MemoryResource* memory = nullptr;
  std::vector<PagePool> pool;  // one element once created
  std::vector<SequenceState> sequences;
  std::vector<GroupState> groups;
  std::vector<StepSequence> step;  // empty: no step is running
  std::array<uint8_t, 16> fingerprint{};
  // Pages held outside sequences, by HeldPage::index_; entries own a reference each.
  std::vector<int64_t> held_pages;      // [held]: page number, -1 if the index is free
  std::vector<PageEntry> held_entries;  // [held][groups]
  std::vector<int32_t> held_free;       // free indices
  int64_t held_bytes = 0;

  int page_tokens() const { return config.page_tokens; }
  bool in_step() const { return !step.empty(); }
  bool known(SequenceId id) const {
    return id >= 0 && id < static_cast<SequenceId>(sequences.size()) && sequences[id].used;
  }
  Status check_known(SequenceId id) const;
  Status check_no_step() const;
  // Pages that the sequence's tokens occupy; within a step, those of the new tokens too.
  int64_t num_pages(SequenceId id) const;

  PageEntry* stored(int group, SequenceId id) const {
    return groups[group].stored + id * plan.pages_per_sequence;
  }
  PageEntry* bf16(int group, SequenceId id) const {
    return groups[group].bf16 + id * plan.pages_per_sequence;
  }
  int slab_class(int group, uint32_t kind) const {
    return kind == kKindBf16 ? plan.groups[group].bf16_class : plan.groups[group].stored_class;
  }
  // True if page `page` of the group is read as stored from its BF16 slot.
  bool stays_bf16(int group, int64_t page) const {
    return plan.groups[group].plain || (plan.groups[group].sink && page == 0);
  }

  PageEntry take(int group, uint32_t kind);
  void share(int group, PageEntry entry);
  void drop(int group, PageEntry entry);  // no-op for staging pages and none()
  // Drops what both tables hold of a page.
  void drop_page(int group, SequenceId id, int64_t page);
  // Frees pages that have left the window.
  void retire_window(int group, SequenceId id);

  Status check_step(std::span<const StepSequence> sequences) const;
  std::vector<int64_t> needed_pages(std::span<const StepSequence> sequences) const;  // [classes]
  Status check_free_pages(std::span<const int64_t> needed) const;
  void unshare_open_page(int group, SequenceId id);
  void open_pages(int group, const StepSequence& item, uint32_t& next_staging);
  void build_view(int group);
  bool can_have_length(SequenceId id, int64_t length) const;

  // Held pages.
  PageEntry* held(int32_t index) { return held_entries.data() + index * groups.size(); }
  const PageEntry* held(int32_t index) const { return held_entries.data() + index * groups.size(); }
  // An index with no entries yet.
  int32_t new_held(int64_t page);
  void set_held(int32_t index, int group, PageEntry entry);  // takes over one reference
  void drop_held(int32_t index, int group);
  void free_held(int32_t index);
  void attach_group(int group, SequenceId id, std::span<const HeldPage* const> pages);
  Status check_held(std::vector<std::vector<uint32_t>>& references) const;

  // Export, import, integrity.
  uint32_t closed_kind(int group, int64_t page) const {
    return stays_bf16(group, page) ? kKindBf16 : kKindStored;
  }
  struct Exported {
    int group = 0;
    int64_t page = 0;
    PageEntry entry;
    Layout layout = Layout::kPlanar;
  };
  Result<std::vector<std::byte>> export_entry(const Exported& what,
                                              const PageIdentity& identity) const;
  // All groups' objects of page `page`, parsed and checked, with a free slot for each.
  Result<std::vector<PageObject>> check_objects(
      int64_t page, std::span<const std::span<const std::byte>> objects) const;
  Result<PageObject> check_object(int group, int64_t page, std::span<const std::byte> bytes) const;
  void place_object(int group, SequenceId id, int64_t page, const PageObject& object);
  // A new slot with the payload's content.
  PageEntry load_payload(int group, int64_t page, const PageObject& object);
  Status check_tables(int group, SequenceId id,
                      std::vector<std::vector<uint32_t>>& references) const;
};

}  // namespace kvant::cache
