// Closed pages that live outside sequences: hold, attach, exchange (prefix_tree.h owns them).
#include <algorithm>
#include <string>
#include <vector>

#include "kvant/base/check.h"
#include "kvant/cache/kv_cache.h"
#include "kvant/cache/kv_cache_state.h"

namespace kvant::cache {

// ---- HeldPage ----

HeldPage::~HeldPage() {
  if (cache_ != nullptr) cache_->state_->free_held(index_);
}

int64_t HeldPage::page() const {
  return cache_->state_->held_pages[index_];
}

bool HeldPage::has(int group) const {
  return cache_->state_->held(index_)[group].valid();
}

bool HeldPage::sole_holder(int group) const {
  const KvCache::State& s = *cache_->state_;
  const PageEntry entry = s.held(index_)[group];
  return entry.valid() && s.pool[0].references(s.slab_class(group, entry.kind), entry.slot) == 1;
}

int HeldPage::page_class(int group) const {
  return cache_->closed_page_class(group, page());
}

void HeldPage::drop(int group) {
  KVANT_CHECK(cache_->group(group).geometry.window > 0, "only window groups can lack a page");
  cache_->state_->drop_held(index_, group);
}

void HeldPage::take_missing(HeldPage& other) {
  KVANT_CHECK(cache_ == other.cache_ && page() == other.page(), "copies of one page are joined");
  KvCache::State& s = *cache_->state_;
  for (int g = 0; g < cache_->num_groups(); ++g) {
    if (has(g) || !other.has(g)) continue;
    const PageEntry entry = s.held(other.index_)[g];
    s.share(g, entry);
    s.set_held(index_, g, entry);
    s.drop_held(other.index_, g);
  }
}

// ---- the table of held pages ----

int32_t KvCache::State::new_held(int64_t page) {
  int32_t index;
  if (held_free.empty()) {
    index = static_cast<int32_t>(held_pages.size());
    held_pages.push_back(page);
    held_entries.resize(held_entries.size() + groups.size(), PageEntry::none());
    // Giving back must not fail, so the list has room for every index.
    held_free.reserve(held_pages.capacity());
  } else {
    index = held_free.back();
    held_free.pop_back();
    held_pages[index] = page;
  }
  return index;
}

void KvCache::State::set_held(int32_t index, int group, PageEntry entry) {
  held(index)[group] = entry;
  held_bytes += groups[group].kinds[entry.kind].page_bytes;
}

void KvCache::State::drop_held(int32_t index, int group) {
  PageEntry& entry = held(index)[group];
  if (!entry.valid()) return;
  held_bytes -= groups[group].kinds[entry.kind].page_bytes;
  drop(group, entry);
  entry = PageEntry::none();
}

void KvCache::State::free_held(int32_t index) {
  for (int g = 0; g < static_cast<int>(groups.size()); ++g) drop_held(index, g);
  held_pages[index] = -1;
  held_free.push_back(index);
}

Status KvCache::State::check_held(std::vector<std::vector<uint32_t>>& references) const {
  int64_t bytes = 0;
  for (int32_t index = 0; index < static_cast<int32_t>(held_pages.size()); ++index) {
    const std::string name = "held page " + std::to_string(index);
    for (int g = 0; g < static_cast<int>(groups.size()); ++g) {
      const PageEntry entry = held(index)[g];
      const bool free = held_pages[index] < 0;
      if (!entry.valid()) {
        if (!free && plan.groups[g].group.geometry.window == 0)
          return Error(ErrorCode::kInternal, name + " lacks a full-attention page");
        continue;
      }
      if (free) return Error(ErrorCode::kInternal, name + " is free and holds a slot");
      const int slab = slab_class(g, entry.kind);
      if (entry.kind != closed_kind(g, held_pages[index]) || entry.slot >= pool[0].num_slots(slab))
        return Error(ErrorCode::kInternal, name + " names a page that is not a closed one");
      ++references[slab][entry.slot];
      bytes += groups[g].kinds[entry.kind].page_bytes;
    }
  }
  if (bytes != held_bytes) return Error(ErrorCode::kInternal, "the bytes of held pages disagree");
  return {};
}

// ---- hold and attach ----

Result<HeldPage> KvCache::hold_page(SequenceId id, int64_t page) {
  State& s = *state_;
  KVANT_TRY(s.check_known(id));
  KVANT_TRY(s.check_no_step());
  if (page < 0 || page >= s.sequences[id].length / s.page_tokens()) {
    return Error(ErrorCode::kInvalidArgument,
                 "page " + std::to_string(page) + " of sequence " + std::to_string(id) +
                     " is not full: it has " + std::to_string(s.sequences[id].length) + " tokens");
  }
  for (int g = 0; g < num_groups(); ++g) {
    if (s.plan.groups[g].recent_pages > 0) {
      return Error(ErrorCode::kUnsupported,
                   "with +recentN the last pages are BF16, so that no sequence can go on from "
                   "closed ones; use a format without +recentN for prefix caching");
    }
    if (s.plan.groups[g].group.geometry.window == 0 && page < s.groups[g].first_page[id]) {
      return Error(ErrorCode::kInvalidArgument,
                   "sequence " + std::to_string(id) + " has no page " + std::to_string(page));
    }
  }
  HeldPage held(this, s.new_held(page));
  KVANT_TRY(complete_page(held, id));
  return held;
}

Status KvCache::complete_page(HeldPage& held, SequenceId id) {
  State& s = *state_;
  KVANT_TRY(s.check_known(id));
  KVANT_TRY(s.check_no_step());
  const int64_t page = held.page();
  if (page >= s.sequences[id].length / s.page_tokens()) {
    return Error(ErrorCode::kInvalidArgument,
                 "sequence " + std::to_string(id) + " has no page " + std::to_string(page));
  }
  for (int g = 0; g < num_groups(); ++g) {
    if (held.has(g) || page < s.groups[g].first_page[id]) continue;
    const PageEntry entry = s.stored(g, id)[page];
    s.share(g, entry);
    s.set_held(held.index_, g, entry);
  }
  return {};
}

int64_t KvCache::first_needed_page(int group, int64_t num_pages) const {
  return state_->plan.groups[group].kept_from(num_pages, state_->page_tokens());
}

void KvCache::State::attach_group(int group, SequenceId id,
                                  std::span<const HeldPage* const> pages) {
  const int64_t begin = sequences[id].length / page_tokens();
  const int64_t end = begin + static_cast<int64_t>(pages.size());
  // Where a window group's page is missing, everything before the next page is gone.
  int64_t& first = groups[group].first_page[id];
  int64_t keep = std::max(first, plan.groups[group].kept_from(end, page_tokens()));
  for (int64_t page = std::max(keep, begin); page < end; ++page) {
    if (!pages[page - begin]->has(group)) keep = page + 1;
  }
  for (; first < std::min(keep, begin); ++first) drop_page(group, id, first);
  first = keep;
  for (int64_t page = std::max(keep, begin); page < end; ++page) {
    const PageEntry entry = held(pages[page - begin]->index_)[group];
    share(group, entry);
    stored(group, id)[page] = entry;
    bf16(group, id)[page] = entry.kind == kKindBf16 ? entry : PageEntry::none();
  }
}

Status KvCache::attach_pages(SequenceId id, std::span<const HeldPage* const> pages) {
  State& s = *state_;
  KVANT_TRY(s.check_known(id));
  KVANT_TRY(s.check_no_step());
  const int64_t length = s.sequences[id].length;
  const int64_t new_length = length + static_cast<int64_t>(pages.size()) * s.page_tokens();
  if (length % s.page_tokens() != 0 || new_length > s.plan.max_sequence_tokens) {
    return Error(ErrorCode::kInvalidArgument,
                 "pages are attached at a page boundary with room for them; the sequence has " +
                     std::to_string(length) + " tokens of " +
                     std::to_string(s.plan.max_sequence_tokens) + ", " +
                     std::to_string(pages.size()) + " pages are to come");
  }
  for (size_t i = 0; i < pages.size(); ++i) {
    const int64_t expected = length / s.page_tokens() + static_cast<int64_t>(i);
    if (!*pages[i] || pages[i]->cache_ != this || pages[i]->page() != expected) {
      return Error(ErrorCode::kInvalidArgument, "page " + std::to_string(expected) +
                                                    " of the sequence comes next, another is "
                                                    "attached");
    }
  }
  for (int g = 0; g < num_groups(); ++g) s.attach_group(g, id, pages);
  s.sequences[id].length = new_length;
  return {};
}

// ---- page objects ----

Result<std::vector<std::byte>> KvCache::export_held(const HeldPage& held, int group,
                                                    const PageIdentity& identity,
                                                    Layout layout) const {
  const State& s = *state_;
  if (layout != Layout::kPlanar && layout != s.config.layout)
    return Error(ErrorCode::kInvalidArgument, "objects are in planar or the cache's own layout");
  if (group < 0 || group >= num_groups() || !held || !held.has(group)) {
    return Error(ErrorCode::kInvalidArgument,
                 "the page holds nothing of layer group " + std::to_string(group));
  }
  return s.export_entry(
      {.group = group, .page = held.page(), .entry = s.held(held.index_)[group], .layout = layout},
      identity);
}

Result<HeldPage> KvCache::import_held(std::span<const std::span<const std::byte>> objects) {
  State& s = *state_;
  KVANT_TRY(s.check_no_step());
  // The first object says which page it is; check_objects compares the others with it.
  int64_t page = -1;
  for (const std::span<const std::byte> bytes : objects) {
    if (bytes.empty()) continue;
    KVANT_ASSIGN(const PageObject object, parse_page_object(bytes));
    page = static_cast<int64_t>(object.header.first_position) / s.page_tokens();
    break;
  }
  if (page < 0 || page >= s.plan.pages_per_sequence) {
    return Error(ErrorCode::kInvalidArgument,
                 "page " + std::to_string(page) + " is beyond the longest sequence of " +
                     std::to_string(s.plan.max_sequence_tokens) + " tokens, or no page at all");
  }
  KVANT_ASSIGN(const std::vector<PageObject> parsed, s.check_objects(page, objects));
  HeldPage held(this, s.new_held(page));
  for (int g = 0; g < num_groups(); ++g) {
    if (parsed[g].payload.empty()) continue;
    s.set_held(held.index_, g, s.load_payload(g, page, parsed[g]));
  }
  return held;
}

}  // namespace kvant::cache
